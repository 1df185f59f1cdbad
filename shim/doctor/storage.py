"""Disks: where state lies, whether there is room, whether something is on memory that should not be."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from shim.doctor.node import Node
from shim.doctor.result import Result, failed, ok, warning
from shim.mount import mountinfo

_MEMORY = ("tmpfs", "ramfs")
_NETWORK = ("nfs", "nfs4", "cifs", "smb3", "9p", "ceph", "glusterfs", "fuse.sshfs")
_LEAST = 1 << 30  # bytes
_LEAST_PERCENT = 15  # kubelet's own threshold for imagefs.available
_LEAST_INODES = 10_000


def fs_type(path: Path) -> str:
    """The type of the file system that holds `path`, which must exist. From mountinfo, as statfs numbers name less."""
    device = os.stat(path).st_dev
    number = b"%d:%d" % (os.major(device), os.minor(device))
    real = os.fsencode(os.path.realpath(path))
    best = None
    for entry in mountinfo.read():
        point = entry.mount_point.rstrip(b"/") + b"/"
        inside = (real.rstrip(b"/") + b"/").startswith(point)
        if inside and (best is None or len(point) >= len(best.mount_point.rstrip(b"/") + b"/")):
            best = entry
    if best is None or best.dev != number:
        same = [entry for entry in mountinfo.read() if entry.dev == number]
        best = same[-1] if same else best
    return os.fsdecode(best.fs_type) if best is not None else "unknown"


def state_dir(node: Node) -> Iterator[Result]:
    path = node.settings.state_dir
    expected = f"{path} is on a disk of this machine, mode 0700, root's"
    kind = fs_type(node.work_dir)
    if kind in _MEMORY:
        yield warning(
            f"{path} is on {kind}: the cache takes memory, is gone after a reboot, and EROFS cannot be mounted from it",
            expected,
            "set `state_dir` to a directory on a disk",
        )
    elif kind == "overlay":
        yield failed(
            f"{path} is on overlayfs: neither EROFS images nor overlay uppers can lie there",
            expected,
            "set `state_dir` to a directory on a disk; in a container, mount a volume there",
        )
    elif kind in _NETWORK or kind.startswith("fuse"):
        yield failed(
            f"{path} is on {kind}: overlay uppers and locks do not work there",
            expected,
            "set `state_dir` to a directory on a local disk",
        )
    elif not path.is_dir():
        yield ok(f"{path} is made with the first container, on {kind}", expected)
    else:
        info = path.stat()
        if info.st_uid != 0 or info.st_mode & 0o077:
            yield failed(
                f"{path} has mode {info.st_mode & 0o7777:04o} and uid {info.st_uid}",
                expected,
                f"chown root:root {path}; chmod 700 {path}",
                lambda: _make_private(path),
            )
        else:
            yield ok(f"{path} is on {kind}", expected)


def _make_private(path: Path) -> str:
    os.chown(path, 0, 0, follow_symlinks=False)
    os.chmod(path, 0o700)
    return f"{path} is root's with mode 0700"


def space(node: Node) -> Iterator[Result]:
    info = os.statvfs(node.work_dir)
    free, total = info.f_bavail * info.f_frsize, info.f_blocks * info.f_frsize
    percent = 100 * free / total if total else 100.0
    found = f"{free / (1 << 30):.1f} GiB free ({percent:.0f} %) below {node.settings.state_dir}"
    expected = f"at least {_LEAST >> 30} GiB and {_LEAST_PERCENT} % (below that, kubelet evicts pods)"
    fix = "free space, or set `state_dir` to a larger disk"
    if free < _LEAST // 4:
        yield failed(found, expected, fix)
    elif free < _LEAST or percent < _LEAST_PERCENT:
        yield warning(found, expected, fix)
    else:
        yield ok(found, expected)
    if info.f_files:
        inodes = f"{info.f_favail} inodes free"
        if info.f_favail < _LEAST_INODES:
            yield warning(inodes, f"at least {_LEAST_INODES} inodes", fix)
        else:
            yield ok(inodes, f"at least {_LEAST_INODES} inodes")
