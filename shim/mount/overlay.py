"""Overlays: what the engine mounted, as values, and ours, built detached (Documentation/filesystems/overlayfs.rst).

Standard library only; the system calls are imported when something is built, since every create without a reference
comes through here to look for a marker.
"""

from __future__ import annotations

import errno
import os
import stat

from shim.errors import MountError
from shim.mount.mountinfo import split_lowerdirs, split_options, unescape_path

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

    from shim.mount.mountinfo import MountEntry

OURS = b"clip:"  # the source of our overlays: this, then the index digest
MAX_LOWERS = 500  # fs/overlayfs/ovl_entry.h: OVL_MAX_STACK
_STRING_MAX = 255  # fsconfig(2)
_PAGE_MAX = 4095  # mount(2): the kernel cuts the rest off without a word
# Off whatever the module's default: with them on, an upper must not get other lowers (overlayfs.rst, "Sharing and
# copying layers", "Changes to underlying filesystems")
_OFF = (b"index", b"nfs_export")
# Kept when the stock had them on: its upper may hold files that can be followed with them only
_FOLLOW = (b"metacopy", b"redirect_dir")
_LABELS = (b"context", b"fscontext", b"defcontext", b"rootcontext")
_ATTRIBUTES = {b"ro": 0x1, b"nosuid": 0x2, b"nodev": 0x4, b"noexec": 0x8, b"noatime": 0x10, b"nodiratime": 0x80}

Option = tuple[str, bytes | None]  # a flag has the value None


class Layers:
    """An overlay's parts. lowers: absolute, topmost first; upper, work: absolute, b"" for an overlay without an upper;
    options: the others that ours must have; attributes: MOUNT_ATTR_* of the mount."""

    __slots__ = ("attributes", "lowers", "options", "upper", "work")

    def __init__(
        self,
        lowers: Sequence[bytes],
        upper: bytes = b"",
        work: bytes = b"",
        options: Sequence[Option] = (),
        attributes: int = 0,
    ) -> None:
        self.lowers = list(lowers)
        self.upper = upper
        self.work = work
        self.options = list(options)
        self.attributes = attributes

    @property
    def all(self) -> list[bytes]:
        """Upper and lowers."""
        return [self.upper, *self.lowers] if self.upper else list(self.lowers)

    @property
    def writable(self) -> bool:
        """Whether something can be made in the merged root."""
        return bool(self.upper) and not self.attributes & _ATTRIBUTES[b"ro"]

    @property
    def volatile(self) -> bool:
        return ("volatile", None) in self.options


def read_stock(entry: MountEntry) -> Layers:
    """The parts of an overlay that is mounted, from its mountinfo entry.

    Raises MountError for one that cannot be made again: layers that are named by descriptors, are gone, hold data only.
    """
    where = os.fsdecode(entry.mount_point)
    options = split_options(entry.super_options)
    lowers = split_lowerdirs(entry.super_options)
    if b"::" in entry.super_options or any(key == b"datadir+" for key, _ in options):
        raise MountError(f"the overlay at {where} has data-only layers (composefs), which is not supported")
    given = {key: value for key, value in options if value is not None}
    if given.get(b"verity", b"off") != b"off":
        raise MountError(f"the overlay at {where} uses fs-verity, which is not supported")
    upper = unescape_path(given.get(b"upperdir", b""))
    work = unescape_path(given.get(b"workdir", b""))
    if not lowers:
        raise MountError(f"the overlay at {where} shows no lower directories")
    names = [*lowers, upper, work] if upper else lowers
    base = _find_base(names, entry.mount_point, upper)
    absolute = [os.path.normpath(os.path.join(base, name)) for name in names]
    count = len(lowers)
    return Layers(
        absolute[:count],
        absolute[count] if upper else b"",
        absolute[count + 1] if upper else b"",
        stock_options(options),
        mount_attributes(entry),
    )


def stock_options(options: Sequence[tuple[bytes, bytes | None]]) -> list[Option]:
    """The options of our overlay, from those that mountinfo shows for the engine's. Pure.

    What nobody passed but the kernel shows (uuid, seclabel) is left out.
    """
    shown = dict(options)
    result: list[Option] = []
    if b"userxattr" in shown:  # turns all the others off itself, and "redirect_dir=off" can mean "follow", a conflict
        result += [("index", b"off"), ("userxattr", None)]
    else:
        result += [(name.decode(), b"off") for name in _OFF]
        for name in _FOLLOW:
            value = shown.get(name)
            result.append((name.decode(), value if value in (b"on", b"follow", b"nofollow") else b"off"))
    if b"volatile" in shown or shown.get(b"fsync") == b"volatile":
        result.append(("volatile", None))
    if shown.get(b"xino") is not None:
        result.append(("xino", shown[b"xino"]))
    for name in _LABELS:
        if shown.get(name) is not None:
            result.append((name.decode(), shown[name]))
    return result


def mount_attributes(entry: MountEntry) -> int:
    """MOUNT_ATTR_* of a mount, from the per-mount options that mountinfo shows."""
    attributes = 0
    for word in entry.options.split(b","):
        attributes |= _ATTRIBUTES.get(word, 0)
    return attributes


def _find_base(names: Sequence[bytes], mount_point: bytes, upper: bytes) -> bytes:
    """The directory that relative names start from: the mounter's working directory, which the kernel does not keep.

    containerd: the parent of the snapshots (dirname(dirname(upper))); docker and podman: the storage home, above the
    rootfs (containers/storage also makes upper and work relative then).
    """
    relative = [name for name in names if not name.startswith(b"/")]
    if not relative:
        return b"/"
    where = os.fsdecode(mount_point)
    if any(name.isdigit() for name in relative):
        raise MountError(
            f"the overlay at {where} was mounted over open descriptors, its layers' names are not known",
            hint="this image has too many layers for the engine's way to mount; squash it",
        )
    candidates = []
    if upper.startswith(b"/"):
        candidates.append(os.path.dirname(os.path.dirname(upper)))
    path = mount_point
    while path != b"/":
        path = os.path.dirname(path)
        candidates.append(path)
    for base in candidates:
        if all(os.path.isdir(os.path.join(base, name)) for name in relative):
            return base
    raise MountError(f"the overlay at {where} has relative layers ({os.fsdecode(relative[0])} …) that are not found")


def check(layers: Layers) -> None:
    """Raise MountError if a layer is no directory here, or there are too many."""
    for path in [*layers.all, *([layers.work] if layers.upper else [])]:
        try:
            found = stat.S_ISDIR(os.stat(path).st_mode)
        except OSError:
            found = False
        if not found:
            raise MountError(
                f"the engine's layer {os.fsdecode(path)} is no directory of this node",
                hint="idmapped mounts (userns-remap, --uidmap, hostUsers: false) are not supported",
            )
    if len(layers.lowers) > MAX_LOWERS:
        raise MountError(f"an overlay takes at most {MAX_LOWERS} lower directories, not {len(layers.lowers)}")


class _Names:
    """Names that fit: a path of more than 255 bytes is given to the kernel as /proc/self/fd/N. Close after mounting."""

    def __init__(self) -> None:
        self.fds: list[int] = []

    def open(self, path: bytes) -> int:
        self.fds.append(os.open(path, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC))
        return self.fds[-1]

    def short(self, path: bytes) -> bytes:
        return path if len(path) <= _STRING_MAX else b"/proc/self/fd/%d" % self.open(path)

    def close(self) -> None:
        for fd in self.fds:
            os.close(fd)


def build(layers: Layers, source: bytes, staging: bytes) -> int:
    """Make an overlay that is attached nowhere; returns its descriptor (closing it unmounts). Raises MountError.

    staging: an empty directory of ours, used only where the kernel has no "lowerdir+" (before 6.8).
    """
    check(layers)
    clear_volatile(layers)
    try:
        return _build_by_context(layers, source)
    except OSError as error:
        unknown_key = error.errno == errno.EINVAL and (error.strerror or "").startswith("fsconfig lowerdir+")
        if not unknown_key and error.errno != errno.ENOSYS:
            raise _explain(error, layers) from error
        try:
            return build_by_mount(layers, source, staging)
        except OSError as second:
            raise _explain(second, layers) from second


def _build_by_context(layers: Layers, source: bytes) -> int:
    from shim.mount import syscalls

    names = _Names()
    try:
        options: list[tuple[str, bytes | None]] = [("lowerdir+", names.short(path)) for path in layers.lowers]
        if layers.upper:
            options += [("upperdir", names.short(layers.upper)), ("workdir", names.short(layers.work))]
        return syscalls.new_mount("overlay", source, [*options, *layers.options], layers.attributes)
    finally:
        names.close()


def build_by_mount(layers: Layers, source: bytes, staging: bytes) -> int:
    """The same by mount(2), as kernels before 6.8 need it: every layer is named by the number of an open descriptor,
    relative to /proc/self/fd, so that 500 of them fit into the page that mount(2) reads. Raises OSError, MountError."""
    from shim.mount import syscalls

    names = _Names()
    here = os.open(".", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        options = [b"lowerdir=" + b":".join(b"%d" % names.open(path) for path in layers.lowers)]
        if layers.upper:
            options.append(b"upperdir=%d,workdir=%d" % (names.open(layers.upper), names.open(layers.work)))
        options += [_as_text(name, value) for name, value in layers.options]
        data = b",".join(options)
        if len(data) > _PAGE_MAX:
            raise MountError(f"the overlay's options take {len(data)} bytes, mount(2) reads {_PAGE_MAX}")
        os.chdir("/proc/self/fd")
        try:
            syscalls.mount(source, staging, "overlay", _mount_flags(layers.attributes), data)
        finally:
            os.chdir(here)
        try:
            return syscalls.open_tree(staging, syscalls.OPEN_TREE_CLONE | syscalls.OPEN_TREE_CLOEXEC)
        finally:
            syscalls.umount2(staging, syscalls.MNT_DETACH | syscalls.UMOUNT_NOFOLLOW)
    finally:
        names.close()
        os.close(here)


def _mount_flags(attributes: int) -> int:
    """MOUNT_ATTR_* as mount(2)'s MS_*: equal but for the access times (include/uapi/linux/mount.h)."""
    flags = attributes & 0xF
    for attribute, flag in ((0x10, 1 << 10), (0x80, 1 << 11)):
        if attributes & attribute:
            flags |= flag
    return flags


def _as_text(name: str, value: bytes | None) -> bytes:
    if value is None:
        return name.encode()
    if name.encode() in _LABELS:
        return b'%s="%s"' % (name.encode(), value)
    return b"%s=%s" % (name.encode(), value)


def clear_volatile(layers: Layers) -> None:
    """Take away the mark of a volatile overlay: with it the kernel refuses the work directory (overlayfs.rst, "Volatile
    mount"). It stands for a crash, and the engine itself has just accepted this upper."""
    if not layers.volatile:
        return
    mark = os.path.join(layers.work, b"work", b"incompat", b"volatile")
    try:
        for name in os.listdir(mark):
            os.unlink(os.path.join(mark, name))
        os.rmdir(mark)
    except FileNotFoundError:
        pass
    except OSError as error:
        raise MountError(f"{os.fsdecode(mark)} cannot be removed (errno {error.errno})") from error


def _explain(error: OSError, layers: Layers) -> MountError:
    """A kernel's bare errno in words."""
    name = errno.errorcode.get(error.errno or 0, str(error.errno))
    reason, hint = f"the overlay cannot be mounted: {name}", None
    if error.errno == errno.ELOOP:
        reason += ", a layer is named twice or lies inside another"
    elif error.errno == errno.EINVAL:
        reason += (
            " (often: the engine's storage is itself an overlay, or its upper directory's file system cannot be one)"
        )
        hint = "keep the engine's storage and clip-shim's state directory on a plain disk file system; see dmesg"
    elif error.errno == errno.ENODEV:
        reason, hint = "this kernel has no overlay file system", "load it with `modprobe overlay`"
    elif error.errno == errno.EROFS and layers.upper:
        reason += ", the upper directory lies on a read-only file system"
    return MountError(reason, hint=hint)


def attach(mount_fd: int, target: bytes) -> None:
    """Put a detached mount on `target`. OSError."""
    from shim.mount import syscalls

    syscalls.attach(mount_fd, target)


def detach(target: bytes) -> None:
    """Unmount. EBUSY (a slave namespace is busy in it) becomes a lazy unmount. OSError."""
    from shim.mount import syscalls

    try:
        syscalls.umount2(target, syscalls.UMOUNT_NOFOLLOW)
    except OSError as error:
        if error.errno != errno.EBUSY:
            raise
        syscalls.umount2(target, syscalls.UMOUNT_NOFOLLOW | syscalls.MNT_DETACH)
