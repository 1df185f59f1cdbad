"""Mount a tree's EROFS image over its layer files, by Linux's file-backed mounts (>= 6.12).

EROFS checks nothing of its devices: with none, too few, swapped or short ones it mounts and shows silently wrong bytes.
So number, order and size are compared with the image's device table here, before the mount.

Opening a layer file may wait for whoever serves it: never call this in the serving process, or without a deadline.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterable, Sequence
from contextlib import ExitStack

from shim.erofs.format import BLOCK, Superblock, read_superblock
from shim.errors import IndexFormatError, MountError
from shim.mount import syscalls

# The mount itself must be harmless to whoever walks into it; an overlay above looks at none of these flags, so setuid
# programs and device nodes of the image work inside containers.
ATTRS = (
    syscalls.MOUNT_ATTR_RDONLY
    | syscalls.MOUNT_ATTR_NOSUID
    | syscalls.MOUNT_ATTR_NODEV
    | syscalls.MOUNT_ATTR_NOEXEC
    | syscalls.MOUNT_ATTR_NOATIME
)
_BDI = "/sys/class/bdi"

PathLike = str | os.PathLike[str]


def mount_erofs(
    image: PathLike, devices: Sequence[PathLike], target: PathLike, *, read_ahead_kib: int | None = None
) -> None:
    """Mount `image` at the directory `target`, device n being layer n's uncompressed tar. MountError if it fails.

    Read-only, nosuid, nodev, noexec. Paths may be of any length. `image` must not lie on tmpfs or overlayfs.
    read_ahead_kib: see set_read_ahead; None leaves the kernel's 128.
    """
    before = _bdis()
    fd = detached_erofs(image, devices)
    if read_ahead_kib is not None:
        set_read_ahead(_bdis() - before, read_ahead_kib)
    try:
        attach(fd, target)
    finally:
        os.close(fd)


def detached_erofs(image: PathLike, devices: Sequence[PathLike]) -> int:
    """The same mount, nowhere attached; returns its descriptor. Closing that unmounts it, unless attached."""
    with ExitStack() as stack:
        checked = open_checked(image, devices, os.O_PATH, stack)
        names = [f"/proc/self/fd/{fd}" for fd in checked]
        if len(os.fsencode(image)) <= syscalls.STRING_MAX:
            names[0] = os.fspath(image)  # mountinfo shows the source: let it say something
        return new_erofs(names[0], names[1:], image)


def set_read_ahead(bdis: Iterable[str], kib: int) -> bool:
    """How far the kernel reads ahead (and around a page fault) in all files of a mount; False if it cannot be set.

    bdis: names in /sys/class/bdi. A file-backed EROFS has one named "erofs-N" that nothing but its appearance ties to
    the mount (fs/super.c: super_setup_bdi), so it is found by looking before and after; two trees mounted at once get
    the same value anyway. Only speed depends on it.
    """
    done = False
    for name in bdis:
        try:
            with open(f"{_BDI}/{name}/read_ahead_kb", "w") as file:
                file.write(str(kib))
            done = True
        except OSError:
            continue  # unmounted meanwhile, or sysfs is read-only here
    return done


def _bdis() -> set[str]:
    try:
        return {name for name in os.listdir(_BDI) if name.startswith("erofs-")}
    except OSError:
        return set()


def open_checked(image: PathLike, devices: Sequence[PathLike], flags: int, stack: ExitStack) -> list[int]:
    """Descriptors of image and devices, closed by `stack`, once they are what the image's device table says.

    What is opened here is what is mounted, so a layer's name may change its meaning meanwhile.
    """
    files = [_open(path, flags, stack) for path in (image, *devices)]
    info = _superblock(image, files[0])
    if len(devices) != len(info.devices):
        raise MountError(f"{image} wants {len(info.devices)} layer files, {len(devices)} were given")
    if os.fstat(files[0]).st_size < info.blocks * BLOCK:
        raise MountError(f"{image} is truncated", hint="remove it: it is made again from the index")
    for number, (device, fd, blocks) in enumerate(zip(devices, files[1:], info.devices, strict=True)):
        found = os.fstat(fd).st_size
        if found != blocks * BLOCK:
            raise MountError(
                f"layer file {number} ({device}) has {found} bytes, the tree was made for {blocks * BLOCK}"
            )
    return files


def new_erofs(source: str, devices: Iterable[str], image: PathLike) -> int:
    """fsopen … fsmount of already checked names; OSError becomes a MountError that says what to do."""
    try:
        # "ro" for loop devices: without it the kernel wants to write to them
        return syscalls.new_mount("erofs", source, [("ro", None), *(("device", name) for name in devices)], ATTRS)
    except OSError as error:
        raise MountError(f"cannot mount the tree {image}: {error}", hint=_hint(error.errno)) from error


def attach(fd: int, target: PathLike) -> None:
    """Attach a detached mount at `target`. MountError if that is no directory."""
    try:
        syscalls.attach(fd, os.fspath(target))
    except OSError as error:
        raise MountError(f"cannot attach the tree at {target}: {error.strerror}") from error


def _open(path: PathLike, flags: int, stack: ExitStack) -> int:
    try:
        fd = os.open(path, flags | os.O_CLOEXEC | os.O_NOFOLLOW)
        stack.callback(os.close, fd)
        mode = os.fstat(fd).st_mode
    except OSError as error:
        raise MountError(f"cannot open {path}: {error.strerror}") from error
    if not stat.S_ISREG(mode):
        raise MountError(f"{path} is no regular file")
    return fd


def _superblock(image: PathLike, fd: int) -> Superblock:
    try:
        with open(f"/proc/self/fd/{fd}", "rb") as file:
            return read_superblock(file)
    except OSError as error:
        raise MountError(f"cannot read {image}: {error.strerror}") from error
    except IndexFormatError as error:
        raise MountError(f"{image}: {error}", hint=error.hint) from error


def _hint(code: int | None) -> str | None:
    return {
        errno.ENODEV: "the kernel has no EROFS: `modprobe erofs`, or set `tree: fuse`",
        errno.ENOTBLK: "file-backed EROFS needs Linux 6.12 or later, and an image that lies neither on tmpfs nor on "
        "overlayfs: set `state_dir` to a directory on disk, or `tree: erofs-loop`",
        errno.EPERM: "mounting needs root (CAP_SYS_ADMIN) in the initial user namespace",
        errno.EINVAL: "the kernel's reason is in `dmesg`; Linux 6.4 or later is needed for its 512-byte blocks",
    }.get(code or 0)
