"""What `codec.encode` refuses: values no file can carry, and what a builder might hand over."""

from __future__ import annotations

import stat
import time
from array import array
from collections.abc import Callable

import pytest

from shim.errors import IndexFormatError
from shim.index import codec, treecodec, treereader, validate
from shim.index.model import Compression, Extent, Index, Node, Restart, Tree
from shim.index.validate import validate_tree
from tests.support.indexes import NS, directory, file, put, sample, symlink

Change = Callable[[Index], object]


def _tree(node: Node, name: str = "x") -> Change:
    return lambda index: put(index.tree, name, node)


def _xattrs(*pairs: tuple[bytes, bytes]) -> Change:
    return _tree(file(xattrs=pairs))


def _data(*extents: tuple[int, int, int, int], size: int = 4096) -> Change:
    return _tree(Node(stat.S_IFREG, size=size, extents=tuple(Extent(*row) for row in extents)))


def _second_name(index: Index) -> None:
    assert index.tree.root.children is not None
    put(index.tree, "again", index.tree.root.children[b"usr"])


def _loop(index: Index) -> None:
    put(index.tree, "usr/loop", index.tree.root)


def _windows(size: int, at: int) -> Change:
    return lambda index: index.layers[0].spans.windows.__setitem__(slice(at, at + 1), [b"w" * size])


BAD: dict[str, tuple[Change, str]] = {
    "overlap": (_data((0, 1, 0, 99), (50, 1, 512, 99)), "overlap"),
    "unsorted": (_data((500, 1, 0, 99), (0, 1, 512, 99)), "not in order"),
    "empty-extent": (_data((0, 1, 0, 0)), "empty"),
    "negative-layer": (_data((0, -1, 0, 1)), "layer -1"),
    "no-such-layer": (_data((0, 4, 0, 1)), "layer 4"),
    "outside": (_data((0, 0, 9_000_000, 1)), "outside layer 0"),
    "past-size": (_data((4090, 0, 0, 7)), "more data than its size"),
    "device-data": (_tree(Node(stat.S_IFCHR, extents=(Extent(0, 0, 0, 1),))), "data or size"),
    "directory-size": (_tree(Node(stat.S_IFDIR, size=4096, children={})), "data or size"),
    "symlink-size": (_tree(Node(stat.S_IFLNK, size=3, target=b"four")), "data or size"),
    "symlink-nul": (_tree(symlink(b"a\0b")), "symlink target"),
    "file-target": (_tree(Node(stat.S_IFREG, size=1, target=b"t")), "target where"),
    "file-rdev": (_tree(Node(stat.S_IFREG, rdev=(1, 3))), "device number"),
    "negative-rdev": (_tree(Node(stat.S_IFBLK, rdev=(1, -3))), "device number"),
    "file-children": (_tree(Node(stat.S_IFREG, children={})), "contradict"),
    "directory-without": (_tree(Node(stat.S_IFDIR)), "contradict"),
    "negative-mode": (_tree(Node(-1)), "impossible mode"),
    "huge-mode": (_tree(Node(1 << 70)), "impossible mode"),
    "no-type": (_tree(Node(0o644)), "impossible mode"),
    "negative-size": (_tree(Node(stat.S_IFREG, size=-1)), "impossible size"),
    "negative-uid": (_tree(file(uid=-1)), "impossible owner"),
    "gid": (_tree(file(gid=1 << 32)), "impossible owner"),
    "mtime": (_tree(file(mtime=-(1 << 63) * NS - 1)), "64 bits"),
    "nul-name": (_tree(file(), "a\0b"), "no file can have"),
    "long-path": (_tree(file(), "/".join(["p" * 255] * 16)), "longer than 4095"),
    "directory-twice": (_second_name, "a directory with two names"),
    "loop": (_loop, "a directory with two names"),
    "root-file": (lambda index: setattr(index.tree, "root", file()), "root is no directory"),
    "xattr-name-long": (_xattrs((b"user." + b"n" * 251, b"")), "extended attribute"),
    "xattr-nul": (_xattrs((b"user.a\0b", b"")), "extended attribute"),
    "xattr-unprefixed": (_xattrs((b"mime_type", b"")), "extended attribute"),
    "xattr-system": (_xattrs((b"system.posix_acl_accessX", b"")), "extended attribute"),
    "xattr-value": (_xattrs((b"user.a", b"v" * 65536)), "longer than 65535"),
    "xattrs-total": (_xattrs(*((b"user.%d" % i, b"v" * 65500) for i in range(5))), "take more than 262140"),
    "overlay": (_xattrs((b"trusted.overlay", b"")), "overlayfs"),
    "no-layers": (lambda index: index.layers.clear(), "which the image does not have"),
    "many-layers": (lambda index: index.layers.extend(index.layers[:1] * 500), "at most 500"),
    "image": (lambda index: setattr(index, "image", "r.io/a@sha256:" + "0" * 64), "image reference"),
    "image-long": (lambda index: setattr(index, "image", "r.io/" + "a" * 600), "image reference"),
    "layer-digest": (lambda index: setattr(index.layers[0], "digest", "sha256:" + "F" * 64), "layer 0: digest"),
    "diff-id": (lambda index: setattr(index.layers[2], "diff_id", ""), "layer 2: diff id"),
    "media-type": (lambda index: setattr(index.layers[0], "media_type", "text"), "media type"),
    "spacing": (lambda index: setattr(index, "checkpoint_mib", 0), "spacing is 0 MiB"),
    "config": (lambda index: setattr(index, "config", bytes((8 << 20) + 1)), "image config"),
    "plain-sizes": (lambda index: setattr(index.layers[1], "size", 1), "two sizes"),
    "uncovered": (lambda index: setattr(index.layers[0], "uncompressed_size", 9_000_001), "do not cover"),
    "compressed": (lambda index: setattr(index.layers[0], "size", 3_000_001), "do not cover"),
    "span-order": (lambda index: index.layers[0].spans.ustarts.__setitem__(1, 4_200_000), "spans are not in order"),
    "point-order": (lambda index: index.layers[0].spans.cstarts.__setitem__(1, 1_400_003), "points are not in order"),
    "first-kind": (lambda index: index.layers[0].spans.kinds.__setitem__(0, Restart.DEFLATE), "no start of a stream"),
    "stream-bits": (lambda index: index.layers[0].spans.bits.__setitem__(0, 1), "no deflate block"),
    "bits": (lambda index: index.layers[0].spans.bits.__setitem__(1, 8), "unknown kind"),
    "columns": (lambda index: index.layers[0].spans.bits.append(0), "differ in length"),
    "zstd-deflate": (lambda index: index.layers[2].spans.kinds.__setitem__(1, Restart.DEFLATE), "but not gzip"),
    "plain-offset": (lambda index: index.layers[1].spans.cstarts.__setitem__(1, 16383), "two offsets"),
    "window-size": (_windows(32767, 1), "window of 32767"),
    "window-place": (_windows(32768, 0), "window of 32768"),
    "window-lacking": (lambda index: index.layers[0].spans.windows.pop(), "differ in length"),
    "profile": (lambda index: setattr(index, "profile", ((0, 6),)), "profile"),
    "gzip-as-zstd": (lambda index: setattr(index.layers[0], "compression", Compression.ZSTD), "but not gzip"),
}


@pytest.mark.parametrize("name", sorted(BAD))
def test_is_refused_before_writing(name: str) -> None:
    change, message = BAD[name]
    index = sample()
    change(index)
    with pytest.raises(IndexFormatError, match=message):
        codec.encode(index)


def test_limits_themselves_are_allowed() -> None:
    index = sample()
    put(index.tree, "/".join(["p" * 255] * 15 + ["q" * 254]), file(mtime=(1 << 63) * NS - 1))
    put(index.tree, "x", file(xattrs=tuple((b"user.%d" % i, b"v" * 65519) for i in range(4))))
    put(index.tree, "y", symlink(b"t" * 4095, uid=(1 << 32) - 2))
    index.tree.count_links()
    assert max(len(path) for path, _ in index.tree.walk()) == 4095
    assert [path for path, _ in codec.decode_tree(codec.encode(index)).walk()] == [p for p, _ in index.tree.walk()]


def test_a_span_too_long_to_hold() -> None:
    index = sample()
    layer = index.layers[2]
    layer.uncompressed_size = (128 << 20) + 500_001
    layer.spans.ustarts = array("Q", [0, 500_000, layer.uncompressed_size])
    with pytest.raises(IndexFormatError, match="layer 2: a span is longer than 128 MiB"):
        codec.encode(index)


def test_too_many(monkeypatch: pytest.MonkeyPatch) -> None:
    tree = sample().tree
    sizes = [layer.uncompressed_size for layer in sample().layers]
    for limit, least in {"MAX_ENTRIES": codec.count_entries(tree), "MAX_EXTENTS": 3, "MAX_XATTRS": 4}.items():
        with monkeypatch.context() as patch:
            patch.setattr(validate, limit, least)
            validate_tree(tree, sizes)
            patch.setattr(validate, limit, least - 1)
            with pytest.raises(IndexFormatError, match=f"more than {least - 1}"):
                validate_tree(tree, sizes)


def test_deep_tree_is_refused_at_once() -> None:
    """A million directories in one another: no recursion, no paths of a megabyte."""
    tree = Tree(directory())
    chain = [tree.root]
    for _ in range(1_000_000):
        child = directory()
        chain[-1].children = {b"d": child}
        chain.append(child)
    began = time.process_time()
    with pytest.raises(IndexFormatError, match="longer than 4095"):
        validate_tree(tree, [])
    assert time.process_time() - began < 1
    here = tree.root  # the same once more, as a section's bytes, where the names are put together
    for node in chain[1:5000]:
        here.children = {b"d": node}
        here = node
    here.children = {}
    tree.count_links()
    with pytest.raises(IndexFormatError, match="longer than 4095"):
        treereader.decode_tree(treecodec.encode_tree(tree, 0), [])
    for node in chain:  # or freeing it would recurse
        node.children = None
