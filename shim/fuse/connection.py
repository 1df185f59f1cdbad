"""The connection to the kernel: a /dev/fuse descriptor and the mount that belongs to it.

mount(2) of type fuse returns at once (INIT is sent asynchronously), so the serving process may make it itself, before
it serves. It never touches a path below the mount: it would wait for itself. Unmounting is done by another process,
never lazily (with MNT_DETACH the last RELEASE does not come).
"""

from __future__ import annotations

import os
from pathlib import Path

from shim.errors import MountError
from shim.fuse import proto
from shim.mount import syscalls

FLAGS = syscalls.MS_RDONLY | syscalls.MS_NOSUID | syscalls.MS_NODEV | syscalls.MS_NOEXEC
SOURCE = "clip-shim"
FSTYPE = "fuse.clip-shim"


def mount(directory: str | Path) -> int:
    """Mount an unserved blob file system on `directory` (it must exist); returns the descriptor to serve.

    The descriptor is close-on-exec and non-blocking. No allow_other: only root's processes reach the path; reads
    through EROFS and overlay use the mounter's credentials. Raises MountError (no /dev/fuse, no privilege, no such
    directory).
    """
    try:
        fd = os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        raise MountError(
            f"cannot open /dev/fuse: {error.strerror}", hint="load it with `modprobe fuse`, and run as root"
        ) from error
    options = f"fd={fd},rootmode=40000,user_id=0,group_id=0,max_read={proto.MAX_READ}"
    try:
        syscalls.mount(SOURCE, str(directory), FSTYPE, FLAGS, options)
    except OSError as error:
        os.close(fd)
        raise MountError(f"cannot mount the blob files on {directory}: {error.strerror}") from error
    return fd
