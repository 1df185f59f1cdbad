"""What the EROFS tests share: a Tree from a tar that `tarfile` reads, and a mount point that is cleared."""

from __future__ import annotations

import os
import stat
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from shim.index.model import Extent, Node, Tree
from shim.mount import syscalls

_KINDS = {
    tarfile.REGTYPE: stat.S_IFREG,
    tarfile.AREGTYPE: stat.S_IFREG,
    tarfile.DIRTYPE: stat.S_IFDIR,
    tarfile.SYMTYPE: stat.S_IFLNK,
    tarfile.CHRTYPE: stat.S_IFCHR,
    tarfile.BLKTYPE: stat.S_IFBLK,
    tarfile.FIFOTYPE: stat.S_IFIFO,
    tarfile.GNUTYPE_SPARSE: stat.S_IFREG,
}


def tree_from_tars(paths: list[Path]) -> Tree:
    """The union of the tars, later ones over earlier ones (no whiteouts), data left in them."""
    root = Node(stat.S_IFDIR | 0o755, children={})
    for layer, path in enumerate(paths):
        with tarfile.open(path, errors="surrogateescape", encoding="utf-8") as tar:
            for member in tar:
                _add(root, member, layer)
    return Tree(root)


def _add(root: Node, member: tarfile.TarInfo, layer: int) -> None:
    parts = [part for part in os.fsencode(member.name).split(b"/") if part not in (b"", b".")]
    node = _node(root, member, layer)
    if not parts:
        node.children = root.children
        for name in Node.__slots__:
            setattr(root, name, getattr(node, name))
        return
    here = root
    for part in parts[:-1]:
        assert here.children is not None
        here = here.children.setdefault(part, Node(stat.S_IFDIR | 0o755, children={}))
    assert here.children is not None
    old = here.children.get(parts[-1])
    if node.children is not None and old is not None and old.children is not None:
        node.children = old.children
    here.children[parts[-1]] = node


def _node(root: Node, member: tarfile.TarInfo, layer: int) -> Node:
    if member.islnk():
        here = root
        for part in os.fsencode(member.linkname).split(b"/"):
            if part not in (b"", b"."):
                assert here.children is not None
                here = here.children[part]
        return here
    kind = _KINDS[member.type]
    node = Node(kind | member.mode, member.uid, member.gid, _mtime(member))
    node.xattrs = tuple(
        (os.fsencode(key)[13:], os.fsencode(value))
        for key, value in member.pax_headers.items()
        if key.startswith("SCHILY.xattr.")
    )
    if kind == stat.S_IFDIR:
        node.children = {}
    elif kind == stat.S_IFLNK:
        node.target = os.fsencode(member.linkname)
        node.size = len(node.target)
    elif kind in (stat.S_IFCHR, stat.S_IFBLK):
        node.rdev = (member.devmajor, member.devminor)
    elif kind == stat.S_IFREG and member.size:
        node.size = member.size
        node.extents = _extents(member, layer)
    return node


def _mtime(member: tarfile.TarInfo) -> int:
    text = member.pax_headers.get("mtime")
    if text is None:
        return int(member.mtime) * 10**9
    whole, _, fraction = text.partition(".")
    sign = -1 if whole.startswith("-") else 1
    return int(whole) * 10**9 + sign * int(fraction.ljust(9, "0")[:9] or 0)


def _extents(member: tarfile.TarInfo, layer: int) -> tuple[Extent, ...]:
    sparse: list[tuple[int, int]] | None = getattr(member, "sparse", None)
    if sparse is None:
        return (Extent(0, layer, member.offset_data, member.size),)
    extents, offset = [], member.offset_data
    for logical, length in sparse:
        if length:
            extents.append(Extent(logical, layer, offset, length))
            offset += length
    return tuple(extents)


@contextmanager
def unmounting(target: Path) -> Iterator[Path]:
    """Whatever happens inside, nothing is mounted at `target` afterwards."""
    target.mkdir(exist_ok=True)
    try:
        yield target
    finally:
        while os.path.ismount(target):
            syscalls.umount2(target, syscalls.MNT_DETACH)
