"""The portable FUSE tree over blob files: the same as the index says, whatever a program asks, and it dies cleanly."""

from __future__ import annotations

import errno
import gzip
import json
import os
import signal
import stat
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from shim.errors import RegistryError
from shim.fuse import connection
from shim.fuse.blob import Done
from shim.fuse.journal import Journal
from shim.fuse.server import BlobServer
from shim.index import codec
from shim.index.merge import TreeMerger
from shim.index.model import Index, Layer
from shim.layers.scan import LayerScanner
from shim.layers.tar import TarWalker
from tests.support import expected, images
from tests.support.compare import compare, report
from tests.support.host import wait_for
from tests.support.ocitar import BLK, CHR, DIR, FIFO, LINK, SYM, Entry, digest, tar
from tests.support.smallimage import CAP_NET_RAW, busybox, noise, text

T = 1_600_000_000_123_456_789
MIB = 1 << 20


def make_index(layers: Sequence[bytes]) -> Index:
    """The index of an image of these plain tars."""
    merger = TreeMerger()
    rows = []
    for number, layer in enumerate(layers):
        walker = TarWalker()
        with LayerScanner(None, 1 << 20, walker.feed) as scanner:
            scanner.feed(layer)
            result = scanner.finish()
        walker.finish()
        merger.apply(walker.entries, number)
        kind = "application/vnd.oci.image.layer.v1.tar"
        rows.append(
            Layer(
                result.digest,
                result.diff_id,
                result.size,
                result.uncompressed_size,
                kind,
                result.compression,
                result.spans,
            )
        )
    return Index("localhost/test:v1", digest(b"manifest"), "linux/amd64", b"{}", rows, merger.finish())


def blob_names(index: Index) -> list[str]:
    return [f"{layer.diff_id[7:]}-{layer.spans.table_digest().hex()[:16]}" for layer in index.layers]


@dataclass
class Portable:
    """A portable tree at `path`, of `index`; `said` is the line it reported."""

    base: Path
    index: Index
    blobs: Path
    names: list[str]
    said: str = ""
    children: list[subprocess.Popen[bytes]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.path = self.base / "tree"
        self.path.mkdir(exist_ok=True)
        self.log = self.base / "log"
        if not (self.base / "index.clip").exists():
            codec.write_index(self.base / "index.clip", self.index)
        self.start()

    def start(self) -> None:
        reader, writer = os.pipe()
        command = [sys.executable, "-m", "shim.tree.portable", "--index", str(self.base / "index.clip")]
        command += ["--blobs", str(self.blobs), "--names", ",".join(self.names), "--ready-fd", str(writer)]
        with open(self.log, "ab") as log:
            self.process = subprocess.Popen([*command, str(self.path)], pass_fds=[writer], stdout=log, stderr=log)
        os.close(writer)
        with os.fdopen(reader, "rb") as pipe:
            self.said = pipe.read().decode()

    def python(self, script: str, *args: object) -> subprocess.Popen[bytes]:
        """Run Python in another process, `path` being the tree."""
        head = f"import os, sys, signal, time\npath = {str(self.path)!r}\n"
        command = [sys.executable, "-c", head + script, *map(str, args)]
        self.children.append(subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT))
        return self.children[-1]

    def unmount(self) -> None:
        subprocess.run(["umount", str(self.path)], check=True, timeout=30)

    def close(self) -> None:
        for child in self.children:
            child.kill()
            child.communicate()
        if os.path.ismount(self.path) or self.process.poll() is None:
            subprocess.run(["umount", "-l", str(self.path)], capture_output=True, timeout=30)
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


Show = Callable[..., Portable]


@pytest.fixture
def show(disk_path: Path) -> Iterator[Show]:
    shown: list[Portable] = []

    def mount(layers: Sequence[bytes], blobs: Path | None = None, names: list[str] | None = None) -> Portable:
        base = disk_path / str(len(shown))
        base.mkdir()
        index = make_index(layers)
        if blobs is None:
            blobs = base / "blobs"
            blobs.mkdir()
            for name, layer in zip(blob_names(index), layers, strict=True):
                (blobs / name).write_bytes(layer + bytes(-len(layer) % 512))
        shown.append(Portable(base, index, blobs, names if names is not None else blob_names(index)))
        return shown[-1]

    yield mount
    for tree in shown:
        tree.close()


def failure(call: Callable[..., object], *args: object, **more: object) -> int:
    """The errno a call fails with, 0 if it does not."""
    try:
        call(*args, **more)
    except OSError as error:
        return error.errno or -1
    return 0


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


# --- slow and failing layers ----------------------------------------------------------------------------------------


class GateBlob:
    """A layer's blob, of which everything from `held` on is not there until `gate` opens (or `broken` says why)."""

    def __init__(self, node_id: int, name: str, data: bytes, held: int) -> None:
        self.node_id = node_id
        self.name = name.encode()
        self.data = data + bytes(-len(data) % 512)
        self.size = len(self.data)
        self.held = held
        self.gate = threading.Event()
        self.broken = ""
        self.data_fd = -1
        self.epoch = 0

    def stamp(self, *_: int) -> int:
        return -1

    def read_cached(self, offset: int, size: int) -> bytes | None:
        return self.data[offset : offset + size] if offset + size <= self.held or self.gate.is_set() else None

    def read_missing(self, offset: int, size: int, done: Done) -> None:
        def wait() -> None:
            self.gate.wait()
            done(RegistryError(self.broken) if self.broken else self.data[offset : offset + size])

        threading.Thread(target=wait, daemon=True).start()

    def trouble(self) -> str:
        return ""


@dataclass
class Stalled:
    tree: Portable
    blob: GateBlob
    server: BlobServer
    data: bytes

    def wait_parked(self, count: int) -> None:
        wait_for(f"{count} reads to wait", lambda: len(self.server.waiting()) >= count)


@pytest.fixture
def stalled(show: Show, disk_path: Path) -> Iterator[Stalled]:
    """A tree of one layer: `quick` can be read, `slow/N` cannot until the gate opens."""
    data = noise(7, 300_000)
    files = [Entry(b"quick", data=data), Entry(b"filler", data=bytes(4 * MIB))]
    layer = tar([*files, *(Entry(b"slow/%02d" % n, data=data) for n in range(30))])
    mounted = disk_path / "served"
    mounted.mkdir()
    fd = connection.mount(mounted)
    server = BlobServer(fd, None, Journal(disk_path / "journal", fresh=True))
    (name,) = blob_names(make_index([layer]))
    blob = GateBlob(server.node_id(name.encode()), name, layer, 4 * MIB)
    server.add(blob)
    server.start()
    tree = show([layer], blobs=mounted)
    assert tree.said == "READY\n"
    yield Stalled(tree, blob, server, data)
    blob.gate.set()
    tree.close()
    subprocess.run(["umount", str(mounted)], check=True, timeout=30)
    server.stop()
    os.close(fd)


READ = "sys.stdout.buffer.write(open(os.path.join(path, sys.argv[1]), 'rb').read())"


DIRECT = """
import mmap
fd = os.open(os.path.join(path, sys.argv[1]), os.O_RDONLY | os.O_DIRECT)
os.preadv(fd, [mmap.mmap(-1, 4096)], 0)
"""


@pytest.mark.parametrize("script", [READ, DIRECT], ids=["cached", "direct"])
def test_a_killed_reader_of_a_stalled_layer_dies_at_once(stalled: Stalled, script: str) -> None:
    """The kernel lets go of a reader that waits for read-ahead; one that waits for its own request needs us."""
    victim = stalled.tree.python(script, "slow/00")
    stalled.wait_parked(1)
    patient = stalled.tree.python(READ, "slow/00")
    victim.kill()
    victim.communicate(timeout=5)  # it does not hang on the layer
    assert victim.returncode == -signal.SIGKILL
    assert patient.poll() is None
    stalled.blob.gate.set()
    assert patient.communicate(timeout=20)[0] == stalled.data


def test_stalled_reads_hold_up_no_others(stalled: Stalled) -> None:
    waiting = [stalled.tree.python(READ, f"slow/{n:02}") for n in range(25)]
    stalled.wait_parked(20)
    quick = stalled.tree.python(READ, "quick")
    assert quick.communicate(timeout=20)[0] == stalled.data
    listing = stalled.tree.python("print(len(os.listdir(path + '/slow')), os.stat(path + '/slow/29').st_size)")
    assert listing.communicate(timeout=20)[0].split() == [b"30", b"300000"]
    stalled.blob.gate.set()
    assert all(child.communicate(timeout=20)[0] == stalled.data for child in waiting)


def test_a_program_that_takes_signals_sees_no_error(stalled: Stalled) -> None:
    script = (
        "caught = 0\n"
        "def catch(*_):\n global caught\n caught += 1\n"
        "signal.signal(signal.SIGALRM, catch)\n"
        "signal.setitimer(signal.ITIMER_REAL, 0.05, 0.05)\n"
        "print('go', flush=True)\n"
        "data = open(path + '/slow/03', 'rb').read()\n"
        "signal.setitimer(signal.ITIMER_REAL, 0)\n"
        "import hashlib\nprint(hashlib.sha256(data).hexdigest(), caught)\n"
    )
    child = stalled.tree.python(script)
    stalled.wait_parked(1)
    timer = threading.Timer(1.0, stalled.blob.gate.set)  # several signals come meanwhile
    timer.start()
    out = child.communicate(timeout=20)[0].split()
    timer.join()
    assert out[:2] == [b"go", digest(stalled.data)[7:].encode()]
    assert int(out[2]) >= 1


def test_a_failed_read_is_eio_and_one_line_that_names_the_file(stalled: Stalled) -> None:
    stalled.blob.broken = "registry.example: gone"
    stalled.blob.gate.set()
    stalled.blob.read_cached = lambda *_: None  # type: ignore[method-assign]
    child = stalled.tree.python(
        "fd = os.open(path + '/slow/09', os.O_RDONLY)\n"
        "try:\n os.pread(fd, 100, 0)\nexcept OSError as error:\n print(error.errno)"
    )
    assert child.communicate(timeout=20)[0].split() == [str(errno.EIO).encode()]
    lines = [json.loads(line) for line in stalled.tree.log.read_text().splitlines()]
    assert {line["file"] for line in lines} == {"/slow/09"}
    assert {line["event"] for line in lines} == {"read failed"}
