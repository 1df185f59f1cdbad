"""Make a v1 archive of a directory, with all that POSIX can see."""

from __future__ import annotations

import errno
import json
import os
import stat
from collections.abc import Callable
from contextlib import closing
from hashlib import sha256
from pathlib import Path

from shim.archive.blocks import MAX_HOLES, Block, BlockWriter
from shim.archive.create import Archived, Progress
from shim.archive.finish import Source, finish
from shim.errors import LayerError, StoreError, UsageError
from shim.index.merge import show_path
from shim.index.model import Extent, Node, Tree
from shim.registry import platform as platforms

_PIECE = 4 << 20
_OPEN = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
_KEPT = (b"user.", b"security.", b"trusted.")
_ACLS = (b"system.posix_acl_access", b"system.posix_acl_default")
_OVERLAY = (b"trusted.overlay", b"user.overlay.")
_NO_DATA = (errno.ENXIO, errno.EINVAL, errno.EOPNOTSUPP)


def archive_rootfs(
    directory: Path,
    path: Path,
    *,
    progress: Progress | None = None,
    warn: Callable[[str], None] | None = None,
) -> Archived:
    """Write the archive of the tree below `directory` to `path`, which exists and is empty.

    Symlinks are kept, never followed, `directory` itself apart. What is mounted below it is left out but for the mount
    points. The tree must not change meanwhile. Raises UsageError (no directory), StoreError, LayerError.
    """
    try:
        root = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        raise UsageError(
            f"{directory} cannot be read: {error.strerror}", hint="give the root of a file tree"
        ) from error
    try:
        with open(path, "r+b") as out, closing(BlockWriter(out.fileno())) as writer:
            walk = _Walk(writer, os.fstat(root).st_dev, progress)
            tree = Tree(walk.directory(root))
            if walk.dropped and warn is not None:
                warn(f"left out, since no container may see it: {walk.dropped} extended attributes")
            index, left_out = finish(out, writer, tree, walk.blocks, _source(directory))
    except OSError as error:
        where = f" ({os.fsdecode(error.filename)})" if error.filename is not None else ""
        raise StoreError(f"{directory} cannot be archived: {error.strerror}{where}") from error
    finally:
        os.close(root)
    return Archived(index, left_out)


def _source(directory: Path) -> Source:
    """Index has to name an image: a name that no registry can have, and a config that says nothing but the platform."""
    platform = str(platforms.host())
    name = "".join(c if c.isascii() and (c.isalnum() or c in "._-") else "-" for c in directory.resolve().name.lower())
    system, _, architecture = platform.partition("/")
    config = json.dumps({"architecture": architecture.partition("/")[0], "os": system}).encode()
    return Source(f"rootfs.invalid/{name or 'root'}:latest", "sha256:" + sha256(config).hexdigest(), platform, config)


class _Walk:
    """blocks: files' data, found by (0, number of the file)."""

    def __init__(self, writer: BlockWriter, device: int, progress: Progress | None) -> None:
        self.blocks: dict[tuple[int, int], Block] = {}
        self.dropped = 0
        self._writer = writer
        self._device = device
        self._progress = progress
        self._linked: dict[tuple[int, int], Node] = {}
        self._done = 0

    def directory(self, fd: int) -> Node:
        """The tree below an open directory. Depth is bounded by PATH_MAX, so an explicit stack is enough."""
        top = self._node(os.fstat(fd), self._xattrs(fd))
        stack = [(b".", top)]
        while stack:
            path, node = stack.pop()
            assert node.children is not None
            handle = os.open(path, _OPEN | os.O_DIRECTORY, dir_fd=fd)
            try:
                if os.fstat(handle).st_dev != self._device:
                    continue
                for name in sorted(map(os.fsencode, os.listdir(handle))):
                    child = self._entry(handle, name)
                    node.children[name] = child
                    if child.children is not None:
                        stack.append((path + b"/" + name, child))
            finally:
                os.close(handle)
        return top

    def _entry(self, parent: int, name: bytes) -> Node:
        info = os.stat(name, dir_fd=parent, follow_symlinks=False)
        key = (info.st_dev, info.st_ino)
        if info.st_nlink > 1 and not stat.S_ISDIR(info.st_mode) and key in self._linked:
            return self._linked[key]
        kind = stat.S_IFMT(info.st_mode)
        if kind in (stat.S_IFREG, stat.S_IFDIR):
            handle = os.open(name, _OPEN, dir_fd=parent)
            try:
                node = self._node(info, self._xattrs(handle))
                if kind == stat.S_IFREG and info.st_size:
                    self._data(handle, node, name)
            finally:
                os.close(handle)
        else:
            node = self._node(info, self._xattrs(f"/proc/self/fd/{parent}/".encode() + name))
            if kind == stat.S_IFLNK:
                node.target = os.readlink(name, dir_fd=parent)
                node.size = len(node.target)
        if info.st_nlink > 1:
            self._linked[key] = node
        return node

    def _node(self, info: os.stat_result, xattrs: tuple[tuple[bytes, bytes], ...]) -> Node:
        device = stat.S_ISCHR(info.st_mode) or stat.S_ISBLK(info.st_mode)
        return Node(
            info.st_mode,
            info.st_uid,
            info.st_gid,
            info.st_mtime_ns,
            info.st_size if stat.S_ISREG(info.st_mode) else 0,
            (os.major(info.st_rdev), os.minor(info.st_rdev)) if device else (0, 0),
            xattrs=xattrs,
            children={} if stat.S_ISDIR(info.st_mode) else None,
        )

    def _xattrs(self, file: int | bytes) -> tuple[tuple[bytes, bytes], ...]:
        found = []
        follow = isinstance(file, int)
        try:
            names = os.listxattr(file, follow_symlinks=follow)
        except OSError as error:
            if error.errno in (errno.EOPNOTSUPP, errno.EPERM):
                return ()
            raise
        for text in names:
            name = os.fsencode(text)
            if name.startswith(_OVERLAY):
                self.dropped += 1
            elif name.startswith(_KEPT) or name in _ACLS:
                found.append((name, os.getxattr(file, text, follow_symlinks=follow)))
        return tuple(sorted(found))

    def _data(self, handle: int, node: Node, name: bytes) -> None:
        """Write the file's data; holes stay holes."""
        number = len(self.blocks) + 1
        pieces = list(_pieces(handle, node.size))
        if node.size - sum(end - start for start, end in pieces) > MAX_HOLES:
            raise LayerError(
                f"{show_path(name)} has more than {MAX_HOLES >> 30} GiB of holes, which an archive would hold as zeros"
            )
        if not pieces:  # `finish` writes the zeros of such files
            return
        self._writer.begin(node.size)
        at = 0
        for start, end in pieces:
            self._writer.zeros(start - at)
            at = start
            while at < end:
                data = os.pread(handle, min(_PIECE, end - at), at)
                if not data:
                    raise StoreError(f"{show_path(name)} became shorter while it was read")
                self._writer.write(data)
                at += len(data)
        self._writer.zeros(node.size - at)
        self.blocks[0, number] = self._writer.end()
        # one extent for each piece; `finish` finds the block by the first and moves them all
        node.extents = tuple(
            Extent(start, 0, number if i == 0 else start, end - start) for i, (start, end) in enumerate(pieces)
        )
        self._done += node.size
        if self._progress is not None:
            self._progress(self._done, self._done)


def _pieces(handle: int, size: int) -> list[tuple[int, int]]:
    """(start, end) of the data of a file, as lseek(2) SEEK_DATA tells them."""
    pieces = []
    at = 0
    while at < size:
        try:
            start = os.lseek(handle, at, os.SEEK_DATA)
        except OSError as error:
            if error.errno == errno.ENXIO:
                break
            if error.errno in _NO_DATA:
                return [(0, size)]
            raise
        end = min(size, os.lseek(handle, start, os.SEEK_HOLE))
        if start >= size:
            break
        pieces.append((start, end))
        at = end
    return pieces
