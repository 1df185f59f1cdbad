"""Layers of hand-made tar entries, merged: what engines show after applying the same layers."""

from __future__ import annotations

import stat
from collections.abc import Iterable
from typing import Any

import pytest

from shim.errors import LayerError
from shim.index.merge import MAX_PATH, TreeMerger, show_path
from shim.index.model import Extent, Node, Tree
from shim.layers.tar import TarEntry

REG, LINK, SYM, CHR, BLK, DIR, FIFO = b"0", b"1", b"2", b"3", b"4", b"5", b"6"


def entry(name: bytes, kind: bytes = REG, **more: Any) -> TarEntry:
    values: dict[str, Any] = {
        "mode": 0o755 if kind == DIR else 0o644,
        "uid": 0,
        "gid": 0,
        "mtime": 1_000,
        "size": 0,
        "linkname": b"",
        "devmajor": 0,
        "devminor": 0,
        "xattrs": (),
        "data_offset": 0,
        "extents": None,
    }
    return TarEntry(name=name, typeflag=kind, **(values | more))


def link(name: bytes, target: bytes, **more: Any) -> TarEntry:
    return entry(name, LINK, linkname=target, **more)


def symlink(name: bytes, target: bytes) -> TarEntry:
    return entry(name, SYM, linkname=target)


def merge(*layers: Iterable[TarEntry]) -> Tree:
    merger = TreeMerger()
    for number, entries in enumerate(layers):
        merger.apply(list(entries), number)
    return merger.finish()


def nodes(tree: Tree) -> dict[bytes, Node]:
    return dict(tree.walk())


def names(tree: Tree) -> list[bytes]:
    return [path for path, _ in tree.walk()]


def test_an_image_without_layers_is_a_bare_root() -> None:
    root = merge().root
    assert (stat.filemode(root.mode), root.uid, root.mtime, root.nlink, root.children) == ("drwxr-xr-x", 0, 0, 2, {})


def test_every_kind_keeps_its_metadata() -> None:
    tree = nodes(
        merge(
            [
                entry(b"./", DIR, mode=0o1711, uid=9, mtime=5),
                entry(b"f", mode=0o6755, uid=1, gid=2, mtime=3_000_000_001, size=700, data_offset=512),
                entry(b"d/", DIR, mode=0o3770, gid=7),
                symlink(b"s", b"../anywhere"),
                entry(b"c", CHR, devmajor=250, devminor=70_000),
                entry(b"b", BLK, devmajor=8, devminor=1),
                entry(b"p", FIFO, mode=0o600),
                entry(b"holes", size=9000, extents=((0, 2048, 512), (8192, 2560, 808), (9000, 3368, 0))),
            ]
        )
    )
    assert (tree[b"/"].mode, tree[b"/"].uid, tree[b"/"].mtime) == (stat.S_IFDIR | 0o1711, 9, 5)
    f = tree[b"/f"]
    assert (f.mode, f.uid, f.gid, f.mtime, f.size) == (stat.S_IFREG | 0o6755, 1, 2, 3_000_000_001, 700)
    assert f.extents == (Extent(0, 0, 512, 700),)
    assert tree[b"/d"].mode == stat.S_IFDIR | 0o3770
    s = tree[b"/s"]
    assert (s.mode, s.target, s.size) == (stat.S_IFLNK | 0o777, b"../anywhere", 11)
    assert (tree[b"/c"].mode, tree[b"/c"].rdev) == (stat.S_IFCHR | 0o644, (250, 70_000))
    assert (tree[b"/b"].mode, tree[b"/b"].rdev) == (stat.S_IFBLK | 0o644, (8, 1))
    assert tree[b"/p"].mode == stat.S_IFIFO | 0o600
    assert tree[b"/holes"].extents == (Extent(0, 0, 2048, 512), Extent(8192, 0, 2560, 808))
    assert tree[b"/"].nlink == 3


@pytest.mark.parametrize("name", [b"a/b", b"./a/b", b"/a/b", b"//a//b", b"a/./b", b"./a/x/../b", b"a/b/", b"/../a/b"])
def test_names_are_cleaned(name: bytes) -> None:
    assert names(merge([entry(name, size=1)])) == [b"/", b"/a", b"/a/b"]


@pytest.mark.parametrize("name", [b"../a", b"a/../../b", b"./../a", b"..", b"a\0b", b"n" * 256, b"d" * 256 + b"/f"])
def test_names_that_cannot_be_are_refused(name: bytes) -> None:
    with pytest.raises(LayerError, match="layer 1: entry"):
        merge([entry(name)])


def test_a_path_longer_than_linux_allows_is_refused() -> None:
    long = b"/".join([b"d" * 200] * 21)
    with pytest.raises(LayerError, match=f"longer than {MAX_PATH}"):
        merge([entry(long)])
    steps = b"/".join([b"d" * 200] * 15)
    with pytest.raises(LayerError, match=f"longer than {MAX_PATH}"):
        merge([symlink(b"s", steps), entry(b"s/" + b"e" * 200 + b"/" + steps + b"/f")])


def test_directories_no_layer_names_are_roots() -> None:
    tree = nodes(merge([entry(b"a/b/c", uid=5, mtime=77)]))
    for path in (b"/a", b"/a/b"):
        assert (stat.filemode(tree[path].mode), tree[path].uid, tree[path].mtime) == ("drwxr-xr-x", 0, 0)


def test_an_entry_names_its_directory_later() -> None:
    tree = nodes(merge([entry(b"a/f"), entry(b"a", DIR, mode=0o700, mtime=9)], [entry(b"a/g", mtime=10)]))
    assert (stat.S_IMODE(tree[b"/a"].mode), tree[b"/a"].mtime) == (0o700, 9)
    assert set(tree) == {b"/", b"/a", b"/a/f", b"/a/g"}


def test_last_entry_of_a_name_wins() -> None:
    tree = nodes(merge([entry(b"f", size=1, data_offset=512), entry(b"f", size=2, data_offset=1536)]))
    assert tree[b"/f"].extents == (Extent(0, 0, 1536, 2),)


def test_a_directory_merges_with_a_lower_one_and_takes_its_own_metadata() -> None:
    lower = [entry(b"d", DIR, mode=0o700, uid=3, xattrs=((b"user.a", b"1"),)), entry(b"d/old")]
    tree = nodes(merge(lower, [entry(b"d", DIR, mode=0o755, mtime=50), entry(b"d/new")]))
    assert set(tree) == {b"/", b"/d", b"/d/old", b"/d/new"}
    d = tree[b"/d"]
    assert (stat.S_IMODE(d.mode), d.uid, d.mtime, d.xattrs) == (0o755, 0, 50, ())


@pytest.mark.parametrize("same_layer", [True, False])
@pytest.mark.parametrize("new", [entry(b"x"), symlink(b"x", b"y"), entry(b"x", FIFO), link(b"x", b"z")])
def test_what_is_no_directory_replaces_a_directory_and_all_in_it(new: TarEntry, same_layer: bool) -> None:
    first, second = [entry(b"z"), entry(b"x", DIR), entry(b"x/in/deep")], [new]
    tree = merge(first + second) if same_layer else merge(first, second)
    assert names(tree) == [b"/", b"/x", b"/z"]


@pytest.mark.parametrize("same_layer", [True, False])
@pytest.mark.parametrize("old", [entry(b"x"), symlink(b"x", b"real"), entry(b"x", FIFO)])
def test_a_directory_replaces_what_is_none(old: TarEntry, same_layer: bool) -> None:
    first, second = [entry(b"real/kept"), old], [entry(b"x", DIR), entry(b"x/f")]
    tree = nodes(merge(first + second) if same_layer else merge(first, second))
    assert tree[b"/x"].is_dir
    assert set(tree[b"/x"].children or ()) == {b"f"}
    assert set(tree[b"/real"].children or ()) == {b"kept"}


@pytest.mark.parametrize("same_layer", [True, False])
@pytest.mark.parametrize("target", [b"usr/lib", b"/usr/lib", b"./usr//lib/", b"../../usr/lib", b"usr/share/../lib"])
def test_symlinked_parents_are_followed_inside_the_root(target: bytes, same_layer: bool) -> None:
    first = [entry(b"usr/share", DIR), entry(b"usr/lib", DIR), symlink(b"lib", target), symlink(b"l2", b"lib")]
    second = [entry(b"lib/a"), entry(b"l2/sub/b")]
    tree = nodes(merge(first + second) if same_layer else merge(first, second))
    assert {b"/usr/lib/a", b"/usr/lib/sub/b"} <= set(tree)
    assert tree[b"/lib"].is_symlink


def test_symlinks_below_the_root_lead_from_where_they_stand() -> None:
    links = [symlink(b"opt/abs", b"/usr/lib"), symlink(b"opt/rel", b"lib"), symlink(b"opt/up", b"../usr/lib")]
    tree = nodes(merge([*links, entry(b"opt/abs/a"), entry(b"opt/rel/r"), entry(b"opt/up/u")]))
    assert set(tree[b"/usr/lib"].children or ()) == {b"a", b"u"}
    assert set(tree[b"/opt/lib"].children or ()) == {b"r"}


def test_a_dangling_symlinks_target_is_made() -> None:
    assert b"/usr/lib/f" in nodes(merge([symlink(b"lib", b"usr/lib"), entry(b"lib/f")]))


def test_a_symlink_made_after_a_directory_was_used_is_not_ignored() -> None:
    tree = nodes(merge([entry(b"a/1"), symlink(b"a", b"b"), entry(b"a/2")], [entry(b"a/3")]))
    assert set(tree) == {b"/", b"/a", b"/b", b"/b/2", b"/b/3"}


def test_symlink_mazes_end() -> None:
    with pytest.raises(LayerError, match="too many symlinks"):
        merge([symlink(b"a", b"b"), symlink(b"b", b"a"), entry(b"a/f")])
    with pytest.raises(LayerError, match="too many symlinks"):
        merge([symlink(b"a", b"a/" * 40 + b"x"), entry(b"a/f")])


def test_a_lower_file_in_the_way_of_a_parent_gives_way_and_one_of_the_same_layer_is_an_error() -> None:
    assert names(merge([entry(b"a")], [entry(b"a/f")])) == [b"/", b"/a", b"/a/f"]
    with pytest.raises(LayerError, match="not a directory"):
        merge([entry(b"a"), entry(b"a/f")])


# --- whiteouts ------------------------------------------------------------------------------------------------------


def test_a_whiteout_hides_lower_names_only_wherever_it_stands() -> None:
    lower = [entry(b"f"), entry(b"d/x"), entry(b"keep"), entry(b"again/old")]
    for order in (1, -1):
        upper = [entry(b".wh.f"), entry(b".wh.d"), entry(b".wh.again"), entry(b"again", DIR), entry(b"again/new")]
        assert names(merge(lower, upper[::order])) == [b"/", b"/again", b"/again/new", b"/keep"]


def test_a_whiteout_of_the_first_or_the_same_layer_hides_nothing() -> None:
    assert names(merge([entry(b"f"), entry(b".wh.f"), entry(b"d/.wh.nothing")])) == [b"/", b"/d", b"/f"]


def test_a_whiteout_is_one_whatever_its_type() -> None:
    for kind in (REG, DIR, SYM, CHR):
        assert names(merge([entry(b"f")], [entry(b".wh.f", kind, linkname=b"x")])) == [b"/"]


def test_an_opaque_directory_hides_lower_children_only_wherever_it_stands() -> None:
    lower = [entry(b"d/old/deep"), entry(b"d/file"), entry(b"other")]
    upper = [entry(b"d", DIR, mode=0o711), entry(b"d/old/new"), entry(b"d/.wh..wh..opq"), entry(b"d/last")]
    for order in (1, -1):
        tree = nodes(merge(lower, upper[::order]))
        assert set(tree) == {b"/", b"/d", b"/d/last", b"/d/old", b"/d/old/new", b"/other"}
        assert stat.S_IMODE(tree[b"/d"].mode) == 0o711


def test_an_opaque_root_hides_all() -> None:
    assert names(merge([entry(b"a/b")], [entry(b"new"), entry(b".wh..wh..opq")])) == [b"/", b"/new"]


def test_whiteouts_follow_symlinked_parents() -> None:
    lower = [entry(b"usr/lib/x"), entry(b"usr/lib/y"), symlink(b"lib", b"usr/lib")]
    assert b"/usr/lib/x" not in nodes(merge(lower, [entry(b"lib/.wh.x")]))
    assert not nodes(merge(lower, [entry(b"lib/.wh..wh..opq")]))[b"/usr/lib"].children


@pytest.mark.parametrize("name", [b".wh.", b"a/.wh..", b".wh..."])
def test_a_whiteout_of_nothing_is_refused(name: bytes) -> None:
    with pytest.raises(LayerError, match="whiteout of nothing"):
        merge([entry(name)])


def test_aufs_bookkeeping_is_skipped_but_its_hard_links_work() -> None:
    entries = [
        entry(b".wh..wh.aufs"),
        entry(b".wh..wh.orph", DIR),
        entry(b".wh..wh.plnk", DIR),
        entry(b".wh..wh.plnk/12.34", size=3, data_offset=512),
        link(b"one", b".wh..wh.plnk/12.34"),
        link(b"two", b".wh..wh.plnk/12.34"),
    ]
    tree = nodes(merge(entries))
    assert set(tree) == {b"/", b"/one", b"/two"}
    assert tree[b"/one"] is tree[b"/two"]
    assert tree[b"/one"].nlink == 2


def test_an_overlays_own_whiteout_hides_its_name() -> None:
    merger = TreeMerger()
    merger.apply([entry(b"a"), entry(b"null", CHR, devmajor=1, devminor=3)], 0)
    merger.apply([entry(b"a", CHR), entry(b"b", CHR)], 1)
    assert names(merger.finish()) == [b"/", b"/null"]
    assert merger.dropped == {"overlay whiteout": 2}


# --- hard links -----------------------------------------------------------------------------------------------------


def test_hard_links_are_one_inode() -> None:
    tree = nodes(merge([entry(b"a", size=1, data_offset=512), link(b"d/b", b"./a"), link(b"c", b"/d/b")]))
    assert tree[b"/a"] is tree[b"/d/b"] is tree[b"/c"]
    assert tree[b"/a"].nlink == 3


def test_hard_links_to_anything_but_directories() -> None:
    tree = nodes(merge([symlink(b"s", b"nowhere"), link(b"s2", b"s"), entry(b"p", FIFO), link(b"p2", b"p")]))
    assert tree[b"/s"] is tree[b"/s2"]
    assert tree[b"/s2"].mode == stat.S_IFLNK | 0o777
    assert tree[b"/p2"].nlink == 2
    with pytest.raises(LayerError, match="hard link to the directory"):
        merge([entry(b"d", DIR), link(b"x", b"d")])


def test_a_hard_link_sets_the_metadata_of_its_layers_inode() -> None:
    tree = nodes(
        merge(
            [
                entry(b"a", mode=0o644, xattrs=((b"user.a", b"1"),)),
                link(b"b", b"a", mode=0o4755, uid=7, mtime=9, xattrs=((b"user.b", b"2"),)),
            ]
        )
    )
    a = tree[b"/a"]
    assert (stat.S_IMODE(a.mode), a.uid, a.mtime) == (0o4755, 7, 9)
    assert a.xattrs == ((b"user.a", b"1"), (b"user.b", b"2"))


def test_a_hard_link_to_a_lower_layers_file_changes_nothing() -> None:
    tree = nodes(merge([entry(b"a", mode=0o600, uid=5, mtime=4)], [link(b"b", b"a", mode=0o777, uid=9)]))
    a = tree[b"/a"]
    assert tree[b"/b"] is a
    assert (stat.S_IMODE(a.mode), a.uid, a.mtime, a.nlink) == (0o600, 5, 4, 2)


def test_replacing_one_name_leaves_the_others() -> None:
    lower = [entry(b"a", size=1, data_offset=512), link(b"b", b"a")]
    tree = nodes(merge(lower, [entry(b"a", size=2, data_offset=512)]))
    assert tree[b"/b"].extents == (Extent(0, 0, 512, 1),)
    assert tree[b"/a"].extents == (Extent(0, 1, 512, 2),)
    assert tree[b"/a"].nlink == tree[b"/b"].nlink == 1


@pytest.mark.parametrize("target", [b"gone", b"x", b"no/where", b"", b"../f"])
def test_a_hard_link_to_nothing_is_refused(target: bytes) -> None:
    with pytest.raises(LayerError):
        merge([link(b"x", target)])
    with pytest.raises(LayerError):
        merge([entry(b"gone")], [entry(b".wh.gone"), link(b"x", target)])


# --- xattrs, times, bounds ------------------------------------------------------------------------------------------


def test_xattrs_that_would_steer_an_overlay_or_that_no_file_system_takes_are_dropped() -> None:
    merger = TreeMerger()
    capability = (b"security.capability", b"\1\0\0\2")
    xattrs = (capability, (b"trusted.overlay.opaque", b"y"), (b"user.overlay.redirect", b"/x"), (b"system.x", b"1"))
    merger.apply([entry(b"f", xattrs=xattrs), entry(b"s", SYM, linkname=b"f", xattrs=((b"user.a", b"1"),))], 0)
    tree = nodes(merger.finish())
    assert tree[b"/f"].xattrs == (capability,)
    assert tree[b"/s"].xattrs == ()
    assert merger.dropped == {"overlay xattr": 2, "xattr no file system takes": 2}


def test_times_before_1970_are_1970_as_engines_set_them() -> None:
    tree = nodes(merge([entry(b"a", mtime=-1), entry(b"b", mtime=1 << 63)]))
    assert (tree[b"/a"].mtime, tree[b"/b"].mtime) == (0, 0)


@pytest.mark.parametrize(
    "bad",
    [
        entry(b"x", uid=1 << 32),
        entry(b"x", gid=-1),
        entry(b"x", b"s"),
        entry(b"x", CHR, devmajor=1 << 12),
        entry(b"x", BLK, devminor=-1),
        symlink(b"x", b""),
        symlink(b"x", b"t" * 4096),
        symlink(b"x", b"a\0b"),
        entry(b"x", xattrs=((b"user." + b"n" * 251, b""),)),
        entry(b"x", xattrs=((b"user.v", bytes(65537)),)),
    ],
)
def test_values_no_engine_can_apply_are_refused(bad: TarEntry) -> None:
    with pytest.raises(LayerError):
        merge([bad])


def test_owner_minus_one_stays_root() -> None:
    node = nodes(merge([entry(b"x", uid=0xFFFFFFFF, gid=0xFFFFFFFE)]))[b"/x"]
    assert (node.uid, node.gid) == (0, 0xFFFFFFFE)


def test_entries_are_bounded() -> None:
    merger = TreeMerger(max_entries=10)
    merger.apply([entry(b"%d" % n) for n in range(9)], 0)
    with pytest.raises(LayerError, match="one too many"):
        merger.apply([entry(b"a/b/c")], 1)


def test_the_deepest_path_is_fine() -> None:
    path = b"/".join([b"d"] * 2048)
    tree = merge([entry(path)], [entry(path, size=1)])
    assert len(names(tree)) == 2049
    assert names(merge([entry(path)], [entry(b".wh.d")])) == [b"/"]


def test_messages_show_any_name_on_one_printable_line() -> None:
    shown = show_path(b"a\n\x1b[2J\xff" + "ü".encode() + b"x" * 500)
    assert shown.startswith("a\\n\\x1b[2J\\xffü")
    assert len(shown) == 200
    with pytest.raises(LayerError, match=r'entry "a\\n" is'):
        merge([entry(b"a\n"), entry(b"a\n/b")])
