"""A container's root in small: FUSE blob, EROFS tree on it, overlay on that; then what containers do with theirs.

Runs inside `trial.attempt`: the blob's server is a process of its own, as the one that serves must not use its mount.
"""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

from shim.erofs.format import BLOCK
from shim.erofs.writer import write_image
from shim.errors import MountError
from shim.fuse import connection
from shim.fuse.blob import Done
from shim.fuse.journal import Journal
from shim.fuse.server import BlobServer
from shim.index.model import Extent, Node, Tree
from shim.mount import overlay, syscalls
from shim.mount.erofs import detached_erofs
from shim.mount.loop import detached_erofs_loop

_TEXT = b"lower\n" * 200
_XATTR = "user.clip.doctor"
_CAPABILITY = "security.capability"
# vfs_cap_data (linux/capability.h), revision 2: cap_net_raw permitted and effective
_CAPABILITY_VALUE = bytes.fromhex("01000002 00200000 00000000 00000000 00000000")
_START = BLOCK


class _MemoryBlob:
    """A layer's bytes that are never cached, so that each read takes the way of a miss."""

    name = b"doctor"
    epoch = 0

    def __init__(self, node_id: int, data: bytes, data_fd: int) -> None:
        self.node_id = node_id
        self.size = len(data)
        self.data_fd = data_fd
        self._data = data

    def stamp(self, offset: int, size: int) -> int:  # noqa: ARG002
        return -1

    def read_cached(self, offset: int, size: int) -> None:  # noqa: ARG002
        return None

    def read_missing(self, offset: int, size: int, done: Done) -> None:
        done(self._data[offset : offset + size])

    def trouble(self) -> str:
        return ""


def try_all(work: Path, tier: str) -> float:
    """Mount and use it. Seconds it took; MountError, OSError say what does not work."""
    started = time.monotonic()
    for name in ("blobs", "tree", "upper", "work", "merged", "staging"):
        (work / name).mkdir()
    program = Path(shutil.which("true", path="/usr/bin:/bin") or "/bin/true").read_bytes()
    at_text = _START + _blocks(len(program))
    data = (bytes(_START) + program).ljust(at_text, b"\0") + _TEXT
    data = data.ljust(_blocks(len(data)), b"\0")
    tree = Tree(
        Node(
            stat.S_IFDIR | 0o755,
            children={
                b"program": _file(0o755, _START, len(program)),
                b"text": _file(0o644, at_text, len(_TEXT), ((_XATTR.encode(), b"lower"),)),
                b"capable": _file(0o755, at_text, len(_TEXT), ((_CAPABILITY.encode(), _CAPABILITY_VALUE),)),
            },
        )
    )
    with open(work / "image.erofs", "wb") as out:
        write_image(tree, [len(data)], out)
    _serve(work, data)
    mount: Callable[..., int] = detached_erofs_loop if tier == "erofs-loop" else detached_erofs
    _attach(mount(work / "image.erofs", [work / "blobs" / "doctor"]), work / "tree")
    layers = overlay.Layers([os.fsencode(work / "tree")], os.fsencode(work / "upper"), os.fsencode(work / "work"))
    layers.options = [(name, b"off") for name in ("index", "metacopy", "redirect_dir")]
    _attach(overlay.build(layers, b"clip-doctor", os.fsencode(work / "staging")), work / "merged")
    _use(work / "merged", work / "tree", program)
    return time.monotonic() - started


def _blocks(size: int) -> int:
    return -(-size // BLOCK) * BLOCK


def _file(mode: int, offset: int, size: int, xattrs: tuple[tuple[bytes, bytes], ...] = ()) -> Node:
    return Node(stat.S_IFREG | mode, size=size, extents=(Extent(0, 0, offset, size),), xattrs=xattrs)


def _attach(fd: int, target: Path) -> None:
    try:
        syscalls.attach(fd, target)
    finally:
        os.close(fd)


def _serve(work: Path, data: bytes) -> None:
    """Mount the blob; a forked process serves it until it is killed with this one's session."""
    fd = connection.mount(work / "blobs")
    journal = Journal(work / "journal", fresh=True)
    if os.fork() == 0:
        try:
            server = BlobServer(fd, None, journal)
            server.add(_MemoryBlob(server.node_id(b"doctor"), data, os.open("/dev/null", os.O_RDONLY)))
            server.start()
            while os.getppid() != 1:
                time.sleep(0.2)
        finally:
            os._exit(0)
    os.close(fd)


def _use(merged: Path, tree: Path, program: bytes) -> None:
    if (merged / "program").read_bytes() != program:
        raise MountError("the tree shows wrong bytes")
    done = subprocess.run([merged / "program"], capture_output=True, check=False, stdin=subprocess.DEVNULL)
    if done.returncode:
        raise MountError(f"a program on the tree ended with {done.returncode}: {done.stderr[:200]!r}")
    _same("an xattr of the tree", os.getxattr(merged / "text", _XATTR), b"lower")
    _same("a file's capabilities", os.getxattr(merged / "capable", _CAPABILITY), _CAPABILITY_VALUE)
    with open(merged / "text", "ab") as file:
        file.write(b"upper\n")
    _same("a file that was copied up", (merged / "text").read_bytes(), _TEXT + b"upper\n")
    _same("the tree's own file", (tree / "text").read_bytes(), _TEXT)
    _same("an xattr that was copied up", os.getxattr(merged / "text", _XATTR), b"lower")
    os.setxattr(merged / "text", _XATTR, b"upper")
    _same("an xattr that was set", os.getxattr(merged / "text", _XATTR), b"upper")
    os.unlink(merged / "capable")
    if (merged / "capable").exists() or not (tree / "capable").exists():
        raise MountError("a file that was removed is still there, or is gone from the tree")


def _same(what: str, found: bytes, wanted: bytes) -> None:
    if found != wanted:
        raise MountError(f"{what} is wrong: {found[:40]!r} instead of {wanted[:40]!r}")
