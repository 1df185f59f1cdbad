"""Mount a tree on a directory, by way of the daemon: what `clip-shim mount` and the API do."""

from __future__ import annotations

import os
from contextlib import closing
from pathlib import Path
from typing import Any

from shim import settings
from shim.errors import MountError, UsageError
from shim.mount import mountinfo, syscalls
from shim.runtime import client


def ask_or_start(request: dict[str, Any], fd: int) -> tuple[client.Connection, dict[str, Any]]:
    """One request, with a descriptor beside it, to the daemon, which is started as the wrapper would if none runs: the
    open connection and the answer."""
    from shim.runtime import config
    from shim.runtime.launcher import settings_path
    from shim.runtime_path import ensure_launcher

    launcher = ensure_launcher(settings.load())
    loaded = config.load(str(settings_path(launcher)), dict(os.environb))
    if loaded.problem is not None:
        raise loaded.problem
    return client.ask(loaded, dict(os.environb), request, fd)


def mount(index: str, directory: Path) -> None:
    """Mount the tree of `index` (a path, file://, image://, oci://, s3://) read-only on `directory`, until `umount`.

    Starts the daemon if none runs. Raises UsageError, MountError, OSError (the file cannot be opened), and what the
    daemon says.
    """
    if not directory.is_dir():
        raise UsageError(f"{directory} is not a directory", hint="make it first with mkdir")
    fd, value = -1, index
    if "://" not in index or index.startswith("file://"):
        value = os.path.abspath(index.removeprefix("file://"))
        fd = os.open(value, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        connection, answer = ask_or_start({"v": 1, "op": "acquire", "source": "mount", "value": value}, fd)
        with closing(connection):
            _clone(answer["tree"], directory)
    finally:
        if fd >= 0:
            os.close(fd)


def _clone(tree: str, directory: Path) -> None:
    """A clone has a life of its own: the daemon may unmount its tree, ours stays until `umount`."""
    if mountinfo.at(tree) is None:
        raise MountError(
            f"the daemon mounted the tree at {tree}, which is not to be seen here",
            hint="daemon and command run in different mount namespaces: `nsenter -t 1 -m clip-shim mount …`",
        )
    try:
        clone = syscalls.open_tree(tree, syscalls.OPEN_TREE_CLONE | syscalls.OPEN_TREE_CLOEXEC)
        try:
            syscalls.attach(clone, str(directory.resolve()))
        finally:
            os.close(clone)
    except OSError as error:
        raise MountError(f"cannot mount on {directory}: {error.strerror}") from error


def umount(directory: Path) -> None:
    """Undo `mount`. Raises MountError: nothing of ours is mounted there, or it is in use."""
    path = os.path.realpath(directory)  # as `mount` did
    entry = mountinfo.at(path)
    if entry is None or not _is_tree(entry.fs_type, entry.source):
        raise MountError(f"no image is mounted on {directory}", hint="see /proc/self/mountinfo")
    try:
        syscalls.umount2(path, syscalls.UMOUNT_NOFOLLOW)
    except OSError as error:
        raise MountError(
            f"cannot unmount {directory}: {error.strerror}", hint="a program still uses it: see `fuser -vm`"
        ) from error


def _is_tree(fs_type: bytes, source: bytes) -> bool:
    """Whether a mount looks like one of ours: other EROFS and FUSE mounts are not for us to undo."""
    if fs_type == b"erofs":
        return source.endswith(b"/image.erofs") or source.startswith((b"/proc/self/fd/", b"/dev/loop"))
    return fs_type == b"fuse.clip-shim-tree"
