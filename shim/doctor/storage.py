"""Disks: where state lies, whether there is room, whether something is on memory that should not be."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from pathlib import Path

from shim.daemon.mounter import clear_stale
from shim.doctor import trial
from shim.doctor.node import Node
from shim.doctor.result import Result, failed, ok, warning
from shim.errors import MountError, ShimError
from shim.install import docker, running
from shim.mount import mountinfo, overlay

_MEMORY = ("tmpfs", "ramfs")
_NETWORK = ("nfs", "nfs4", "cifs", "smb3", "9p", "ceph", "glusterfs", "fuse.sshfs")
_ENGINE_ROOTS = ("/var/lib/docker", "/var/lib/containerd", "/var/lib/containers/storage")
_SHOWN = 5
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


def uppers(node: Node) -> Iterator[Result]:
    """What a container writes: an engine's upper on tmpfs fills memory, and the daemon's own must be on a disk."""
    expected = "uppers lie on a disk"
    on_memory = []
    for entry in mountinfo.read():
        if entry.fs_type == b"overlay" and entry.source.startswith(overlay.OURS):
            options = dict(mountinfo.split_options(entry.super_options))
            upper = Path(os.fsdecode(mountinfo.unescape_path(options.get(b"upperdir") or b"")))
            if upper.is_dir() and fs_type(upper) in _MEMORY:
                on_memory.append(os.fsdecode(entry.mount_point))
    if on_memory:
        yield warning(
            f"{len(on_memory)} containers write to memory: {_few(on_memory)}",
            expected,
            "move the engine's data directory to a disk (Docker: `data-root`, containerd: `root`, podman: `graphroot`)",
        )
    roots = [Path(path) for path in _ENGINE_ROOTS]
    for process in (process for process in running.find("dockerd") if process.root == Path("/")):
        try:
            roots.append(Path(running.get_json(docker.socket_of(process), "info")["DockerRootDir"]))
        except (ShimError, KeyError, TypeError):
            continue
    there = [path for path in dict.fromkeys([*roots, node.settings.state_dir]) if path.is_dir()]
    bad = [path for path in there if fs_type(path) in _MEMORY]
    for path in bad:
        yield warning(f"{path} is on {fs_type(path)}: what containers write takes memory", expected, "use a disk")
    if not bad and not on_memory:
        yield ok(f"{_few([str(path) for path in there]) or 'no engine has a directory yet'}", expected)


def stale_mounts(node: Node) -> Iterator[Result]:
    """A daemon that died leaves its mounts to its successor. With no daemon they are in nobody's hands."""
    run = os.fsencode(os.path.realpath(node.settings.run_dir)) + b"/"
    entries = mountinfo.read()
    ours = [
        os.fsdecode(entry.mount_point)
        for entry in entries
        if entry.mount_point == run + b"blobs" or entry.mount_point.startswith(run + b"trees/")
    ]
    containers = [entry for entry in entries if entry.source.startswith(overlay.OURS) and _has_lower(entry, run)]
    expected = "what is mounted below RUN is served by a daemon"
    if node.daemon_pid:
        yield ok(f"{len(ours)} mounts, served by pid {node.daemon_pid}", expected)
    elif containers:
        yield failed(
            f"{len(containers)} containers run on lazily loaded trees, and no daemon serves them: "
            f"{_few([os.fsdecode(entry.mount_point) for entry in containers])}",
            expected,
            "start the daemon: `systemctl start clip-shim`, or any container with a reference does",
        )
    elif ours and not _is_dead(node, run):
        yield warning(
            f"no daemon answers, but somebody keeps its descriptor: {_few(ours)}",
            expected,
            "start the daemon, which takes over: `systemctl start clip-shim`, or any container with a reference does",
        )
    elif ours:
        yield warning(
            f"left by a daemon that is gone: {_few(ours)}",
            expected,
            "start a daemon, which clears them, or `clip-shim doctor --fix`",
            lambda: "unmounted " + _few(clear_stale(str(node.settings.run_dir))),
        )
    else:
        yield ok("nothing is left", expected)


def _is_dead(node: Node, run: bytes) -> bool:
    """Whether nobody holds the blobs' descriptor any more, so that no successor of the daemon can come.

    A look at a mount that somebody holds and nobody serves waits, so a child does it."""
    blobs = run + b"blobs"
    if mountinfo.at(blobs) is None:
        return True
    try:
        trial.attempt(lambda _: os.stat(blobs).st_dev, node.work_dir, 2)
    except MountError as error:
        return os.strerror(errno.ENOTCONN) in str(error)
    return False


def _has_lower(entry: mountinfo.MountEntry, run: bytes) -> bool:
    """Whether an overlay of ours stands on a tree of this RUN directory; one whose lowers cannot be told counts."""
    try:
        lowers = mountinfo.split_lowerdirs(entry.super_options)
    except ValueError:
        return True
    return any(lower.startswith(run) or not lower.startswith(b"/") or lower == b"/" for lower in lowers)


def _few(names: list[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more
