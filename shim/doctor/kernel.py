"""What the kernel can do: found out by doing it, in a mount namespace of a child process, not by version numbers."""

from __future__ import annotations

import os
import platform
import select
import stat
from collections.abc import Iterator
from pathlib import Path

from shim.doctor import trial
from shim.doctor.node import Node, why
from shim.doctor.result import Result, failed, ok, skipped, warning
from shim.errors import MountError, ShimError
from shim.fuse import connection, proto
from shim.mount import overlay, syscalls
from shim.mount.probe import probe_tier

FUSE = Path("/dev/fuse")
_FUSE_NUMBERS = (10, 229)  # Documentation/admin-guide/devices.txt


def root(_: Node) -> Iterator[Result]:
    if os.geteuid():
        yield warning(
            f"running as uid {os.geteuid()}",
            "root: mounts and engines' files can be tried by root only",
            "run `sudo clip-shim doctor`",
        )
    else:
        yield ok("running as root", "root")


def fuse_device(_: Node) -> Iterator[Result]:
    expected = "/dev/fuse is a character device that can be opened"
    try:
        info = FUSE.stat()
    except OSError as error:
        yield failed(
            why(error), expected, "run `modprobe fuse`; in a container, give it the device: --device /dev/fuse"
        )
        return
    if not stat.S_ISCHR(info.st_mode) or (os.major(info.st_rdev), os.minor(info.st_rdev)) != _FUSE_NUMBERS:
        yield failed(
            f"{FUSE} is something else", expected, f"rm {FUSE} and `mknod {FUSE} c 10 229`, or start udev again"
        )
        return
    try:
        os.close(os.open(FUSE, os.O_RDWR | os.O_CLOEXEC))
    except OSError as error:
        yield failed(why(error), expected, "run this as root; in a container, allow the device in its cgroup")
        return
    yield ok(f"{FUSE} can be opened", expected)


def openat2(_: Node) -> Iterator[Result]:
    expected = "openat2(2) with RESOLVE_IN_ROOT (Linux 5.6): paths inside a container's root are opened with it"
    here = os.open("/", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.close(syscalls.openat2(here, "proc", os.O_PATH))
    except OSError as error:
        yield failed(
            f"Linux {platform.release()}: {os.strerror(error.errno or 0)}",
            expected,
            "use a newer kernel; in a container, a seccomp profile that allows openat2",
        )
        return
    finally:
        os.close(here)
    yield ok(f"Linux {platform.release()} has it", expected)


def mount_api(node: Node) -> Iterator[Result]:
    expected = "fsopen, fsconfig, fsmount, move_mount (Linux 5.2) mount a tmpfs in a private mount namespace"
    try:
        trial.attempt(_mount_tmpfs, node.work_dir)
    except MountError as error:
        yield failed(
            str(error), expected, "run this as root with CAP_SYS_ADMIN, on Linux 5.2 or later, without a seccomp filter"
        )
        return
    yield ok("a tmpfs was mounted", expected)


def _mount_tmpfs(work: Path) -> None:
    fd = syscalls.new_mount("tmpfs", "doctor", [("size", "64k")])
    try:
        syscalls.attach(fd, work)
    finally:
        os.close(fd)
    (work / "file").write_text("x")


def fuse_resend(node: Node) -> Iterator[Result]:
    expected = "the kernel delivers requests again after a crash of the server (FUSE_NOTIFY_RESEND, Linux 6.9)"
    try:
        offered = trial.attempt(_try_resend, node.work_dir)
    except MountError as error:
        yield failed(str(error), expected, "see the check fuse-device: a FUSE file system must be mountable")
        return
    if offered["resend"]:
        yield ok(f"FUSE 7.{offered['minor']} took the notification", expected)
    else:
        yield warning(
            f"FUSE 7.{offered['minor']} does not offer it",
            expected,
            "use Linux 6.9 or later: until then reads that wait when the daemon is killed fail",
        )


def _try_resend(work: Path) -> dict[str, object]:
    fd = connection.mount(work)
    if not select.select([fd], [], [], 5)[0]:
        raise MountError("the kernel sends no INIT")
    request = os.read(fd, proto.REQUEST_BUFFER)
    unique = proto.IN_HEADER.unpack_from(request)[2]
    body = memoryview(request)[proto.IN_HEADER.size :]
    state = proto.negotiate(body)
    reply = proto.init_out(state)
    os.write(fd, proto.OUT_HEADER.pack(proto.OUT_HEADER.size + len(reply), 0, unique) + reply)
    if state.can_resend:
        os.write(fd, proto.OUT_HEADER.pack(proto.OUT_HEADER.size, proto.NOTIFY_RESEND, 0))
    return {"resend": state.can_resend, "minor": proto.INIT_IN.unpack_from(body)[1]}


def erofs(node: Node) -> Iterator[Result]:
    expected = "an EROFS image is mounted from a file (Linux 6.12, CONFIG_EROFS_FS_BACKED_BY_FILE), and read"
    wanted = node.settings["tree"]
    try:
        tier, reason = trial.attempt(_probe, node.work_dir, 30)
    except MountError as error:
        yield failed(str(error), expected, error.hint or "see dmesg")
        return
    if tier == "erofs":
        yield ok(reason, expected)
    elif wanted in ("fuse", tier):
        yield ok(f"{reason} (the configuration asks for `tree: {wanted}`)", f"what `tree: {wanted}` needs")
    elif wanted not in ("auto", tier):
        yield failed(reason, f"what `tree: {wanted}` needs", "set `tree: auto`, or use a kernel that can do it")
    else:
        slower = "through loop devices" if tier == "erofs-loop" else "by the portable FUSE tree, which is slower"
        yield warning(
            f"trees are mounted {slower} ({reason})",
            expected,
            "run `modprobe erofs`; use Linux 6.12 or later; keep `state_dir` on a disk (not tmpfs, not overlayfs)",
        )


def _probe(work: Path) -> list[str]:
    return list(probe_tier(work))


def overlay_options(node: Node) -> Iterator[Result]:
    expected = "an overlay is built from lowerdir+ (Linux 6.8), with index, metacopy and redirect_dir off"
    try:
        how = trial.attempt(_try_overlay, node.work_dir)
    except MountError as error:
        yield failed(str(error), expected, error.hint or "run `modprobe overlay`; keep `state_dir` on ext4 or xfs")
        return
    if how == "context":
        yield ok("it was built, and written to", expected)
    else:
        yield ok("built by mount(2), as this kernel does not know lowerdir+", expected)


def _try_overlay(work: Path) -> str:
    for name in ("lower", "low", "upper", "work", "merged", "staging"):
        (work / name).mkdir()
    (work / "lower" / "file").write_text("lower")
    off = [(name, b"off") for name in ("index", "metacopy", "redirect_dir")]
    layers = overlay.Layers([os.fsencode(work / "low"), os.fsencode(work / "lower")], options=off)
    layers.upper, layers.work = os.fsencode(work / "upper"), os.fsencode(work / "work")
    how = "context"
    try:
        context = syscalls.fsopen("overlay")
        try:
            syscalls.fsconfig_set_string(context, "lowerdir+", work / "lower")
        except OSError:
            how = "mount"
        finally:
            os.close(context)
    except OSError as error:
        raise MountError(f"the kernel has no overlay: {error.strerror}") from error
    fd = overlay.build(layers, b"clip-doctor", os.fsencode(work / "staging"))
    try:
        syscalls.attach(fd, work / "merged")
    finally:
        os.close(fd)
    (work / "merged" / "file").write_text("changed")
    if (work / "lower" / "file").read_text() != "lower" or (work / "upper" / "file").read_text() != "changed":
        raise MountError("a write through the overlay went to the wrong layer")
    return how


def lazy_tree(node: Node) -> Iterator[Result]:
    expected = "a program runs, a file is copied up and xattrs are kept on an overlay over a lazily loaded tree"
    from shim.doctor import lazytree

    try:
        tier = trial.attempt(_probe, node.work_dir, 30)[0]
        if tier == "fuse":
            yield skipped("EROFS cannot be mounted here (see the check erofs), so only the portable tree is used")
            return
        seconds = trial.attempt(lambda work: lazytree.try_all(work, tier), node.work_dir, 30)
    except (ShimError, OSError) as error:
        yield failed(why(error), expected, getattr(error, "hint", "") or "see dmesg for what the kernel says")
        return
    yield ok(f"all of it works, by {tier} ({seconds * 1000:.0f} ms)", expected)
