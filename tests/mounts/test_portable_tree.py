"""The portable FUSE tree over blob files: the same as the index says, whatever a program asks, and a clean end."""

from __future__ import annotations

import errno
import gzip
import os
import signal
import stat
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.support import expected, images
from tests.support.compare import compare, report
from tests.support.ocitar import BLK, CHR, DIR, FIFO, LINK, SYM, Entry, tar
from tests.support.portable import Portable, Show, failure, showing
from tests.support.smallimage import CAP_NET_RAW, busybox, noise, text

T = 1_600_000_000_123_456_789


@pytest.fixture
def show(disk_path: Path) -> Iterator[Show]:
    yield from showing(disk_path)


def sparse_layer() -> bytes:
    pieces = tuple((n * 70_000, 1000 + n) for n in range(50))
    data = noise(5, sum(length for _, length in pieces))
    return tar(
        [
            Entry(b"sparse", sparse=(5_000_000, pieces), data=data),
            Entry(b"hole", sparse=(3_000_000_000, ()), data=b""),
            Entry(b"plain", data=noise(6, 3_000_001)),
        ]
    )


# --- the same contents ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["small", "odd"])
def test_the_tree_is_what_umoci_unpacks(show: Show, name: str) -> None:
    image = images.image(name)
    tree = show([gzip.decompress(layer.path.read_bytes()) for layer in image.layers])
    assert tree.said == "READY\n"
    found = compare(expected.tree(image), tree.path, unset=expected.unset(image))
    assert not found, report(found)


def test_every_attribute_is_the_indexs(show: Show) -> None:
    xattrs = {"user.a": b"\0\xff", "user.b": b"two"}
    layer = tar(
        [
            Entry(b"d", DIR, 0o3771, uid=3_000_000, gid=7, mtime=T),
            Entry(b"d/file", mode=0o6711, uid=1, gid=2, mtime=T + 1, data=text(1, 1025), xattrs=xattrs),
            Entry(b"d/hard", LINK, 0o6711, uid=1, gid=2, mtime=T + 1, target=b"d/file"),
            Entry(b"d/sub", DIR, 0o700, mtime=0),
            Entry(b"chr", CHR, 0o620, device=(250, 70_000), mtime=T),
            Entry(b"blk", BLK, 0o660, device=(8, 1), mtime=T),
            Entry(b"fifo", FIFO, 0o600, mtime=T),
            Entry(b"sym", SYM, 0o777, target=b"t/" * 2000 + b"x", mtime=T),
            Entry("größe".encode() + b"\xff\n", data=b"odd name"),
            *(Entry(b"many/%05d" % n, data=b"%d" % n) for n in range(3000)),
        ]
    )  # fmt: skip
    tree = show([layer])
    base = os.fsencode(tree.path)
    inos: dict[int, int] = {}
    count = 0
    for path, node in tree.index.tree.walk():
        found = os.lstat(base + path)
        count += 1
        shown = (found.st_mode, found.st_uid, found.st_gid, found.st_mtime_ns, found.st_size, found.st_nlink)
        assert shown == (node.mode, node.uid, node.gid, node.mtime, node.size, node.nlink), path
        assert found.st_blocks == -(-node.size // 512)
        assert (os.major(found.st_rdev), os.minor(found.st_rdev)) == node.rdev
        assert inos.setdefault(id(node), found.st_ino) == found.st_ino
        names = os.listxattr(base + path, follow_symlinks=False)
        assert {n: os.getxattr(base + path, n) for n in names} == {os.fsdecode(k): v for k, v in node.xattrs}
        if node.is_symlink:
            assert os.readlink(base + path) == node.target
        if node.is_dir:
            assert sorted(os.listdir(base + path)) == sorted(node.children or {})
    assert len(set(inos.values())) == len(inos) == count - 1
    whole = os.statvfs(tree.path)
    assert (whole.f_files, whole.f_bfree, whole.f_bavail, whole.f_ffree, whole.f_namemax) == (len(inos), 0, 0, 0, 255)
    assert whole.f_blocks * whole.f_frsize >= tree.index.tree.root.nlink

    for path, name in ((b"/d/file", "user.none"), (b"/d", "user.a"), (b"/sym", "trusted.x")):
        assert failure(os.getxattr, base + path, name, follow_symlinks=False) == errno.ENODATA
    for missing in (b"/none", b"/d/none", b"/d/none/deeper", b"/" + b"n" * 255):
        with pytest.raises(FileNotFoundError):
            os.lstat(base + missing)

    before = {path: os.lstat(base + path).st_ino for path, _ in tree.index.tree.walk()}
    tree.unmount()
    assert tree.process.wait(10) == 0
    tree.start()
    assert {path: os.lstat(base + path).st_ino for path in before} == before


def test_holes_are_zeros_and_every_range_is_right(show: Show) -> None:
    layer = sparse_layer()
    tree = show([layer])
    (sparse,) = (node for path, node in tree.index.tree.walk() if path == b"/sparse")
    want = bytearray(sparse.size)
    for extent in sparse.extents:
        want[extent.logical : extent.logical + extent.length] = layer[extent.offset : extent.offset + extent.length]
    assert len(sparse.extents) == 50
    fd = os.open(tree.path / "sparse", os.O_RDONLY)
    for offset in [*range(0, sparse.size, 99_991), 0, 69_999, 70_000, 4_999_999, 5_000_000, 6_000_000]:
        for length in (1, 1500, 400_000):
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            assert os.pread(fd, length, offset) == want[offset : offset + length], (offset, length)
    os.close(fd)
    assert (tree.path / "plain").read_bytes() == noise(6, 3_000_001)
    fd = os.open(tree.path / "hole", os.O_RDONLY)
    assert os.fstat(fd).st_size == 3_000_000_000
    assert os.pread(fd, 8192, 2_999_999_000) == bytes(1000)
    os.close(fd)


def test_nothing_can_be_written(show: Show) -> None:
    tree = show([tar([Entry(b"f", data=b"x"), Entry(b"d", DIR, 0o755)])])
    path = str(tree.path)
    calls: list[Callable[[], object]] = [
        lambda: os.open(f"{path}/f", os.O_WRONLY),
        lambda: os.open(f"{path}/f", os.O_RDWR),
        lambda: os.open(f"{path}/new", os.O_CREAT | os.O_WRONLY),
        lambda: os.truncate(f"{path}/f", 0),
        lambda: os.mkdir(f"{path}/new"),
        lambda: os.mknod(f"{path}/new", stat.S_IFIFO | 0o600),
        lambda: os.symlink("x", f"{path}/new"),
        lambda: os.link(f"{path}/f", f"{path}/new"),
        lambda: os.rename(f"{path}/f", f"{path}/new"),
        lambda: os.unlink(f"{path}/f"),
        lambda: os.rmdir(f"{path}/d"),
        lambda: os.chmod(f"{path}/f", 0o600),
        lambda: os.chown(f"{path}/f", 1, 1),
        lambda: os.utime(f"{path}/f"),
        lambda: os.setxattr(f"{path}/f", "user.x", b"1"),
        lambda: os.removexattr(f"{path}/f", "user.x"),
    ]
    for number, call in enumerate(calls):
        assert failure(call) == errno.EROFS, number
    assert (tree.path / "f").read_bytes() == b"x"


def test_as_the_lower_layer_of_an_overlay_programs_run_with_their_rights(show: Show, disk_path: Path) -> None:
    program = busybox()
    tree = show(
        [
            tar(
                [
                    Entry(b"bin", DIR, 0o755),
                    Entry(b"bin/busybox", mode=0o755, data=program),
                    Entry(b"bin/busybox-setuid", mode=0o4755, data=program),
                    Entry(
                        b"bin/busybox-capable", mode=0o755, data=program, xattrs={"security.capability": CAP_NET_RAW}
                    ),
                    Entry(b"data", mode=0o640, uid=5, mtime=T, data=text(3, 300_000), xattrs={"user.kept": b"yes"}),
                    Entry(b"data-2", LINK, 0o640, uid=5, mtime=T, target=b"data", xattrs={"user.kept": b"yes"}),
                    Entry(b"gone/file", data=b"1"),
                ]
            )
        ]
    )
    merged, upper, work = (disk_path / name for name in ("merged", "upper", "work"))
    for directory in (merged, upper, work):
        directory.mkdir()
    options = f"lowerdir={tree.path},upperdir={upper},workdir={work},index=off,metacopy=off,redirect_dir=off"
    subprocess.run(["mount", "-t", "overlay", "-o", options, "overlay", str(merged)], check=True)
    try:

        def run(name: str, *args: str) -> str:
            command = [f"bin/{name}", *args]
            done = subprocess.run(
                command, cwd=merged, user=1000, group=1000, extra_groups=[], capture_output=True, text=True
            )
            assert done.returncode == 0, done.stderr
            return done.stdout.strip()

        for name, uid, capabilities in (("busybox", 1000, 0), ("busybox-capable", 1000, 1 << 13)):
            lines = run(name, "sh", "-c", "while read -r line; do echo $line; done < /proc/self/status").split("\n")
            found = {line.partition(":")[0]: line.partition(":")[2].split() for line in lines}
            assert found["Uid"][1] == str(uid), name
            assert int(found["CapEff"][0], 16) == capabilities, name
        euid = run("busybox-setuid", "stat", "-c", "%u %a", "/proc/self")
        assert euid.split()[0] == "0"
        data = merged / "data"
        assert data.read_bytes() == text(3, 300_000)
        with open(data, "ab") as file:
            file.write(b"more")
        found_stat = data.stat()
        assert (found_stat.st_size, stat.S_IMODE(found_stat.st_mode), found_stat.st_uid) == (300_004, 0o640, 5)
        assert os.getxattr(data, "user.kept") == b"yes"
        assert data.read_bytes() == text(3, 300_000) + b"more"
        assert (merged / "data-2").read_bytes() == text(3, 300_000)
        (merged / "gone/file").unlink()
        (merged / "gone").rmdir()
        assert sorted(os.listdir(merged)) == ["bin", "data", "data-2"]
        assert (tree.path / "gone/file").read_bytes() == b"1"
    finally:
        subprocess.run(["umount", str(merged)], check=True)


# --- beginning and end ----------------------------------------------------------------------------------------------


def test_it_ends_when_it_is_unmounted_and_not_before(show: Show) -> None:
    tree = show([tar([Entry(b"f", data=b"x")])])
    for number in (signal.SIGTERM, signal.SIGHUP):
        tree.process.send_signal(number)
    assert (tree.path / "f").read_bytes() == b"x"
    assert os.getpgid(tree.process.pid) == tree.process.pid  # a terminal's Ctrl-C does not come here
    tree.unmount()
    assert tree.process.wait(10) == 0
    assert not tree.log.read_bytes()


def test_killed_it_leaves_an_error_not_a_hang(show: Show) -> None:
    tree = show([tar([Entry(b"f", data=noise(1, 1_000_000))])])
    fd = os.open(tree.path / "f", os.O_RDONLY)
    tree.process.kill()
    tree.process.wait()
    assert failure(os.listdir, tree.path) == errno.ENOTCONN
    assert failure(os.pread, fd, 10, 500_000) in (errno.ENOTCONN, errno.ECONNABORTED)
    assert failure(os.close, fd) in (0, errno.ENOTCONN)
    tree.unmount()


def _swap(tree: Portable) -> None:
    tree.names.reverse()


def _fewer(tree: Portable) -> None:
    del tree.names[1]


def _none(tree: Portable) -> None:
    (tree.blobs / tree.names[0]).unlink()


def _short(tree: Portable) -> None:
    os.truncate(tree.blobs / tree.names[0], 512)


def _link(tree: Portable) -> None:
    blob = tree.blobs / tree.names[0]
    blob.rename(tree.base / "elsewhere")
    blob.symlink_to(tree.base / "elsewhere")


def _no_index(tree: Portable) -> None:
    (tree.base / "index.clip").write_bytes(b"junk" * 100)


def _no_target(tree: Portable) -> None:
    tree.path.rmdir()


@pytest.mark.parametrize("spoil", [_swap, _fewer, _none, _short, _link, _no_index, _no_target])
def test_what_is_wrong_is_said_and_nothing_is_mounted(show: Show, spoil: Callable[[Portable], None]) -> None:
    tree = show([tar([Entry(b"a", data=b"1")]), tar([Entry(b"b", data=noise(1, 5000))])])
    tree.unmount()
    assert tree.process.wait(10) == 0
    spoil(tree)
    tree.start()
    assert tree.said.startswith("ERROR ")
    assert tree.said.count("\n") == 1
    assert tree.process.wait(10) == 1
    assert not os.path.ismount(tree.path)
    assert b"Traceback" not in tree.log.read_bytes()
