"""Mounting EROFS images: what is refused before the kernel is asked, what is left after, probing, leases."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from shim.erofs.writer import write_image
from shim.errors import MountError
from shim.index.model import Extent, Node, Tree
from shim.mount import loop, mountinfo, probe
from shim.mount.erofs import detached_erofs, mount_erofs, set_read_ahead
from shim.mount.lease import in_use
from shim.mount.loop import detached_erofs_loop, mount_erofs_loop
from tests.mounts.erofs_tools import unmounting
from tests.support.host import wait_for

Mount = Callable[[Path, Sequence[Path], Path], None]


@pytest.fixture(params=["erofs", "erofs-loop"])
def mount(request: pytest.FixtureRequest) -> Mount:
    return mount_erofs if request.param == "erofs" else mount_erofs_loop


@pytest.fixture
def parts(disk_path: Path) -> tuple[Path, list[Path]]:
    """An image and its two devices; file "a" lies in the first, "b" in the second, which is longer."""
    devices = [disk_path / "one", disk_path / "two"]
    devices[0].write_bytes(b"A" * 1024)
    devices[1].write_bytes(b"B" * 2048)
    children = {
        b"a": Node(stat.S_IFREG | 0o644, size=600, extents=(Extent(0, 0, 0, 600),)),
        b"b": Node(stat.S_IFREG | 0o644, size=2000, extents=(Extent(0, 1, 0, 2000),)),
    }
    image = disk_path / "image.erofs"
    with open(image, "wb") as out:
        write_image(Tree(Node(stat.S_IFDIR | 0o755, children=children)), [1024, 2000], out)
    return image, devices


def loops_of(directory: Path) -> list[str]:
    found = []
    for path in Path("/sys/block").glob("loop*/loop/backing_file"):
        try:
            found.append(path.read_text().strip())
        except OSError:
            continue
    return [name for name in found if name.startswith(str(directory))]


def mounts_of(directory: Path) -> list[mountinfo.MountEntry]:
    return [entry for entry in mountinfo.read() if entry.mount_point.startswith(os.fsencode(directory))]


def test_a_mount_and_its_end(parts: tuple[Path, list[Path]], disk_path: Path, mount: Mount) -> None:
    image, devices = parts
    with unmounting(disk_path / "mnt") as target:
        mount(image, devices, target)
        assert (target / "a").read_bytes() == b"A" * 600
        assert (target / "b").read_bytes() == b"B" * 2000
        entry = mountinfo.at(target)
        assert entry is not None
        assert entry.fs_type == b"erofs"
        assert entry.options == b"ro,nosuid,nodev,noexec,noatime"
    assert not mounts_of(disk_path)
    wait_for("the loop devices are free", lambda: not loops_of(disk_path))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda i, _: (i, []), "wants 2 layer files, 0 were given"),
        (lambda i, d: (i, d[:1]), "wants 2 layer files, 1 were given"),
        (lambda i, d: (i, [*d, d[0]]), "wants 2 layer files, 3 were given"),
        (lambda i, d: (i, d[::-1]), "layer file 0"),
        (lambda i, d: (i, [d[0], i.parent]), "no regular file"),
        (lambda i, d: (i, [d[0], i.parent / "none"]), "cannot open"),
        (lambda _, d: (d[0], d), "the tree image is truncated"),
        (lambda _, d: (d[1], d), "no EROFS superblock"),
        (lambda i, d: (i.parent / "none", d), "cannot open"),
        (lambda _, d: (Path("/dev/null"), d), "no regular file"),
    ],
)
def test_wrong_devices_are_refused_and_nothing_is_left(
    parts: tuple[Path, list[Path]],
    disk_path: Path,
    mount: Mount,
    change: Callable[[Path, list[Path]], tuple[Path, list[Path]]],
    words: str,
) -> None:
    """EROFS itself would mount every one of these that has an image, and show wrong bytes."""
    image, devices = change(*parts)
    with unmounting(disk_path / "mnt") as target, pytest.raises(MountError, match=words):
        mount(image, devices, target)
    assert not mounts_of(disk_path)
    wait_for("the loop devices are free", lambda: not loops_of(disk_path))


@pytest.mark.parametrize("size", [0, 512, 1536, 3072])
def test_a_device_of_another_length_is_refused(parts: tuple[Path, list[Path]], mount: Mount, size: int) -> None:
    os.truncate(parts[1][1], size)
    with pytest.raises(MountError, match=rf"layer file 1 .* has {size} bytes, the tree was made for 2048"):
        mount(*parts, parts[0].parent)


def test_a_truncated_image_is_refused(parts: tuple[Path, list[Path]], mount: Mount) -> None:
    os.truncate(parts[0], parts[0].stat().st_size - 512)
    with pytest.raises(MountError, match="truncated"):
        mount(*parts, parts[0].parent)


def test_a_missing_target_leaves_nothing(parts: tuple[Path, list[Path]], disk_path: Path, mount: Mount) -> None:
    with pytest.raises(MountError, match="cannot attach"):
        mount(*parts, disk_path / "none")
    wait_for("nothing holds the image", lambda: not in_use(parts[0]))
    wait_for("the loop devices are free", lambda: not loops_of(disk_path))


def test_symlinks_are_not_followed(parts: tuple[Path, list[Path]], disk_path: Path, mount: Mount) -> None:
    (disk_path / "link").symlink_to(parts[1][0])
    with pytest.raises(MountError, match="link"):
        mount(parts[0], [disk_path / "link", parts[1][1]], disk_path)


def test_long_paths(parts: tuple[Path, list[Path]], disk_path: Path, mount: Mount) -> None:
    deep = disk_path / ("x" * 200) / ("y" * 200)
    deep.mkdir(parents=True)
    moved = [path.rename(deep / path.name) for path in (parts[0], *parts[1])]
    with unmounting(disk_path / "mnt") as target:
        mount(moved[0], moved[1:], target)
        assert (target / "b").read_bytes() == b"B" * 2000


def test_an_image_in_memory_says_what_to_do(parts: tuple[Path, list[Path]], disk_path: Path) -> None:
    with unmounting(disk_path / "mem") as memory, unmounting(disk_path / "mnt") as target:
        subprocess.run(["mount", "-t", "tmpfs", "clip-test", memory], check=True)
        image = memory / "image.erofs"
        image.write_bytes(parts[0].read_bytes())
        with pytest.raises(MountError, match="Block device required") as caught:
            mount_erofs(image, parts[1], target)
        assert "tmpfs" in caught.value.hint
        mount_erofs_loop(image, parts[1], target)
        assert (target / "a").read_bytes() == b"A" * 600


def test_without_loop_control_there_is_a_hint(
    parts: tuple[Path, list[Path]], monkeypatch: pytest.MonkeyPatch, disk_path: Path
) -> None:
    real = os.open

    def fail(path: str, *args: int, **keywords: int) -> int:
        if path == "/dev/loop-control":
            raise FileNotFoundError(2, "No such file or directory", path)
        return real(path, *args, **keywords)

    monkeypatch.setattr(loop.os, "open", fail)
    with pytest.raises(MountError, match="loop-control") as caught:
        mount_erofs_loop(*parts, disk_path)
    assert "modprobe loop" in caught.value.hint


def test_read_ahead(parts: tuple[Path, list[Path]], disk_path: Path) -> None:
    def values() -> dict[str, str]:
        return {
            path.name: (path / "read_ahead_kb").read_text().strip() for path in Path("/sys/class/bdi").glob("erofs-*")
        }

    before = values()
    with unmounting(disk_path / "mnt") as target:
        mount_erofs(*parts, target, read_ahead_kib=1024)
        new = {name: value for name, value in values().items() if name not in before}
        assert "1024" in new.values()
    assert not set_read_ahead(["erofs-none"], 512)


@pytest.mark.parametrize("detached", [detached_erofs, detached_erofs_loop])
def test_detached_mounts_can_be_read_and_vanish(
    parts: tuple[Path, list[Path]], disk_path: Path, detached: Callable[[Path, list[Path]], int]
) -> None:
    fd = detached(*parts)
    try:
        file = os.open("a", os.O_RDONLY, dir_fd=fd)
        assert os.read(file, 1000) == b"A" * 600
        os.close(file)
        assert in_use(parts[0])
        assert not mounts_of(disk_path)
    finally:
        os.close(fd)
    wait_for("nothing holds the image", lambda: not in_use(parts[0]))


class TestProbe:
    def test_the_best_tier_is_found_and_nothing_is_left(self, disk_path: Path) -> None:
        tier, reason = probe.probe_tier(disk_path)
        assert tier == "erofs", reason
        assert not list(disk_path.iterdir())
        assert not mounts_of(disk_path)

    def test_on_tmpfs_loop_devices_are_taken(self, disk_path: Path) -> None:
        with unmounting(disk_path / "mem") as memory:
            subprocess.run(["mount", "-t", "tmpfs", "clip-test", memory], check=True)
            tier, reason = probe.probe_tier(memory)
            assert tier == "erofs-loop", reason
            assert "erofs: cannot mount" in reason
            wait_for("the loop devices are free", lambda: not loops_of(memory))

    def test_a_tier_with_wrong_bytes_or_errors_is_not_taken(
        self, disk_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def other_data(image: Path, devices: Sequence[Path]) -> int:
            devices[0].write_bytes(bytes(devices[0].stat().st_size))
            return detached_erofs(image, devices)

        def fails(image: Path, devices: Sequence[Path]) -> int:
            raise MountError("no such thing here")

        monkeypatch.setattr(probe, "_TIERS", (("erofs", other_data), ("erofs-loop", fails)))
        tier, reason = probe.probe_tier(disk_path)
        assert tier == "fuse"
        assert "wrong bytes" in reason
        assert "no such thing here" in reason

    def test_a_directory_that_is_not_there(self, disk_path: Path) -> None:
        with pytest.raises(MountError, match="cannot write"):
            probe.probe_tier(disk_path / "none")


class TestLease:
    def test_open_files_are_in_use(self, disk_path: Path) -> None:
        path = disk_path / "file"
        assert not in_use(path)
        path.touch()
        assert not in_use(path)
        with open(path, "rb"):
            assert in_use(path)
        assert not in_use(path)

    def test_a_mount_and_a_clone_in_another_namespace_are_users(
        self, parts: tuple[Path, list[Path]], disk_path: Path
    ) -> None:
        with unmounting(disk_path / "mnt") as target:
            mount_erofs(*parts, target)
            child = subprocess.Popen(
                ["unshare", "-m", "--propagation", "private", "sh", "-c", "echo; exec cat"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
            )
            assert child.stdin is not None
            assert child.stdout is not None
            child.stdout.readline()
            assert in_use(parts[0])
        assert in_use(parts[0])
        child.stdin.close()
        child.wait()
        child.stdout.close()
        wait_for("nothing holds the image", lambda: not in_use(parts[0]))

    def test_what_is_no_plain_file_is_refused(self, disk_path: Path) -> None:
        (disk_path / "link").symlink_to("file")
        with pytest.raises(MountError, match="link"):
            in_use(disk_path / "link")
        with pytest.raises(MountError, match="in use"):
            in_use("/dev/null")

    def test_an_open_at_the_same_moment_does_not_kill_us(self, disk_path: Path) -> None:
        """Breaking a lease sends SIGIO, whose default is death, unless another signal was asked for."""
        path = disk_path / "file"
        path.touch()
        opener = subprocess.Popen([sys.executable, "-c", f"while True: open({str(path)!r}).close()"])
        try:
            code = f"from shim.mount.lease import in_use\nfor _ in range(30000): in_use({str(path)!r})"
            asker = subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2], timeout=60)
        finally:
            opener.kill()
            opener.wait()
        assert asker.returncode == 0
