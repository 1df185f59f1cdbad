"""The same EROFS mount through loop devices, for kernels without file-backed mounts (Linux 6.4 to 6.11).

Each file gets a read-only loop device with autoclear: the kernel frees it when the last user, that is the mount, goes.
See loop(4); structures from include/uapi/linux/loop.h.
"""

from __future__ import annotations

import errno
import fcntl
import os
import struct
from collections.abc import Sequence
from contextlib import ExitStack

from shim.erofs.format import BLOCK
from shim.errors import MountError
from shim.mount.erofs import PathLike, attach, new_erofs, open_checked

_LOOP_CONFIGURE = 0x4C0A  # Linux 5.8
_LOOP_CTL_GET_FREE = 0x4C82
_READ_ONLY = 1
_AUTOCLEAR = 4
# fd, block_size, info: five u64, number, encrypt type and key size, flags, file_name; the rest zero; reserved[8]
_CONFIG = struct.Struct("<II5Q4I64s64x32x16x64x")
_TRIES = 64  # others take the free device that we were told of
_HINT = "loop devices are needed: `modprobe loop`, and /dev/loop-control in this mount namespace"


def mount_erofs_loop(image: PathLike, devices: Sequence[PathLike], target: PathLike) -> None:
    """Mount `image` at `target` as shim.mount.erofs.mount_erofs does, with a loop device for each file."""
    fd = detached_erofs_loop(image, devices)
    try:
        attach(fd, target)
    finally:
        os.close(fd)


def detached_erofs_loop(image: PathLike, devices: Sequence[PathLike]) -> int:
    """The same mount, nowhere attached; returns its descriptor. MountError if it fails; no loop device is left then."""
    with ExitStack() as stack:
        files = open_checked(image, devices, os.O_RDONLY, stack)
        names = []
        for path, fd in zip((image, *devices), files, strict=True):
            if os.fstat(fd).st_size == 0:
                raise MountError(f"{path} is empty: a loop device cannot show it")
            loop, name = attach_loop(fd, os.fsencode(path))
            stack.callback(os.close, loop)  # closed too early, autoclear would free it
            names.append(name)
        return new_erofs(names[0], names[1:], image)


def attach_loop(fd: int, label: bytes) -> tuple[int, str]:
    """A new read-only loop device over the open file `fd`: (its descriptor, its path). Freed when nobody has it open.

    label: what losetup(8) shows; its last 63 bytes are kept. MountError if there is none to be had.
    """
    config = _CONFIG.pack(fd, BLOCK, 0, 0, 0, 0, 0, 0, 0, 0, _READ_ONLY | _AUTOCLEAR, label[-63:])
    try:
        control = os.open("/dev/loop-control", os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        raise MountError(f"cannot open /dev/loop-control: {error.strerror}", hint=_HINT) from error
    try:
        for _ in range(_TRIES):
            name = f"/dev/loop{fcntl.ioctl(control, _LOOP_CTL_GET_FREE)}"
            loop = os.open(name, os.O_RDONLY | os.O_CLOEXEC)
            try:
                fcntl.ioctl(loop, _LOOP_CONFIGURE, config)
            except OSError as error:
                os.close(loop)
                if error.errno != errno.EBUSY:
                    raise
            else:
                return loop, name
    except OSError as error:
        raise MountError(f"cannot set up a loop device: {error.strerror}", hint=_HINT) from error
    finally:
        os.close(control)
    raise MountError("cannot set up a loop device: others take every free one", hint="try again")
