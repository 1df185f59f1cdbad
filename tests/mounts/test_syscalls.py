"""The mount system calls against the running kernel."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from shim.mount import mountinfo, syscalls
from tests.mounts.erofs_tools import unmounting


def tmpfs() -> int:
    return syscalls.new_mount("tmpfs", "clip-test", [("size", "1m"), ("mode", "0711")])


def names(path: Path) -> mountinfo.MountEntry:
    entry = mountinfo.at(path)
    assert entry is not None
    return entry


def test_a_new_mount_is_attached_by_path_and_by_descriptor(disk_path: Path) -> None:
    with unmounting(disk_path / "a") as first, unmounting(disk_path / "b c") as second:
        fd = tmpfs()
        assert not os.path.ismount(first)
        syscalls.attach(fd, first)
        os.close(fd)
        assert (names(first).fs_type, names(first).source) == (b"tmpfs", b"clip-test")
        assert os.stat(first).st_mode & 0o777 == 0o711
        directory = os.open(second, os.O_PATH)
        fd = tmpfs()
        syscalls.attach(fd, directory)
        os.close(fd)
        os.close(directory)
        assert names(second).mount_point == os.fsencode(second)


def test_a_mount_that_is_not_attached_vanishes(disk_path: Path) -> None:
    before = len(mountinfo.read())
    fd = tmpfs()
    os.close(fd)
    assert len(mountinfo.read()) == before


def test_attributes_and_idle_flags(disk_path: Path) -> None:
    with unmounting(disk_path / "a") as target:
        attrs = syscalls.MOUNT_ATTR_RDONLY | syscalls.MOUNT_ATTR_NODEV
        fd = syscalls.new_mount("tmpfs", None, [], attrs)
        syscalls.mount_setattr(fd, attr_set=syscalls.MOUNT_ATTR_NOEXEC, attr_clr=syscalls.MOUNT_ATTR_NODEV)
        syscalls.attach(fd, target)
        os.close(fd)
        assert names(target).options.startswith(b"ro,noexec")


def test_errors_name_the_option_the_value_and_the_kernels_words() -> None:
    with pytest.raises(OSError, match=r"fsconfig nonsense.*Unknown parameter 'nonsense'") as caught:
        syscalls.new_mount("tmpfs", "x", [("nonsense", "1")])
    assert caught.value.errno == errno.EINVAL
    with pytest.raises(OSError, match=r"fsconfig lowerdir\+.*/does/not/exist") as caught:
        syscalls.new_mount("overlay", "x", [("lowerdir+", "/does/not/exist")])
    assert caught.value.errno == errno.ENOENT
    with pytest.raises(OSError, match="nosuchfs") as caught:
        syscalls.fsopen("nosuchfs")
    assert caught.value.errno == errno.ENODEV


def test_failed_mounts_leave_no_descriptor() -> None:
    before = os.listdir("/proc/self/fd")
    for _ in range(3):
        with pytest.raises(OSError, match="nonsense"):
            syscalls.new_mount("tmpfs", "x", [("nonsense", None)])
    assert os.listdir("/proc/self/fd") == before


def test_values_that_the_kernel_would_cut_or_refuse_silently_are_refused(disk_path: Path) -> None:
    with pytest.raises(OSError, match="255") as caught:
        syscalls.new_mount("overlay", "x", [("lowerdir+", "/" + "x" * 255)])
    assert caught.value.errno == errno.ENAMETOOLONG
    with pytest.raises(OSError, match="4095") as caught:
        syscalls.mount("x", disk_path, "tmpfs", 0, "size=1m," + "x" * 4090)
    assert caught.value.errno == errno.E2BIG
    with pytest.raises(OSError, match="NUL"):
        syscalls.umount2(b"/proc\0/x")
    assert not os.path.ismount(disk_path)


def test_overlay_of_descriptors_and_odd_names(disk_path: Path) -> None:
    lowers = [disk_path / name for name in ("plain", "co:lon, and\\back")]
    for path in (*lowers, disk_path / "upper", disk_path / "work"):
        path.mkdir()
        (path / path.name).touch()
    (disk_path / "work" / "work").unlink()
    with unmounting(disk_path / "merged") as target:
        options = [*(("lowerdir+", path) for path in lowers), ("upperdir", disk_path / "upper")]
        fd = syscalls.new_mount("overlay", "clip:x", [*options, ("workdir", disk_path / "work"), ("index", "off")])
        syscalls.attach(fd, target)
        os.close(fd)
        assert {path.name for path in lowers} <= set(os.listdir(target))
        entry = names(target)
        assert mountinfo.split_lowerdirs(entry.super_options) == [os.fsencode(path) for path in lowers]
        assert dict(mountinfo.split_options(entry.super_options))[b"upperdir"] == os.fsencode(disk_path / "upper")


def test_legacy_mount_with_escapes_is_parsed_back(disk_path: Path) -> None:
    lowers = [disk_path / name for name in ("plain", "co:lon, and\\back")]
    for path in lowers:
        path.mkdir()
    given = ":".join(str(path).replace("\\", "\\\\").replace(":", "\\:").replace(",", "\\,") for path in lowers)
    with unmounting(disk_path / "merged") as target:
        syscalls.mount("clip:x", target, "overlay", syscalls.MS_RDONLY, f"lowerdir={given}")
        assert mountinfo.split_lowerdirs(names(target).super_options) == [os.fsencode(path) for path in lowers]


def test_clones_and_moves(disk_path: Path) -> None:
    with unmounting(disk_path / "a") as first, unmounting(disk_path / "b") as second:
        fd = tmpfs()
        syscalls.attach(fd, first)
        os.close(fd)
        (first / "here").touch()
        clone = syscalls.open_tree(first, syscalls.OPEN_TREE_CLONE | syscalls.OPEN_TREE_CLOEXEC)
        syscalls.move_mount(clone, second)
        os.close(clone)
        assert (second / "here").exists()
        syscalls.umount2(first)
        assert not os.path.ismount(first)
        assert (second / "here").exists()


def test_stacked_mounts_show_the_topmost(disk_path: Path) -> None:
    with unmounting(disk_path / "a") as target:
        older = syscalls.new_mount("tmpfs", "older", [])
        newer = syscalls.new_mount("tmpfs", "newer", [])
        for fd in (newer, older):  # the older mount, with the smaller id, comes on top
            syscalls.attach(fd, target)
            os.close(fd)
        assert names(target).source == b"older"
        syscalls.umount2(target)
        assert names(target).source == b"newer"


def test_umount_errors(disk_path: Path) -> None:
    with pytest.raises(OSError, match="umount") as caught:
        syscalls.umount2(disk_path)
    assert caught.value.errno == errno.EINVAL
    assert caught.value.filename == str(disk_path)
    with unmounting(disk_path / "a") as target:
        fd = tmpfs()
        syscalls.attach(fd, target)
        os.close(fd)
        with open(target / "held", "wb"), pytest.raises(OSError, match="umount") as caught:
            syscalls.umount2(target)
        assert caught.value.errno == errno.EBUSY
        (disk_path / "link").symlink_to(target)
        with pytest.raises(OSError, match="umount"):
            syscalls.umount2(disk_path / "link")
        assert os.path.ismount(target)


def test_openat2_stays_in_its_root(disk_path: Path) -> None:
    root = disk_path / "root"
    (root / "etc").mkdir(parents=True)
    (root / "etc" / "passwd").write_bytes(b"inside")
    (root / "absolute").symlink_to("/etc/passwd")
    (root / "up").symlink_to("../../../../../etc/passwd")
    fd = os.open(root, os.O_PATH)
    try:
        for name in ("absolute", "up", "/etc/passwd", "../etc/passwd"):
            file = syscalls.openat2(fd, name, os.O_RDONLY)
            assert os.read(file, 100) == b"inside"
            assert not os.get_inheritable(file)
            os.close(file)
        with pytest.raises(OSError, match="absolute") as caught:
            syscalls.openat2(fd, "absolute", os.O_RDONLY, resolve=syscalls.RESOLVE_NO_SYMLINKS)
        assert caught.value.errno == errno.ELOOP
        file = syscalls.openat2(fd, "new", os.O_WRONLY | os.O_CREAT, mode=0o600)
        os.close(file)
        assert (root / "new").stat().st_mode & 0o777 == 0o600
    finally:
        os.close(fd)


def test_reconfigure(disk_path: Path) -> None:
    with unmounting(disk_path / "a") as target:
        fd = tmpfs()
        syscalls.attach(fd, target)
        os.close(fd)
        context = syscalls.fspick(target)
        syscalls.fsconfig_set_flag(context, "ro")
        syscalls.fsconfig_reconfigure(context)
        os.close(context)
        assert names(target).super_options.startswith(b"ro")
