"""The mount system calls, by ctypes: thin functions that raise OSError with errno, object and the kernel's words.

Standard library only and few imports (os, ctypes): the wrapper pays for every one of them at each container start.
Numbers >= 424 are the same on every Linux architecture (arch/*/tools/syscall*.tbl); mount and umount2 go through libc.
The new mount API is described in Linux `Documentation/filesystems/mount_api.rst`, fsopen(2), fsconfig(2), fsmount(2),
move_mount(2), open_tree(2), mount_setattr(2); constants are from `include/uapi/linux/mount.h` and `openat2.h`.
"""

from __future__ import annotations

import ctypes
import errno
import os

TYPE_CHECKING = False  # not typing's: importing typing costs milliseconds
if TYPE_CHECKING:
    from collections.abc import Iterable

    Path = str | bytes | os.PathLike[str] | os.PathLike[bytes]
    Value = str | bytes | int | None

# mount(2)
MS_RDONLY = 1
MS_NOSUID = 2
MS_NODEV = 4
MS_NOEXEC = 8
MS_REMOUNT = 32
MS_BIND = 4096
MS_MOVE = 8192
MS_REC = 16384
MS_UNBINDABLE = 1 << 17
MS_PRIVATE = 1 << 18
MS_SLAVE = 1 << 19
MS_SHARED = 1 << 20
# umount2(2)
MNT_FORCE = 1
MNT_DETACH = 2
MNT_EXPIRE = 4
UMOUNT_NOFOLLOW = 8
# fsopen(2), fspick(2), fsmount(2)
FSOPEN_CLOEXEC = 1
FSPICK_CLOEXEC = 1
FSPICK_SYMLINK_NOFOLLOW = 2
FSPICK_NO_AUTOMOUNT = 4
FSPICK_EMPTY_PATH = 8
FSMOUNT_CLOEXEC = 1
# fsconfig(2): enum fsconfig_command
FSCONFIG_SET_FLAG = 0
FSCONFIG_SET_STRING = 1
FSCONFIG_SET_BINARY = 2
FSCONFIG_SET_PATH = 3
FSCONFIG_SET_PATH_EMPTY = 4
FSCONFIG_SET_FD = 5
FSCONFIG_CMD_CREATE = 6
FSCONFIG_CMD_RECONFIGURE = 7
STRING_MAX = 255  # fs/fsopen.c: strndup_user(value, 256), longer is EINVAL
# mount attributes, for fsmount(2) and mount_setattr(2)
MOUNT_ATTR_RDONLY = 0x1
MOUNT_ATTR_NOSUID = 0x2
MOUNT_ATTR_NODEV = 0x4
MOUNT_ATTR_NOEXEC = 0x8
MOUNT_ATTR_NOATIME = 0x10
MOUNT_ATTR_STRICTATIME = 0x20
MOUNT_ATTR_NODIRATIME = 0x80
MOUNT_ATTR_IDMAP = 0x100000
MOUNT_ATTR_NOSYMFOLLOW = 0x200000
# move_mount(2)
MOVE_MOUNT_F_SYMLINKS = 0x1
MOVE_MOUNT_F_EMPTY_PATH = 0x4
MOVE_MOUNT_T_SYMLINKS = 0x10
MOVE_MOUNT_T_EMPTY_PATH = 0x40
MOVE_MOUNT_BENEATH = 0x200
# open_tree(2)
OPEN_TREE_CLONE = 1
OPEN_TREE_CLOEXEC = os.O_CLOEXEC
# fcntl.h
AT_FDCWD = -100
AT_SYMLINK_NOFOLLOW = 0x100
AT_NO_AUTOMOUNT = 0x800
AT_EMPTY_PATH = 0x1000
AT_RECURSIVE = 0x8000
# openat2(2)
RESOLVE_NO_XDEV = 0x1
RESOLVE_NO_MAGICLINKS = 0x2
RESOLVE_NO_SYMLINKS = 0x4
RESOLVE_BENEATH = 0x8
RESOLVE_IN_ROOT = 0x10

_NR_OPEN_TREE = 428
_NR_MOVE_MOUNT = 429
_NR_FSOPEN = 430
_NR_FSCONFIG = 431
_NR_FSMOUNT = 432
_NR_FSPICK = 433
_NR_OPENAT2 = 437
_NR_MOUNT_SETATTR = 442
_OPTION_PAGE = 4095  # fs/namespace.c: copy_mount_options() takes one page and cuts the rest off without a word
_LOG_LINES = 32  # fs/fs_context.c keeps at most 8 messages; a bound all the same

_libc = ctypes.CDLL(None, use_errno=True)  # a call releases the interpreter lock
_libc.syscall.restype = ctypes.c_long


class _OpenHow(ctypes.Structure):
    _fields_ = (("flags", ctypes.c_uint64), ("mode", ctypes.c_uint64), ("resolve", ctypes.c_uint64))


class _MountAttr(ctypes.Structure):
    _fields_ = (
        ("attr_set", ctypes.c_uint64),
        ("attr_clr", ctypes.c_uint64),
        ("propagation", ctypes.c_uint64),
        ("userns_fd", ctypes.c_uint64),
    )


def _bytes(value: Path) -> bytes:
    data = os.fsencode(value)
    if b"\0" in data:  # ctypes would cut it there: another file than the one meant
        raise OSError(errno.EINVAL, "the name holds a NUL byte", data)
    return data


def _error(what: str, name: object, code: int = 0, log: bytes = b"") -> OSError:
    code = code or ctypes.get_errno()
    text = f"{what}: {os.strerror(code)}"
    if log:
        text += f" (kernel: {os.fsdecode(log)})"
    return OSError(code, text, os.fsdecode(name) if isinstance(name, bytes) else name)


def _syscall(number: int, *args: ctypes.c_long | ctypes.c_char_p | object) -> int:
    """libc's syscall(2). Integers must come as c_long: a bare Python int would be passed as a 32-bit one."""
    return int(_libc.syscall(ctypes.c_long(number), *args))


def mount(source: Path | None, target: Path, fstype: str | None, flags: int = 0, data: Path | None = None) -> None:
    """mount(2). Option data of more than 4095 bytes is refused (E2BIG): the kernel would cut it silently."""
    where = _bytes(target)
    options = None if data is None else _bytes(data)
    if options is not None and len(options) > _OPTION_PAGE:
        raise _error("mount: option data over 4095 bytes", where, errno.E2BIG)
    result = _libc.mount(
        None if source is None else _bytes(source),
        where,
        None if fstype is None else fstype.encode(),
        ctypes.c_ulong(flags),
        options,
    )
    if result:
        raise _error(f"mount {fstype or ''}".rstrip(), where)


def umount2(target: Path, flags: int = UMOUNT_NOFOLLOW) -> None:
    """umount2(2). EBUSY: in use; EINVAL: no mount point. By default a symlink is not followed."""
    where = _bytes(target)
    if _libc.umount2(where, ctypes.c_int(flags)):
        raise _error("umount", where)


def fsopen(fstype: str, flags: int = FSOPEN_CLOEXEC) -> int:
    """fsopen(2): a new filesystem context. ENODEV: the kernel does not know the type. The caller closes the fd."""
    fd = _syscall(_NR_FSOPEN, fstype.encode(), ctypes.c_long(flags))
    if fd < 0:
        raise _error("fsopen", fstype)
    return fd


def fspick(path: Path, flags: int = FSPICK_CLOEXEC | FSPICK_SYMLINK_NOFOLLOW, dirfd: int = AT_FDCWD) -> int:
    """fspick(2): the context of a mounted filesystem, for reconfiguration. The caller closes the fd."""
    where = _bytes(path)
    fd = _syscall(_NR_FSPICK, ctypes.c_long(dirfd), where, ctypes.c_long(flags))
    if fd < 0:
        raise _error("fspick", where)
    return fd


def context_log(fd: int) -> bytes:
    """What the kernel said about a filesystem context so far, messages joined by "; " (fs/fsopen.c: fscontext_read).

    Each message begins with "e ", "w " or "i "; reading takes it away. Most filesystems say little.
    """
    lines: list[bytes] = []
    while len(lines) < _LOG_LINES:
        try:
            lines.append(os.read(fd, 8192).strip())
        except OSError:  # ENODATA: no more
            break
    return b"; ".join(line for line in lines if line)


def _fsconfig(fd: int, command: int, key: str | None, value: bytes | None, aux: int) -> None:
    name = None if key is None else key.encode()
    if _syscall(_NR_FSCONFIG, ctypes.c_long(fd), ctypes.c_long(command), name, value, ctypes.c_long(aux)):
        code = ctypes.get_errno()
        raise _error("fsconfig " + (key or "create"), value if value is not None else key, code, context_log(fd))


def fsconfig_set_flag(fd: int, key: str) -> None:
    """fsconfig(2) FSCONFIG_SET_FLAG: an option without a value, such as "ro"."""
    _fsconfig(fd, FSCONFIG_SET_FLAG, key, None, 0)


def fsconfig_set_string(fd: int, key: str, value: Path) -> None:
    """fsconfig(2) FSCONFIG_SET_STRING. Over 255 bytes is ENAMETOOLONG here (the kernel's bare EINVAL says less)."""
    text = _bytes(value)
    if len(text) > STRING_MAX:
        raise _error(f"fsconfig {key}: over {STRING_MAX} bytes", text, errno.ENAMETOOLONG)
    _fsconfig(fd, FSCONFIG_SET_STRING, key, text, 0)


def fsconfig_set_path(fd: int, key: str, path: Path, dirfd: int = AT_FDCWD) -> None:
    """fsconfig(2) FSCONFIG_SET_PATH, for the few filesystems whose parameter takes a path object."""
    _fsconfig(fd, FSCONFIG_SET_PATH, key, _bytes(path), dirfd)


def fsconfig_set_fd(fd: int, key: str, value: int) -> None:
    """fsconfig(2) FSCONFIG_SET_FD: an open descriptor as value. overlay "lowerdir+" takes one from Linux 6.13 on."""
    _fsconfig(fd, FSCONFIG_SET_FD, key, None, value)


def fsconfig_create(fd: int) -> None:
    """fsconfig(2) FSCONFIG_CMD_CREATE: make the superblock. May block while devices are opened and read."""
    _fsconfig(fd, FSCONFIG_CMD_CREATE, None, None, 0)


def fsconfig_reconfigure(fd: int) -> None:
    """fsconfig(2) FSCONFIG_CMD_RECONFIGURE, after fspick()."""
    _fsconfig(fd, FSCONFIG_CMD_RECONFIGURE, None, None, 0)


def fsmount(fd: int, attrs: int = 0, flags: int = FSMOUNT_CLOEXEC) -> int:
    """fsmount(2): a detached mount of a created context. Closing the fd before attach() unmounts it."""
    mount_fd = _syscall(_NR_FSMOUNT, ctypes.c_long(fd), ctypes.c_long(flags), ctypes.c_long(attrs))
    if mount_fd < 0:
        code = ctypes.get_errno()
        raise _error("fsmount", None, code, context_log(fd))
    return mount_fd


def move_mount(mount_fd: int, target: Path | int, flags: int = 0) -> None:
    """move_mount(2): put the mount of `mount_fd` (fsmount, open_tree) on a path or an open directory descriptor.

    A last symlink of a path is not followed. MOVE_MOUNT_BENEATH (Linux 6.5) puts it below the topmost mount there.
    """
    flags |= MOVE_MOUNT_F_EMPTY_PATH
    if isinstance(target, int):
        dirfd, where, flags = target, b"", flags | MOVE_MOUNT_T_EMPTY_PATH
    else:
        dirfd, where = AT_FDCWD, _bytes(target)
    if _syscall(_NR_MOVE_MOUNT, ctypes.c_long(mount_fd), b"", ctypes.c_long(dirfd), where, ctypes.c_long(flags)):
        raise _error("move_mount", where or f"fd {dirfd}")


def open_tree(path: Path, flags: int = OPEN_TREE_CLOEXEC, dirfd: int = AT_FDCWD) -> int:
    """open_tree(2). With OPEN_TREE_CLONE a detached bind mount (AT_RECURSIVE: and submounts). The caller closes."""
    where = _bytes(path)
    fd = _syscall(_NR_OPEN_TREE, ctypes.c_long(dirfd), where, ctypes.c_long(flags))
    if fd < 0:
        raise _error("open_tree", where or f"fd {dirfd}")
    return fd


def mount_setattr(
    dirfd: int,
    path: Path = b"",
    *,
    attr_set: int = 0,
    attr_clr: int = 0,
    propagation: int = 0,
    userns_fd: int = 0,
    flags: int = AT_EMPTY_PATH,
) -> None:
    """mount_setattr(2): change attributes (MOUNT_ATTR_*) or propagation (MS_PRIVATE …) of a mount, also detached."""
    attr = _MountAttr(attr_set, attr_clr, propagation, userns_fd)
    where = _bytes(path)
    if _syscall(
        _NR_MOUNT_SETATTR,
        ctypes.c_long(dirfd),
        where,
        ctypes.c_long(flags),
        ctypes.byref(attr),
        ctypes.c_long(ctypes.sizeof(attr)),
    ):
        raise _error("mount_setattr", where or f"fd {dirfd}")


def openat2(dirfd: int, path: Path, flags: int, *, mode: int = 0, resolve: int = RESOLVE_IN_ROOT) -> int:
    """openat2(2), close-on-exec. With RESOLVE_IN_ROOT `dirfd` is the root of every absolute path, link and "..".

    A race with a rename may give EAGAIN (fs/namei.c: handle_dots): it is retried here, at most 64 times.
    """
    where = _bytes(path)
    how = _OpenHow(flags | os.O_CLOEXEC, mode, resolve)
    for _ in range(64):
        fd = _syscall(_NR_OPENAT2, ctypes.c_long(dirfd), where, ctypes.byref(how), ctypes.c_long(ctypes.sizeof(how)))
        if fd >= 0:
            return fd
        if ctypes.get_errno() not in (errno.EAGAIN, errno.EINTR):
            break
    raise _error("open", where)


def new_mount(fstype: str, source: Path | None, options: Iterable[tuple[str, Value]], attrs: int = 0) -> int:
    """A detached mount (fsopen, fsconfig, fsmount); returns its descriptor, close-on-exec.

    options: (key, None) sets a flag, (key, text) a string of at most 255 bytes, (key, int) a descriptor; in this order,
    a key may come several times. attrs: MOUNT_ATTR_*. OSError names the option and holds the context's log.
    """
    context = fsopen(fstype)
    try:
        if source is not None:
            fsconfig_set_string(context, "source", source)
        for key, value in options:
            if value is None:
                fsconfig_set_flag(context, key)
            elif isinstance(value, int):
                fsconfig_set_fd(context, key, value)
            else:
                fsconfig_set_string(context, key, value)
        fsconfig_create(context)
        return fsmount(context, attrs)
    finally:
        os.close(context)


def attach(mount_fd: int, target: Path | int) -> None:
    """Put a detached mount on `target`: a path (its last symlink is not followed) or an open directory descriptor."""
    move_mount(mount_fd, target)
