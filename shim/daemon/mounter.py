"""Jobs that touch mounts: run in processes of their own, never in the server (see jobs.py)."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

from shim.daemon import prepare
from shim.errors import IntegrityError
from shim.mount import mountinfo, syscalls
from shim.mount.erofs import attach, detached_erofs


def probe_tier(work: str) -> tuple[str, str]:
    """The best way to mount a tree that works here, by trying: (tier, reason)."""
    from shim.mount import probe

    tier, reason = probe.probe_tier(Path(work))
    return tier, reason


def build_and_mount(*, directory: str, blobs: str, names: list[str], **mount: Any) -> None:
    """Write the EROFS image of a prepared tree unless it is there, then `mount_tree` it: one job for both."""
    prepare.build_image(directory, blobs, names)
    mount_tree(image=os.path.join(directory, "image.erofs"), blobs=blobs, names=names, **mount)


def mount_tree(image: str, blobs: str, names: list[str], target: str, tier: str, probes: list[dict[str, Any]]) -> None:
    """Mount an EROFS image over its blob files at `target`, after comparing first bytes with the layers'.

    EROFS believes any device it is given (wrong ones give silently wrong bytes), so number, order and size
    are checked before (shim/mount/erofs.py), and the probes after. The mount is attached last: it goes with this
    process if that is killed before.
    """
    devices = [os.path.join(blobs, name) for name in names]
    make_way(target)
    fd = _detached(tier, image, devices)
    try:
        for item in probes:
            _compare(item, fd, devices)
        attach(fd, target)
    finally:
        os.close(fd)


def make_way(target: str) -> None:
    """The directory `target` exists and nothing is mounted there: a job or a process that was killed may have left it.
    A dead FUSE mount answers even mkdir's look with an error, so the mounts go first."""
    while unmount_tree(target):
        pass
    os.makedirs(target, 0o700, exist_ok=True)


def _detached(tier: str, image: str, devices: list[str]) -> int:
    if tier == "erofs-loop":
        from shim.mount.loop import detached_erofs_loop

        return detached_erofs_loop(image, devices)
    return detached_erofs(image, devices)


def _compare(item: dict[str, Any], root: int, devices: list[str]) -> None:
    path = os.fsencode(item["path"]).lstrip(b"/")
    fd = syscalls.openat2(root, path, os.O_RDONLY | os.O_NOFOLLOW)
    try:
        shown = os.pread(fd, item["length"], 0)
    finally:
        os.close(fd)
    fd = os.open(devices[item["layer"]], os.O_RDONLY | os.O_CLOEXEC)
    try:
        held = os.pread(fd, item["length"], item["offset"])
    finally:
        os.close(fd)
    if shown != held:
        raise IntegrityError(
            f"the mounted tree shows other bytes for {item['path']} than layer {item['layer']} holds",
            hint="this should never be: keep `clip-shim status --json` and the files of the tree, and report it",
        )


def unmount_tree(target: str) -> bool:
    """Unmount a tree if it is mounted. Containers keep theirs: an overlay holds a clone of its own."""
    if mountinfo.at(os.path.realpath(target)) is None:
        return False
    _unmount(target)
    return True


def look_at_blobs(path: str) -> None:
    """Ask the server that answers for the blobs something that the kernel never answers from memory."""
    os.statvfs(path)


def unmount_blobs(path: str) -> None:
    """Unmount the blob files, never lazily: the last RELEASE of an open file would not come."""
    syscalls.umount2(path, 0)


def _unmount(target: str) -> None:
    try:
        syscalls.umount2(target, 0)
    except OSError as error:
        if error.errno != errno.EBUSY:
            raise
        syscalls.umount2(target, syscalls.MNT_DETACH)  # somebody's cwd: the superblock goes when they do


def sweep_containers(run_dir: str, state_dir: str) -> list[str]:
    """Take away what containers left that are gone (shim/runtime/cleanup.py). Returns the directories."""
    from shim.runtime import cleanup
    from shim.runtime.config import Config

    compiled = {
        "run_dir": run_dir,
        "state_dir": state_dir,
        "runtimes": [],
        "reference": {},
        "trust_paths": [],
        "mount_deadline": 1,
        "daemon_command": [],
        "launcher": "",
        "config_file": "",  # nothing is started from here
    }
    return cleanup.sweep(Config(compiled, {}))


def clear_stale(run_dir: str) -> list[str]:
    """Detach what a dead daemon left below RUN: its trees, then its blobs. Returns the paths.

    Nobody serves them any more, so nothing that could still be answered is lost. Overlays of running containers stay.
    """
    gone = []
    prefix = os.fsencode(os.path.realpath(run_dir)) + b"/"
    for entry in reversed(mountinfo.read()):
        below = entry.mount_point.startswith(prefix + b"trees/") or entry.mount_point == prefix + b"blobs"
        if below and entry.fs_type in (b"erofs", b"fuse", b"fuse.clip-shim", b"fuse.clip-shim-tree"):
            try:
                syscalls.umount2(os.fsdecode(entry.mount_point), syscalls.MNT_DETACH | syscalls.UMOUNT_NOFOLLOW)
            except OSError as error:
                if error.errno in (errno.EINVAL, errno.ENOENT):
                    continue  # somebody else was faster
                raise
            gone.append(os.fsdecode(entry.mount_point))
    return gone
