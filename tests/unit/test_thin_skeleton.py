"""The skeleton of a thin image: what of a tree it holds, and its tar as Go's and our own readers take it."""

from __future__ import annotations

import io
import stat
import tarfile

import pytest

from shim.errors import LayerError, UsageError
from shim.index.merge import TreeMerger
from shim.index.model import Node, Tree
from shim.layers.tar import TarWalker
from shim.thin.skeleton import Paths, Skeleton, clean, select, write_tar
from tests.support.indexes import NS, directory, file, put, symlink

MIB = 1 << 20


def system() -> Tree:
    """A merged /usr, links of all kinds, users, a volume."""
    tree = Tree(directory())
    put(tree, "usr/bin/tool", file(100, mode=0o4755))
    put(tree, "usr/lib", directory(mtime=7 * NS + 5, uid=3_000_000, xattrs=((b"user.x", b"\0\xff=\n"),)))
    put(tree, "bin", symlink(b"usr/bin"))
    put(tree, "usr/bin/alias", symlink(b"tool"))
    put(tree, "var/run", symlink(b"/run"))  # which is not there
    put(tree, "srv/link", symlink(b"../bin/./"))
    put(tree, "tmp", Node(stat.S_IFDIR | 0o1777, children={}))
    put(tree, "etc/passwd", file(30))
    put(tree, "etc/group", file(20))
    put(tree, "etc/shadow", file(10, mode=0o600))
    put(tree, "data/sub/a", file(5))
    put(tree, "data/pipe", Node(stat.S_IFIFO | 0o600))
    put(tree, "data/null", Node(stat.S_IFCHR | 0o666, rdev=(1, 3)))
    put(tree, "data/to-tool", symlink(b"/bin/tool"))
    tree.count_links()
    return tree


def paths(skeleton: Skeleton) -> list[bytes]:
    return [path for path, _ in skeleton.entries]


def content(node: Node) -> io.BytesIO:
    return io.BytesIO(b"c" * node.size)


def archive(skeleton: Skeleton, marker: bytes = b"an index") -> bytes:
    out = io.BytesIO()
    write_tar(skeleton, marker, out, content)
    return out.getvalue()


def merged(data: bytes) -> Tree:
    """What the layer is when it is applied, by the walker that reads layers as Go does."""
    walker = TarWalker()
    walker.feed(data)
    walker.finish()
    merger = TreeMerger()
    merger.apply(walker.entries, 0)
    return merger.finish()


def test_directories_links_and_users() -> None:
    found = select(system(), [], MIB)
    assert paths(found) == [
        *(
            b"/bin",
            b"/data",
            b"/data/sub",
            b"/data/to-tool",
            b"/etc",
            b"/etc/group",
            b"/etc/passwd",
            b"/srv",
            b"/srv/link",
            b"/tmp",
        ),
        *(b"/usr", b"/usr/bin", b"/usr/bin/alias", b"/usr/lib", b"/var", b"/var/run"),
    ]
    assert found.content_bytes == 50


@pytest.mark.parametrize("volume", [b"/data", b"/link", b"/etc/../data/"])
def test_content_of_a_volume(volume: bytes) -> None:
    tree = system()
    put(tree, "link", symlink(b"data"))
    found = select(tree, [volume, b"/data/sub", b"/none", volume], MIB)
    assert set(paths(found)) - set(paths(select(tree, [], MIB))) == {
        b"/data/sub/a", b"/data/pipe", b"/data/null"
    }  # fmt: skip
    assert found.content_bytes == 55


def test_users_behind_links() -> None:
    tree = system()
    put(tree, "etc", symlink(b"usr/etc"))
    put(tree, "usr/etc/passwd", symlink(b"../share/one"))
    put(tree, "usr/share/one", symlink(b"/usr/share/two"))
    put(tree, "usr/share/two", file(9))
    put(tree, "usr/etc/group", Node(stat.S_IFIFO | 0o600))  # an engine would wait for it; nothing to have
    found = select(tree, [], MIB)
    assert {b"/etc", b"/usr/etc/passwd", b"/usr/share/one", b"/usr/share/two"} <= set(paths(found))
    assert b"/usr/etc/group" not in paths(found)
    assert found.content_bytes == 9


def test_no_users_at_all() -> None:
    tree = Tree(directory())
    put(tree, "app", file(5))
    assert select(tree, [b"/data"], MIB).entries == []
    found = [path for path, _ in merged(archive(select(tree, [], MIB))).walk()]
    assert found == [b"/", b"/.clip", b"/.clip/index.clip"]


def test_too_large_a_volume_is_refused() -> None:
    tree = system()
    put(tree, "data/big", Node(stat.S_IFREG | 0o644, size=1 << 40))  # one hole
    with pytest.raises(UsageError, match=r"most of it at /data, .* at most 1048576") as caught:
        select(tree, [b"/usr", b"/data"], MIB)
    assert "--max-volume-mib" in caught.value.hint


def test_tar_holds_all_that_engines_see() -> None:
    tree = system()
    put(tree, b"odd/\xff\n\\ \xc3\xb6", directory(mtime=NS))
    put(tree, b"odd/" + b"n" * 255 + b"/" + b"m" * 200, directory())
    put(tree, b"odd/link", symlink(b"/".join([b"n" * 255] * 5)))
    put(tree, "data/hard", dict(tree.walk())[b"/data/sub/a"])
    data = archive(select(tree, [b"/data"], MIB))
    again = dict(merged(data).walk())
    expected = dict(tree.walk())
    assert again.pop(b"/.clip").mode == stat.S_IFDIR | 0o755
    assert again.pop(b"/.clip/index.clip").size == len(b"an index")
    assert again[b"/data/hard"] is again[b"/data/sub/a"]
    for path, node in again.items():
        for key in ("mode", "uid", "gid", "mtime", "size", "rdev", "target", "xattrs"):
            assert getattr(node, key) == getattr(expected[path], key), (path, key)
    assert {path for path, node in expected.items() if node.is_dir} == {p for p, n in again.items() if n.is_dir}
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        member = tar.extractfile("data/hard")
        assert member is not None
        assert member.read() == b"ccccc"


def test_same_input_same_bytes() -> None:
    assert archive(select(system(), [b"/data"], MIB)) == archive(select(system(), [b"/data"], MIB))


@pytest.mark.parametrize("kind", ["file", "symlink", "directory"])
def test_what_the_image_has_at_our_place(kind: str) -> None:
    tree = system()
    made = {"file": file(3), "symlink": symlink(b"usr"), "directory": directory(uid=7)}[kind]
    put(tree, ".clip", made)
    found = select(tree, [], MIB)
    again = dict(merged(archive(found)).walk())
    assert again[b"/.clip"].is_dir
    assert again[b"/.clip/index.clip"].size == 8
    assert (again[b"/.clip"].uid == 7) == (kind == "directory")
    assert bool(found.notes) == (kind != "directory")


def test_paths_are_followed_as_chroot_does() -> None:
    tree = system()
    put(tree, "loop", symlink(b"loop"))
    put(tree, "up", symlink(b"../../../usr/../bin"))
    follow = Paths(tree).follow
    assert follow(b"/up/tool")[0] == b"/usr/bin/tool"
    assert follow(b"/")[0] == b"/"
    for dangling in (b"/loop", b"/usr/bin/tool/", b"/usr/bin/tool/..", b"/none/x"):
        assert follow(dangling)[1] is None, dangling


def test_a_maze_of_links_ends() -> None:
    tree = Tree(directory())
    put(tree, "d", directory())
    for n in range(30):  # each leads through the one before, and through thousands of directories
        put(tree, f"l{n}", symlink(b"/".join([b"d/.."] * 600) + (b"/l%d" % (n - 1) if n else b"/d")))
    with pytest.raises(LayerError, match="too many"):
        select(tree, [b"/l29/%d" % n for n in range(200)], MIB)


@pytest.mark.parametrize(
    ("written", "taken"),
    [
        ("/data/", b"/data"), ("data", b"/data"), ("//a//b/../c", b"/a/c"), ("/../..", b"/"), ("/é", "/é".encode()),
        ("/a\ud800b", "/a\ufffdb".encode()), ("/a\udcff", b"/a\xff"),
    ],
)  # fmt: skip
def test_names_of_volumes(written: str, taken: bytes) -> None:
    assert clean(written) == taken
