"""The portable tree's FUSE callbacks, on mfusepy (libfuse 3's high-level API).

mfusepy's own wrappers for stat, readdir and xattrs cost more than what they wrap, and it has no readdirplus: those are
overridden here at the level of libfuse's callbacks (libfuse include/fuse.h, struct fuse_operations). Paths are bytes.
"""

from __future__ import annotations

import ctypes
import errno
import os
from collections.abc import Callable
from typing import Any

from shim import log
from shim.index.model import Node
from shim.tree.reader import KillableReads
from shim.tree.view import TreeView

os.environ.setdefault("FUSE_LIBRARY_NAME", "fuse3")  # mfusepy takes the end-of-life libfuse 2 unless told
import mfusepy

TIMEOUT = 86_400.0  # seconds the kernel may keep names and attributes: the tree never changes
SUBTYPE = "clip-shim-tree"
_FILL_DIR_PLUS = 1 << 1  # enum fuse_fill_dir_flags
_MAX_THREADS = 64  # of libfuse; one waits for each read in progress
_MAX_BACKGROUND = 4096  # read-ahead requests in flight; at the default of 12 one stalled layer would stop all others
_BLOCK = 512  # of st_blocks, stat(2)


class TreeOperations:
    """What mfusepy looks for: it sets up the callbacks whose names it finds here. `_TreeFuse` answers them."""

    use_ns = True
    init = getattr = readlink = open = read = opendir = readdir = getxattr = listxattr = statfs = True

    def __init__(self, view: TreeView, reads: KillableReads, ready: Callable[[], None]) -> None:
        self.view = view
        self.reads = reads
        self.ready = ready


class _TreeFuse(mfusepy.FUSE):  # type: ignore[misc]
    """Callbacks get C pointers and give 0, a length, or a negative errno. mfusepy turns a raised OSError into one."""

    operations: TreeOperations

    def init_fuse_3(self, connection: Any, config: Any) -> None:
        connection.contents.max_background = _MAX_BACKGROUND
        connection.contents.congestion_threshold = _MAX_BACKGROUND * 3 // 4
        settings = config.contents
        settings.use_ino = 1  # st_ino is ours: equal for hard links
        settings.kernel_cache = 1
        settings.nullpath_ok = 1
        settings.entry_timeout = settings.negative_timeout = settings.attr_timeout = TIMEOUT
        self.operations.ready()

    def _node(self, path: bytes) -> Node:
        node = self.operations.view.find(path)
        if node is None:
            raise OSError(errno.ENOENT, "no such name")
        return node

    def _fill(self, st: Any, node: Node) -> None:
        """struct stat, all of which is zero before."""
        st.st_mode = node.mode
        st.st_ino = self.operations.view.ino(node)
        st.st_nlink = node.nlink
        st.st_uid = node.uid
        st.st_gid = node.gid
        st.st_size = node.size
        st.st_blocks = -(-node.size // _BLOCK)
        st.st_blksize = 4096
        if node.rdev != (0, 0):
            st.st_rdev = os.makedev(*node.rdev)
        seconds, nanoseconds = divmod(node.mtime, 1_000_000_000)
        for times in (st.st_mtimespec, st.st_ctimespec, st.st_atimespec):
            times.tv_sec = seconds
            times.tv_nsec = nanoseconds

    def getattr_fuse_3(self, path: bytes | None, buf: Any, info: Any) -> int:
        node = self._node(path) if path is not None else self.operations.view.node(info.contents.fh)
        ctypes.memset(buf, 0, ctypes.sizeof(mfusepy.c_stat))
        self._fill(buf.contents, node)
        return 0

    def readlink(self, path: bytes, buf: Any, size: int) -> int:
        node = self._node(path)
        if not node.is_symlink:
            return -errno.EINVAL
        target = node.target[: size - 1] + b"\0"
        ctypes.memmove(buf, target, len(target))
        return 0

    def open(self, path: bytes, info: Any) -> int:
        node = self._node(path)
        if info.contents.flags & os.O_ACCMODE != os.O_RDONLY:
            return -errno.EROFS
        info.contents.fh = self.operations.view.ino(node)
        return 0

    def read(self, path: bytes | None, buf: Any, size: int, offset: int, info: Any) -> int:  # noqa: ARG002
        ino = info.contents.fh
        node = self.operations.view.node(ino)
        tid = mfusepy._libfuse.fuse_get_context().contents.pid
        try:
            data = self.operations.reads.read(node, offset, size, tid)
        except OSError as error:
            if error.errno != errno.EINTR:
                name = os.fsdecode(self.operations.view.path_of(ino))
                log.error("read failed", file=name, offset=offset, size=size, error=error.strerror)
            raise
        ctypes.memmove(buf, data, len(data))
        return len(data)

    def opendir(self, path: bytes, info: Any) -> int:
        info.contents.fh = self.operations.view.ino(self._node(path))
        return 0

    def readdir_fuse_3(
        self,
        path: bytes | None,  # noqa: ARG002
        buf: Any,
        filler: Any,
        offset: int,  # noqa: ARG002  0: libfuse keeps the whole listing for this open directory
        info: Any,
        flags: int,  # noqa: ARG002  whether or not the kernel asks for attributes, libfuse takes them
    ) -> int:
        node = self.operations.view.node(info.contents.fh)
        filler(buf, b".", None, 0, 0)
        filler(buf, b"..", None, 0, 0)
        for name, child in sorted((node.children or {}).items()):
            st = mfusepy.c_stat()
            self._fill(st, child)
            if filler(buf, name, ctypes.byref(st), 0, _FILL_DIR_PLUS):
                return -errno.ENOMEM
        return 0

    def getxattr(self, path: bytes, name: bytes, value: Any, size: int, *_: Any) -> int:
        for key, data in self._node(path).xattrs:
            if key == name:
                return _copy(data, value, size)
        return -errno.ENODATA

    def listxattr(self, path: bytes, names: Any, size: int) -> int:
        return _copy(b"".join(key + b"\0" for key, _ in self._node(path).xattrs), names, size)

    def statfs(self, path: bytes, buf: Any) -> int:  # noqa: ARG002
        view = self.operations.view
        found = buf.contents
        found.f_bsize = found.f_frsize = 4096
        found.f_blocks = -(-view.total_size // 4096)
        found.f_files = view.count
        found.f_namemax = 255
        return 0


def _copy(data: bytes, buf: Any, size: int) -> int:
    """The answer to getxattr and listxattr: the length alone when no room is offered."""
    if not size or not buf:
        return len(data)
    if len(data) > size:
        return -errno.ERANGE
    ctypes.memmove(buf, data, len(data))
    return len(data)


def serve(view: TreeView, reads: KillableReads, target: str, ready: Callable[[], None]) -> None:
    """Mount at `target` and serve until it is unmounted. `ready` is called once the tree can be read.

    Raises RuntimeError if libfuse cannot mount (it has said why on standard error).
    """
    options: dict[str, Any] = {"fsname": "clip-shim", "subtype": SUBTYPE, "ro": True, "default_permissions": True}
    options["noexec"] = True
    if (mfusepy.fuse_version_major, mfusepy.fuse_version_minor) >= (3, 12):
        # Its default of 10 would let ten slow reads stop all others.
        options |= {"max_threads": _MAX_THREADS, "max_idle_threads": 10}
    _TreeFuse(TreeOperations(view, reads, ready), target, foreground=True, **options)


__all__ = ["SUBTYPE", "TIMEOUT", "serve"]
