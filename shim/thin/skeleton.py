"""What of an image's tree a thin image holds, and its layer's tar.

Before a container starts, its engine looks into the root by itself, and sees the image's own layers only: it reads
/etc/passwd and /etc/group, copies volumes' content, makes the working directory. A directory that it makes, or that a
build's COPY makes, would hide the tree's; and COPY and `docker cp` write through links. So the layer has every
directory, every symlink, and the files an engine reads. Pure: no I/O but on the streams that are passed in.
"""

from __future__ import annotations

import posixpath
import re
import stat
import tarfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from io import BytesIO
from typing import BinaryIO

from shim.errors import LayerError, UsageError
from shim.index.merge import show_path
from shim.index.model import Node, Tree
from shim.runtime.reference import MARKER, MARKER_DIR

_DIR, _MARKER = b"/" + MARKER_DIR.encode(), MARKER.encode()
READ_BY_ENGINES = (b"/etc/passwd", b"/etc/group")
MAX_LINKS = 40  # symlinks followed for one path: the kernel's bound
_HALVES = re.compile("[\ud800-\udc7f\udd00-\udfff]")  # all but what stands for bytes that are no UTF-8
MAX_STEPS = 2_000_000  # path components walked, all in all: symlink mazes end here

_TYPES = {
    stat.S_IFREG: tarfile.REGTYPE,
    stat.S_IFDIR: tarfile.DIRTYPE,
    stat.S_IFLNK: tarfile.SYMTYPE,
    stat.S_IFCHR: tarfile.CHRTYPE,
    stat.S_IFBLK: tarfile.BLKTYPE,
    stat.S_IFIFO: tarfile.FIFOTYPE,
}


@dataclass(slots=True)
class Skeleton:
    """entries: (path, node), each after its directory, by name; hard links are one node under several paths.
    files: the nodes whose content is needed. root: the tree's. notes: what was left out, a line each."""

    root: Node
    entries: list[tuple[bytes, Node]] = field(default_factory=list)
    files: list[Node] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def content_bytes(self) -> int:
        return sum(node.size for node in self.files)


class Paths:
    """Follows paths inside a tree as chroot(2) would."""

    def __init__(self, tree: Tree) -> None:
        self._root = tree.root
        self._steps = MAX_STEPS

    def follow(self, path: bytes) -> tuple[bytes, Node | None]:
        """(path without links, its node); the node is None where `path` leads nowhere.

        Raises LayerError for a tree whose links take too many steps to follow.
        """
        done: list[tuple[bytes, Node]] = [(b"", self._root)]
        todo = path.split(b"/")[::-1]
        links = 0
        while todo:
            name = todo.pop()
            here, directory = done[-1]
            if directory.children is None:  # also for the empty name behind a slash, and for ..
                return here, None
            if name in (b"", b"."):
                continue
            if name == b"..":
                if len(done) > 1:
                    done.pop()
                continue
            self._steps -= 1
            node = directory.children.get(name)
            if node is None:
                return here + b"/" + name, None
            if not node.is_symlink:
                done.append((here + b"/" + name, node))
                continue
            links += 1
            target = node.target.split(b"/")[::-1]
            self._steps -= len(target)
            if self._steps < 0:
                raise LayerError("the image's symlinks lead through too many others")
            if links > MAX_LINKS:
                return here + b"/" + name, None
            if node.target[:1] == b"/":
                del done[1:]
            todo += target
        return done[-1][0] or b"/", done[-1][1]


def select(tree: Tree, volumes: Iterable[bytes], max_bytes: int) -> Skeleton:
    """The part of `tree` that a thin image holds. volumes: paths whose content belongs to it.

    Raises UsageError when the content has more than `max_bytes`, LayerError for a maze of links.
    """
    paths = Paths(tree)
    skeleton = Skeleton(tree.root)
    wanted: set[bytes] = set()
    largest = _add_content(skeleton, wanted, paths, volumes)
    if skeleton.content_bytes > max_bytes:
        raise UsageError(
            f"the content of the image's volumes has {skeleton.content_bytes} bytes, most of it at"
            f" {show_path(largest)}, and belongs into the thin image: at most {max_bytes} are allowed",
            hint="allow more with --max-volume-mib N, or run the image by an annotation, which copies nothing",
        )
    for path, node in tree.walk():
        if path == b"/":
            continue
        if path == _DIR and not node.is_dir:
            skeleton.notes.append(f"{show_path(path)} of the image gives way to the directory of the index")
        elif node.is_dir or node.is_symlink or path in wanted:
            skeleton.entries.append((path, node))
    return skeleton


def _add_content(skeleton: Skeleton, wanted: set[bytes], paths: Paths, volumes: Iterable[bytes]) -> bytes:
    """Add what engines read to `wanted` (paths) and `skeleton.files`; returns the volume that has most bytes."""
    found: list[tuple[bytes, bytes, Node]] = []
    for asked in (*READ_BY_ENGINES, *volumes):
        path, node = paths.follow(asked)
        if node is None or (asked in READ_BY_ENGINES and not node.is_file):
            continue
        found.append((path, asked, node))
    counted: set[int] = set()
    largest = (-1, b"")
    covered = b"\0"
    for path, asked, node in sorted(found, key=lambda item: item[0] + b"/"):
        if (path + b"/").startswith(covered):
            continue  # below another volume, or the same over a link
        covered = path.rstrip(b"/") + b"/"
        size = 0
        for below, inner in _below(path, node):
            if inner.is_dir:
                continue
            if stat.S_IFMT(inner.mode) not in _TYPES:
                skeleton.notes.append(f"{show_path(below)} is a socket, which no layer can hold")
                continue
            wanted.add(below)
            if inner.is_file and id(inner) not in counted:
                counted.add(id(inner))
                skeleton.files.append(inner)
                size += inner.size
        largest = max(largest, (size, asked))
    return largest[1]


def _below(path: bytes, node: Node) -> Iterable[tuple[bytes, Node]]:
    for below, inner in Tree(node).walk():
        yield (path.rstrip(b"/") + below if below != b"/" else path), inner


def write_tar(skeleton: Skeleton, marker: bytes, out: BinaryIO, content: Callable[[Node], BinaryIO]) -> None:
    """Write the layer's tar (POSIX pax format): the index file `marker` at /.clip/index.clip, and the skeleton.

    content: opens the bytes of one of `skeleton.files`. The same input gives the same bytes.
    """
    kept = dict(skeleton.entries).get(_DIR)
    written: dict[int, bytes] = {}
    with tarfile.open(
        fileobj=out, mode="w|", format=tarfile.PAX_FORMAT, encoding="utf-8", errors="surrogateescape"
    ) as tar:
        tar.addfile(_info(b"/", skeleton.root))
        tar.addfile(_info(_DIR, kept or Node(stat.S_IFDIR | 0o755)))
        index = _info(_MARKER, Node(stat.S_IFREG | 0o644, size=len(marker)))
        tar.addfile(index, BytesIO(marker))
        for path, node in skeleton.entries:
            if path in (_DIR, _MARKER):
                continue
            tar.members.clear()  # type: ignore[attr-defined]  # kept for readers; there may be a million
            info = _info(path, node)
            first = written.setdefault(id(node), path)
            if first != path:
                info.type, info.size, info.linkname = tarfile.LNKTYPE, 0, _text(first[1:])
                tar.addfile(info)
            elif node.is_file:
                with content(node) as data:
                    tar.addfile(info, data)
            else:
                tar.addfile(info)


def _info(path: bytes, node: Node) -> tarfile.TarInfo:
    info = tarfile.TarInfo(_text(path[1:] or b"."))
    records: dict[str, str] = {}
    info.type = _TYPES[stat.S_IFMT(node.mode)]
    info.mode = stat.S_IMODE(node.mode)
    info.uid, info.gid = node.uid, node.gid
    seconds, nanoseconds = divmod(node.mtime, 10**9)
    info.mtime = seconds
    if nanoseconds:
        records["mtime"] = f"{seconds}.{nanoseconds:09}"
    if node.is_file:
        info.size = node.size
    elif node.is_symlink:
        info.linkname = _text(node.target)
    elif stat.S_ISCHR(node.mode) or stat.S_ISBLK(node.mode):
        info.devmajor, info.devminor = node.rdev
    for name, value in node.xattrs:
        if b"=" not in name:  # a pax record's key ends at the first one
            records["SCHILY.xattr." + _text(name)] = _text(value)
    info.pax_headers = records
    return info


def _text(raw: bytes) -> str:
    return raw.decode("utf-8", "surrogateescape")


def clean(volume: str) -> bytes:
    """A path of an image config's `Volumes` as engines take it: from the root, without `.`, `..` and double slashes.
    Halves of surrogate pairs, which JSON can have, are no characters: for Go neither."""
    path = posixpath.normpath("/" + volume.lstrip("/"))
    return _HALVES.sub("\ufffd", path).encode("utf-8", "surrogateescape")
