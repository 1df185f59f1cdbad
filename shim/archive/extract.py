"""Unpack an archive into a directory: all that POSIX can see, every file's CRC-64 checked."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable
from pathlib import Path

from fastcrc import crc64

from shim.archive.blocks import BASE
from shim.archive.remote import reading
from shim.errors import IndexFormatError, IntegrityError, StoreError, UsageError
from shim.goclip import files
from shim.goclip.tree import Data, tree_of
from shim.index import codec, container
from shim.index.merge import show_path
from shim.index.model import Node, Tree

Progress = Callable[[int, int], None]
_PIECE = 4 << 20
_NEW = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC


def extract(
    archive: Path,
    directory: Path,
    *,
    progress: Progress | None = None,
    warn: Callable[[str], None] | None = None,
) -> int:
    """Unpack `archive` into `directory`, which is made, or is there and empty; how many names were made.

    A foreign archive gives what it has: no xattrs, no devices, no hard links. Who is not root gets files of their own:
    owners, devices and privileged attributes are left out, with a warning. Raises UsageError (the directory),
    IndexFormatError, IntegrityError (a block's CRC is wrong; what was unpacked so far stays), StoreError (the disk).
    """
    _check_target(directory)
    with reading(archive) as (read, size):
        if not files.is_go(read(0, min(size, len(files.MAGIC)))):
            raise IndexFormatError(f"{archive} is no archive", hint="make one with `clip-shim archive REF -o FILE`")
        clip = files.read(read, size)
        if clip.place is not None:
            raise IndexFormatError(
                f"{archive} is a {clip.kind}: it has no data", hint="fetch the archive itself: `clip-shim pull s3://…`"
            )
        tree, data = tree_of(clip)
        if container.start_of_part(read, size):
            index = codec.read_index(archive)
            if index.archive is not None:
                tree, data = index.tree, _places(index.tree, data)
    try:
        with open(archive, "rb", buffering=0) as source:
            work = _Work(source.fileno(), directory, data, progress)
            work.run(tree)
    except OSError as error:
        name = os.fsdecode(error.filename) if error.filename is not None else directory
        raise StoreError(f"{name} cannot be written: {error.strerror}", hint="is the disk full?") from error
    if work.left_out and warn is not None:
        warn("not root: left out " + ", ".join(sorted(work.left_out)))
    return work.made


def _check_target(directory: Path) -> None:
    try:
        directory.mkdir(mode=0o700, exist_ok=True)
        with os.scandir(directory) as entries:
            if next(entries, None) is not None:
                raise UsageError(f"{directory} is not empty", hint="give a new directory")
    except OSError as error:
        raise UsageError(f"{directory} cannot be used: {error.strerror}", hint="give a new directory") from error


def _places(tree: Tree, go: dict[int, Data]) -> dict[int, Data]:
    """Where our own tree's files are: what Go's nodes say must be the same."""
    known = {(data.position, data.size) for data in go.values()}
    places = {}
    for path, node in tree.walk():
        if node.is_file and node.extents:
            first = node.extents[0]
            data = Data(BASE + first.offset - first.logical, node.size)
            if (data.position, data.size) not in known:
                raise IndexFormatError(f"the archive contradicts itself about {show_path(path)}")
            places[id(node)] = data
    return places


class _Work:
    """Everything is made below one open directory, by names that were checked, in directories made here."""

    def __init__(self, archive: int, directory: Path, data: dict[int, Data], progress: Progress | None) -> None:
        self.left_out: set[str] = set()
        self.made = 0
        self._archive = archive
        self._root = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        self._base = f"/proc/self/fd/{self._root}/".encode()
        self._data = data
        self._progress = progress
        self._total = sum(item.size for item in data.values())
        self._done = 0
        self._is_root = os.geteuid() == 0

    def run(self, tree: Tree) -> None:
        try:
            names: dict[int, bytes] = {}
            directories = []
            for path, node in tree.walk():
                name = path[1:] or b"."
                if id(node) in names:
                    os.link(names[id(node)], name, src_dir_fd=self._root, dst_dir_fd=self._root, follow_symlinks=False)
                elif self._make(path, name, node):
                    names[id(node)] = name
                    if node.children is not None:
                        directories.append((name, node))
                else:
                    continue
                self.made += 1
            for name, node in reversed(directories):
                self._dress(name, node)
        finally:
            os.close(self._root)

    def _make(self, path: bytes, name: bytes, node: Node) -> bool:
        """False: it was left out."""
        if node.children is not None:
            if name != b".":
                os.mkdir(name, 0o700, dir_fd=self._root)
            return True
        if node.is_file:
            self._file(path, name, node)
        elif node.is_symlink:
            os.symlink(node.target, name, dir_fd=self._root)
        elif stat.S_ISFIFO(node.mode) or self._is_root:
            os.mknod(name, stat.S_IFMT(node.mode) | 0o600, os.makedev(*node.rdev), dir_fd=self._root)
        else:
            self.left_out.add("devices and sockets")
            return False
        self._dress(name, node)
        return True

    def _file(self, path: bytes, name: bytes, node: Node) -> None:
        handle = os.open(name, _NEW, 0o600, dir_fd=self._root)
        try:
            os.ftruncate(handle, node.size)
            data = self._data.get(id(node))
            if data is not None:
                self._copy(path, handle, node, data)
        finally:
            os.close(handle)

    def _copy(self, path: bytes, handle: int, node: Node, data: Data) -> None:
        """The block's bytes, holes left out, and then its CRC."""
        check = at = 0
        holes = [(extent.logical, extent.logical + extent.length) for extent in node.extents] or [(0, data.size)]
        while at < data.size:
            piece = os.pread(self._archive, min(_PIECE, data.size - at), data.position + at)
            if not piece:
                raise IntegrityError(f"the archive ends inside {show_path(path)}", hint="fetch or make it again")
            check = crc64.go_iso(piece, check)
            for start, end in holes:
                low, high = max(start, at), min(end, at + len(piece))
                if low < high:
                    _write(handle, memoryview(piece)[low - at : high - at], low)
            at += len(piece)
            self._done += len(piece)
            if self._progress is not None:
                self._progress(self._done, self._total)
        if os.pread(self._archive, 8, data.position + data.size) != check.to_bytes(8, "big"):
            raise IntegrityError(
                f"{show_path(path)} is damaged in the archive: its CRC-64 is wrong", hint="fetch or make it again"
            )

    def _dress(self, name: bytes, node: Node) -> None:
        """Owner, mode, xattrs and time, in the order in which one does not undo the other."""
        if self._is_root:
            os.chown(name, node.uid, node.gid, dir_fd=self._root, follow_symlinks=False)
        elif (node.uid, node.gid) != (os.getuid(), os.getgid()):
            self.left_out.add("owners")
        if not node.is_symlink:
            os.chmod(name, stat.S_IMODE(node.mode), dir_fd=self._root)
        for key, value in node.xattrs:
            try:
                os.setxattr(self._base + name, key, value, follow_symlinks=False)
            except OSError as error:
                if self._is_root or error.errno not in (errno.EPERM, errno.EACCES, errno.EOPNOTSUPP):
                    raise
                self.left_out.add("privileged attributes")
        os.utime(name, ns=(node.mtime, node.mtime), dir_fd=self._root, follow_symlinks=False)


def _write(handle: int, view: memoryview, offset: int) -> None:
    at = 0
    while at < len(view):
        at += os.pwrite(handle, view[at:], offset + at)
