"""The kernel shows an EROFS image as the tree it was made from, in both ways of mounting it."""

from __future__ import annotations

import os
import random
import stat
import struct
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from shim.erofs.writer import write_image
from shim.index.model import Extent, Node, Tree
from shim.mount import syscalls
from shim.mount.erofs import mount_erofs
from shim.mount.loop import mount_erofs_loop
from tests.mounts.erofs_tools import tree_from_tars, unmounting
from tests.support.compare import compare, report

Mount = Callable[[Path, Sequence[Path], Path], None]
DIR, REG, LNK = stat.S_IFDIR, stat.S_IFREG, stat.S_IFLNK


@pytest.fixture(params=["erofs", "erofs-loop"])
def mount(request: pytest.FixtureRequest) -> Mount:
    return mount_erofs if request.param == "erofs" else mount_erofs_loop


def write(directory: Path, tree: Tree, devices: list[Path]) -> Path:
    image = directory / "image.erofs"

    def read_layer(layer: int, offset: int, length: int) -> bytes:
        with open(devices[layer], "rb") as file:
            file.seek(offset)
            return file.read(length)

    with open(image, "wb") as out:
        write_image(tree, [device.stat().st_size for device in devices], out, read_layer)
    return image


def device(directory: Path, name: str, data: bytes) -> Path:
    path = directory / name
    path.write_bytes(data + bytes(-len(data) % 512))
    return path


def make_source(top: Path) -> None:
    """A tree with one of everything that tar can carry."""
    rng = random.Random(3)
    top.mkdir()
    for i in range(300):
        path = top / f"d{i % 7}" / f"e{i % 3}" / f"file-{i}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(rng.randbytes(rng.choice((0, 1, 511, 512, 513, 4096, 70_000))))
        os.utime(path, ns=(0, rng.randrange(10**18)))
        os.chmod(path, rng.choice((0o644, 0o4755, 0o2711, 0o1600, 0)))
        os.chown(path, rng.randrange(1 << 32 - 1), rng.randrange(70_000))
    many = top / "many"
    many.mkdir()
    for i in range(3000):
        (many / f"{i:x}{'n' * (i % 200)}").touch()
    (top / ("long" + "x" * 251)).write_bytes(b"long name")
    (top / "caf\u00e9 \udcff\n").write_bytes(b"odd name")
    for length in (1, 100, 485, 1000, 4000):
        (top / f"link{length}").symlink_to("t" * length)
    for i in range(20):
        os.link(top / "d1/e1/file-1", top / f"d{i % 7}/hard-{i}")
    os.mknod(top / "null", stat.S_IFCHR | 0o666, os.makedev(1, 3))
    os.mknod(top / "disk", stat.S_IFBLK | 0o600, os.makedev(259, 300))
    os.mkfifo(top / "fifo", 0o640)
    os.setxattr(top / "d1", "user.on-a-directory", b"1")
    os.setxattr(top / "d1/e1/file-1", "trusted.t", bytes(range(256)))
    os.setxattr(top / "d2/e2/file-2", "security.capability", struct.pack("<5I", 0x02000001, 1 << 13, 0, 0, 0))
    os.chmod(top, 0o1777)
    os.utime(top / "many", ns=(0, 5))
    with open(top / "sparse", "wb") as file:
        for at in (4096, 1 << 20, 10_000_000):
            file.seek(at)
            file.write(rng.randbytes(5000))
        file.truncate(20_000_001)


def test_a_tar_with_everything_equals_its_source(disk_path: Path, mount: Mount) -> None:
    make_source(disk_path / "source")
    archive = disk_path / "layer.tar"
    subprocess.run(
        [
            "tar",
            "--format=pax",
            "--sparse",
            "--xattrs",
            "--xattrs-include=*",
            "-C",
            disk_path / "source",
            "-cf",
            archive,
            ".",
        ],
        check=True,
    )
    image = write(disk_path, tree_from_tars([archive]), [archive])
    with unmounting(disk_path / "mnt") as target:
        mount(image, [archive], target)
        found = compare(disk_path / "source", target)
        assert not found, report(found)
        assert (target / "many").stat().st_nlink == 2
        assert target.stat().st_nlink == 2 + 8


def test_many_layers_and_their_order(disk_path: Path, mount: Mount) -> None:
    devices = [device(disk_path, f"layer{i}", bytes([i]) * 512 + b"%d" % i * 600) for i in range(60)]
    root = Node(
        DIR | 0o755,
        children={b"f%d" % i: Node(REG | 0o644, size=600, extents=(Extent(0, i, 512, 600),)) for i in range(60)},
    )
    image = write(disk_path, Tree(root), devices)
    with unmounting(disk_path / "mnt") as target:
        mount(image, devices, target)
        for i in range(60):
            assert (target / f"f{i}").read_bytes() == (b"%d" % i * 600)[:600]


def test_what_no_tar_says_but_an_index_may(disk_path: Path, mount: Mount) -> None:
    acl = struct.pack("<I", 2) + b"".join(
        struct.pack("<HHI", *row)
        for row in ((1, 7, 0xFFFFFFFF), (2, 6, 1234), (4, 5, 0xFFFFFFFF), (0x10, 7, 0xFFFFFFFF), (0x20, 0, 0xFFFFFFFF))
    )
    data = bytes(range(256)) * 200
    devices = [device(disk_path, "a", data), device(disk_path, "b", data[::-1])]
    pieces = (
        Extent(3, 0, 7, 1000),
        Extent(5000, 1, 512, 20_000),
        Extent(25_000, 0, 1024, 512),
        Extent(30_000, 1, 0, 1),
    )
    expected = bytearray(40_000)
    for logical, layer, offset, length in pieces:
        expected[logical : logical + length] = (data, data[::-1])[layer][offset : offset + length]
    root = Node(
        DIR | 0o755,
        mtime=-1,
        children={
            b"old": Node(REG | 0o644, mtime=-1_500_000_001),
            b"far": Node(REG | 0o644, mtime=2**40 * 10**9 + 7),
            b"acl": Node(REG | 0o674, xattrs=((b"system.posix_acl_access", acl), (b"com.apple.x", b"left out"))),
            b"acldir": Node(DIR | 0o755, xattrs=((b"system.posix_acl_default", acl),), children={}),
            b"big-xattr": Node(REG | 0o644, xattrs=tuple((b"user.%d" % i, bytes([i]) * 9000) for i in range(7))),
            b"pieces": Node(REG | 0o644, size=40_000, extents=pieces),
            b"hole": Node(REG | 0o644, size=1 << 40),
            b"bigfile": Node(REG | 0o644, size=1 << 40, extents=(Extent((1 << 40) - 512, 0, 512, 512),)),
        },
    )
    image = write(disk_path, Tree(root), devices)
    with unmounting(disk_path / "mnt") as target:
        mount(image, devices, target)
        assert target.stat().st_mtime_ns == -1
        assert (target / "old").stat().st_mtime_ns == -1_500_000_001
        assert (target / "far").stat().st_mtime_ns == 2**40 * 10**9 + 7
        assert os.getxattr(target / "acl", "system.posix_acl_access") == acl
        assert os.listxattr(target / "acl") == ["system.posix_acl_access"]
        assert os.getxattr(target / "acldir", "system.posix_acl_default") == acl
        for i in range(7):
            assert os.getxattr(target / "big-xattr", f"user.{i}") == bytes([i]) * 9000
        assert (target / "pieces").read_bytes() == bytes(expected)
        with open(target / "hole", "rb") as file:
            assert file.read(1 << 16) == bytes(1 << 16)
            file.seek((1 << 40) - 10)
            assert file.read() == bytes(10)
        with open(target / "bigfile", "rb") as file:
            file.seek((1 << 40) - 600)
            assert file.read() == bytes(88) + data[512:1024]


def test_a_directory_of_100000(disk_path: Path) -> None:
    children = {b"%06d-%s" % (i, b"n" * (i % 90)): Node(REG | 0o644) for i in range(100_000)}
    image = write(disk_path, Tree(Node(DIR | 0o755, children={b"d": Node(DIR | 0o755, children=children)})), [])
    with unmounting(disk_path / "mnt") as target:
        mount_erofs(image, [], target)
        assert set(os.listdir(os.fsencode(target / "d"))) == children.keys()
        for name in random.Random(1).sample(sorted(children), 300):
            assert os.lstat(os.fsencode(target / "d") + b"/" + name).st_size == 0
        with pytest.raises(FileNotFoundError):
            os.lstat(target / "d" / "000000-x")


def test_an_overlay_above_shows_devices_and_setuid_programs(disk_path: Path) -> None:
    """The tree's own mount is nosuid, nodev, noexec; what a container mounts over it is not."""
    program = Path("/bin/sleep").read_bytes()
    devices = [device(disk_path, "a", program)]
    root = Node(
        DIR | 0o755,
        children={
            b"null": Node(stat.S_IFCHR | 0o666, rdev=(1, 3)),
            b"sleep": Node(REG | 0o4755, size=len(program), extents=(Extent(0, 0, 0, len(program)),)),
        },
    )
    image = write(disk_path, Tree(root), devices)
    for name in ("upper", "work"):
        (disk_path / name).mkdir()
    with unmounting(disk_path / "mnt") as target, unmounting(disk_path / "merged") as merged:
        mount_erofs(image, devices, target)
        with pytest.raises(PermissionError):
            (target / "null").write_bytes(b"x")
        with pytest.raises(PermissionError):
            subprocess.run([target / "sleep", "0"], check=True)
        options = [("lowerdir", target), ("upperdir", disk_path / "upper"), ("workdir", disk_path / "work")]
        fd = syscalls.new_mount("overlay", "test", options)
        syscalls.attach(fd, merged)
        os.close(fd)
        (merged / "null").write_bytes(b"x")
        subprocess.run([merged / "sleep", "0"], check=True)
        assert (merged / "sleep").stat().st_mode == REG | 0o4755
