"""Blob files on a real FUSE mount, served in this process and read from others."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from shim.cache.fetch import LazyLayer
from shim.cache.pool import FetchPool
from shim.cache.store import LayerCache
from shim.errors import DaemonError, RegistryError
from shim.fuse import connection
from shim.fuse.blob import ReadFailure
from shim.fuse.journal import Journal
from shim.fuse.server import BlobServer
from shim.index.model import Compression
from tests.support.lazylayers import SampleLayer, Source, sample_layer

RUN = Path(__file__).resolve().parents[2]


@dataclass
class Mount:
    """A served mount. `read` and `spawn` run Python in another process, `path` being the mount."""

    path: Path
    state: Path
    direct_io: bool
    deadline: float
    failures: list[ReadFailure] = field(default_factory=list)
    unmounted: threading.Event = field(default_factory=threading.Event)
    children: list[subprocess.Popen[bytes]] = field(default_factory=list)
    sources: list[Source] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.fd = connection.mount(self.path)
        self.cache = LayerCache(self.state / "cache")
        self.pool = FetchPool(8)
        self.server = self.make_server(None, Journal(self.state / "journal", fresh=True))
        self.server.start()

    def make_server(self, init: object, journal: Journal) -> BlobServer:
        return BlobServer(
            self.fd,
            init,  # type: ignore[arg-type]
            journal,
            read_deadline=self.deadline,
            direct_io=self.direct_io,
            on_failure=self.failures.append,
            on_unmounted=self.unmounted.set,
        )

    def add(self, sample: SampleLayer, name: bytes, *, readahead: int = 1 << 20) -> tuple[LazyLayer, Source]:
        source = Source(sample)
        self.sources.append(source)
        lazy = LazyLayer(
            node_id=self.server.node_id(name),
            name=name,
            compression=sample.compression,
            cached=self.cache.layer(sample.diff_id, sample.spans),
            open_range=source.open_range,
            pool=self.pool,
            source="registry.test",
            readahead=readahead,
            read_deadline=self.deadline,
        )
        self.server.add(lazy)
        return lazy, source

    def spawn(self, script: str, *args: object) -> subprocess.Popen[bytes]:
        """Start a reader; it prints a line when it is about to read."""
        head = "import os, sys, signal, time, random, errno\npath = sys.argv[1]\n"
        command = [sys.executable, "-c", head + script, str(self.path), *(str(arg) for arg in args)]
        child = subprocess.Popen(command, cwd=RUN, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        self.children.append(child)
        return child

    def run(self, script: str, *args: object, timeout: float = 60) -> str:
        child = self.spawn(script, *args)
        out, err = child.communicate(timeout=timeout)
        assert child.returncode == 0, err.decode()
        return out.decode()

    def wait_parked(self, count: int = 1) -> None:
        until = time.monotonic() + 20
        while len(self.server.waiting()) < count:
            assert time.monotonic() < until, "no read came to wait"

    def close(self) -> None:
        for source in self.sources:
            source.gate.set()
        for child in self.children:
            if child.poll() is None:
                child.kill()
            child.communicate()
        if not self.unmounted.is_set():
            subprocess.run(["umount", str(self.path)], check=True, timeout=30)
        self.server.stop()
        os.close(self.fd)
        self.pool.close()
        self.cache.close()


Make = Callable[..., Mount]


@pytest.fixture(params=[False, True], ids=["page-cache", "direct"])
def direct_io(request: pytest.FixtureRequest) -> bool:
    return bool(request.param)


@pytest.fixture
def make(disk_path: Path) -> Iterator[Make]:
    made: list[Mount] = []

    def build(*, direct_io: bool = False, deadline: float = 60.0) -> Mount:
        state = disk_path / str(len(made))
        (state / "blobs").mkdir(parents=True)
        made.append(Mount(state / "blobs", state, direct_io, deadline))
        return made[-1]

    yield build
    for mount in made:
        mount.close()


COMPARE = """
sys.path.insert(0, os.getcwd())
from tests.support.lazylayers import sample_bytes
seed, size, name = int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
want = sample_bytes(size, seed)
fd = os.open(os.path.join(path, name), os.O_RDONLY)
assert os.fstat(fd).st_size == (size + 511) // 512 * 512, os.fstat(fd)
rng = random.Random(os.getpid())
for _ in range(80):
    length = rng.choice((1, 512, 4096, 100_000, 1 << 20))
    offset = rng.randrange(0, size)
    got = os.pread(fd, length, offset)
    assert got == want[offset:offset + length].ljust(len(got), b"\\0"), (offset, length)
    assert len(got) == min(length, os.fstat(fd).st_size - offset)
"""


def test_every_byte_is_right_for_many_processes(make: Make, direct_io: bool) -> None:
    mount = make(direct_io=direct_io)
    size = 6_000_001
    kinds = [(Compression.GZIP, True, 1), (Compression.ZSTD, False, 2), (Compression.NONE, True, 3)]
    for compression, points, seed in kinds:
        mount.add(sample_layer(size, compression, seed=seed, points=points), b"layer%d" % seed)
    readers = [mount.spawn(COMPARE, seed, size, f"layer{seed}") for _, _, seed in kinds for _ in range(2)]
    for reader in readers:
        _, err = reader.communicate(timeout=90)
        assert reader.returncode == 0, err.decode()
    assert mount.failures == []
    assert mount.server.waiting() == []


READ_ONE = """
fd = os.open(os.path.join(path, "a"), os.O_RDONLY)
print("reading", flush=True)
start = time.monotonic()
try:
    data = os.pread(fd, 4096, int(sys.argv[2]))
    print(len(data), data[:8].hex())
except OSError as error:
    print(errno.errorcode[error.errno], round(time.monotonic() - start, 2))
"""


@pytest.mark.parametrize("threaded", [False, True])
def test_sigkill_ends_a_reader_of_a_stalled_layer_at_once(make: Make, direct_io: bool, threaded: bool) -> None:
    mount = make(direct_io=direct_io)
    _, source = mount.add(sample_layer(), b"a")
    source.gate.clear()
    script = READ_ONE
    if threaded:
        script = "import threading\ndef main():\n" + "".join(f"    {line}\n" for line in READ_ONE.split("\n"))
        script += "thread = threading.Thread(target=main)\nthread.start()\nthread.join()\n"
    reader = mount.spawn(script, 0)
    mount.wait_parked()
    other = mount.spawn(READ_ONE, 100)  # wants the same page
    assert other.stdout is not None
    other.stdout.readline()
    start = time.monotonic()
    reader.kill()
    assert reader.wait(10) == -signal.SIGKILL
    assert time.monotonic() - start < 1
    assert other.poll() is None
    source.gate.set()  # the fetch went on; the other reader gets the right bytes
    out, _ = other.communicate(timeout=20)
    assert out.decode().split() == ["4096", sample_layer().data[100:108].hex()]
    assert mount.failures == []


def test_a_signal_that_came_first_does_not_save_a_reader_from_sigkill(make: Make) -> None:
    """The second signal makes no INTERRUPT of its own: the regular look finds it."""
    mount = make(direct_io=True)
    _, source = mount.add(sample_layer(), b"a")
    source.gate.clear()
    reader = mount.spawn("signal.signal(signal.SIGUSR1, lambda *_: None)\n" + READ_ONE, 0)
    mount.wait_parked()
    reader.send_signal(signal.SIGUSR1)
    time.sleep(0.3)  # let that INTERRUPT be looked at; too short only makes the test easier
    assert reader.poll() is None
    assert len(mount.server.waiting()) == 1
    start = time.monotonic()
    reader.kill()
    assert reader.wait(10) == -signal.SIGKILL
    assert time.monotonic() - start < 1


ALARMS = (
    """
import ctypes
libc = ctypes.CDLL(None, use_errno=True)
libc.pread.restype = ctypes.c_ssize_t
def pread(fd, length, offset):  # os.pread would try again after EINTR by itself
    data = ctypes.create_string_buffer(length)
    count = libc.pread(fd, data, ctypes.c_size_t(length), ctypes.c_int64(offset))
    assert count >= 0, errno.errorcode[ctypes.get_errno()]
    return data.raw[:count]
os.pread = pread
hits = []
signal.signal(signal.SIGALRM, lambda *_: hits.append(1))
signal.setitimer(signal.ITIMER_REAL, 0.01, 0.01)
"""
    + COMPARE.replace("range(80)", "range(40)")
    + """
signal.setitimer(signal.ITIMER_REAL, 0)
print(len(hits))
"""
)


def test_a_program_that_takes_signals_sees_no_error(make: Make, direct_io: bool) -> None:
    mount = make(direct_io=direct_io)
    sample = sample_layer(3_000_000)
    _, source = mount.add(sample, b"a")
    pace = threading.Event()

    def slowly(chunk: bytes) -> bytes:
        pace.wait(0.03)
        return chunk

    source.change = slowly
    assert int(mount.run(ALARMS, 1, 3_000_000, "a")) > 5
    assert mount.failures == []


MEASURE = """
fd = os.open(os.path.join(path, "hot"), os.O_RDONLY)
os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_RANDOM)
rng = random.Random(1)
times = []
for _ in range(400):
    offset = rng.randrange(0, 7 << 20) & ~4095
    os.posix_fadvise(fd, offset, 4096, os.POSIX_FADV_DONTNEED)
    start = time.perf_counter()
    assert os.pread(fd, 4096, offset)
    times.append(time.perf_counter() - start)
times.sort()
print(times[len(times) // 2], times[len(times) * 99 // 100])
"""

STALLED = """
fd = os.open(os.path.join(path, "cold"), os.O_RDONLY)
import threading
def read(offset):
    os.pread(fd, 1 << 20, offset)
for i in range(40):
    threading.Thread(target=read, args=(i * 100_000,), daemon=True).start()
time.sleep(60)
"""


def test_hits_stay_fast_while_another_layer_stalls(make: Make, direct_io: bool) -> None:
    mount = make(direct_io=direct_io)
    mount.add(sample_layer(seed=1), b"hot")
    _, stalled = mount.add(sample_layer(seed=2), b"cold")
    mount.run("open(path + '/hot', 'rb', buffering=0).read()")
    stalled.gate.clear()
    mount.spawn(STALLED)
    mount.wait_parked(20)
    median, high = (float(word) for word in mount.run(MEASURE).split())
    assert len(mount.server.waiting()) >= 20
    assert median < 0.01
    assert high < 0.1
    third, _ = mount.add(sample_layer(seed=3), b"third")  # and a miss of another layer gets through
    assert mount.run("print(len(open(path + '/third', 'rb', buffering=0).read(4096)))").strip() == "4096"
    assert third.stats().demand >= 1


def test_a_read_has_a_deadline(make: Make, direct_io: bool) -> None:
    mount = make(direct_io=direct_io, deadline=1.0)
    _, source = mount.add(sample_layer(), b"a", readahead=0)

    def refuse(*_: int) -> None:
        raise RegistryError("connection to 192.0.2.1 timed out", retryable=True)

    source.before = refuse
    line = mount.run(READ_ONE, 0).splitlines()[1].split()
    assert line[0] == "EIO"
    assert float(line[1]) < 4
    until = time.monotonic() + 10
    while not mount.failures:  # told after the answer
        assert time.monotonic() < until
    assert {(failure.blob, failure.offset) for failure in mount.failures} == {("a", 0)}
    assert len(mount.failures) <= (1 if direct_io else 2)
    assert "192.0.2.1" in mount.failures[0].cause
    source.before = lambda *_: None
    assert mount.run(READ_ONE, 0).splitlines()[1].split()[0] == "4096"


def test_status_names_those_who_wait(make: Make) -> None:
    mount = make(direct_io=True)
    _, source = mount.add(sample_layer(), b"a")
    source.gate.clear()
    reader = mount.spawn(READ_ONE, 8192)
    mount.wait_parked()
    (waiting,) = mount.server.waiting()
    assert (waiting.pid, waiting.blob, waiting.offset, waiting.size) == (reader.pid, "a", 8192, 4096)
    assert waiting.age >= 0
    assert waiting.trouble == "registry.test: no bytes came yet"
    source.gate.set()
    reader.communicate(timeout=20)
    assert mount.server.waiting() == []


def test_opens_and_releases_are_journalled(make: Make) -> None:
    mount = make()
    lazy, _ = mount.add(sample_layer(), b"a")
    holder = mount.spawn("files = [open(path + '/a', 'rb') for _ in range(3)]\nprint(1, flush=True)\nsys.stdin.read()")
    assert holder.stdout is not None
    holder.stdout.readline()
    assert mount.server.open_count(lazy.node_id) == 3
    assert not mount.server.remove(lazy.node_id)
    copy = mount.state / "copy"
    copy.write_bytes((mount.state / "journal").read_bytes())
    journal = Journal(copy, fresh=False)
    assert journal.nodes == {lazy.node_id: (b"a", lazy.size)}
    assert list(journal.opens.values()) == [lazy.node_id] * 3
    assert journal.init == mount.server.init
    journal.close()
    holder.kill()
    holder.wait()
    until = time.monotonic() + 10
    while mount.server.open_count(lazy.node_id):
        assert time.monotonic() < until
    records = [json.loads(line) for line in (mount.state / "journal").read_text().splitlines()]
    assert sum("close" in record for record in records) == 3
    assert mount.server.remove(lazy.node_id)


def test_a_blob_comes_goes_and_comes_again(make: Make) -> None:
    mount = make()
    look = """
try:
    print(os.stat(path + "/a").st_size, len(open(path + "/a", "rb").read(10)), sorted(os.listdir(path)))
except OSError as error:
    print(errno.errorcode[error.errno])
"""
    assert mount.run(look).strip() == "ENOENT"
    lazy, _ = mount.add(sample_layer(), b"a")
    assert mount.run(look).split() == [str(lazy.size), "10", "['a']"]
    with pytest.raises(DaemonError):
        mount.server.add(lazy)
    until = time.monotonic() + 10
    while not mount.server.remove(lazy.node_id):
        assert time.monotonic() < until
    lazy.close()
    mount.cache.close_layer(lazy.cached)
    assert mount.run("print(os.listdir(path))").strip() == "[]"
    again, _ = mount.add(sample_layer(), b"a")
    assert again.node_id != lazy.node_id
    # the kernel has forgotten the old node; mounts open an O_PATH descriptor, which looks nothing up again
    by_descriptor = "fd = os.open(path + '/a', os.O_PATH)\nprint(len(open(f'/proc/self/fd/{fd}', 'rb').read(10)))"
    assert mount.run(by_descriptor).strip() == "10"
    assert mount.run(look).split() == [str(lazy.size), "10", "['a']"]


def test_the_server_survives_whatever_programs_ask(make: Make) -> None:
    mount = make()
    mount.add(sample_layer(), b"a")
    script = """
import ctypes, fcntl, mmap
name = path + "/a"
def fails(code, call, *args):
    try:
        call(*args)
    except OSError as error:
        assert error.errno in code, (call, error)
    else:
        assert False, call
fails((errno.EROFS,), os.mkdir, path + "/d")
fails((errno.EROFS,), os.unlink, name)
fails((errno.EROFS,), os.rename, name, path + "/b")
fails((errno.EROFS, errno.EACCES), open, name, "r+b")
fails((errno.EROFS,), os.chmod, name, 0o777)
fails((errno.ENOENT,), os.stat, path + "/nothing")
fails((errno.ENOENT,), os.stat, path + "/" + "n" * 255)
fails((errno.ENOTDIR,), os.listdir, name)
fails((errno.ENOTSUP, errno.ENODATA), os.getxattr, name, "user.x")
fails((errno.ENOTSUP,), os.listxattr, name)
assert os.statvfs(path).f_files == 1
assert os.access(name, os.R_OK) and os.access(path, os.X_OK)
fd = os.open(name, os.O_RDONLY)
assert os.lseek(fd, 0, os.SEEK_DATA) == 0
fails((errno.ENOTTY, errno.ENOSYS), fcntl.ioctl, fd, 0x5401)
fcntl.flock(fd, fcntl.LOCK_SH)
fcntl.lockf(fd, fcntl.LOCK_SH)
os.fsync(fd)
import select
poll = select.poll(); poll.register(fd, select.POLLIN); poll.poll(100)
view = mmap.mmap(fd, 1 << 20, prot=mmap.PROT_READ)
assert view[5000:6000] == os.pread(fd, 1000, 5000)
assert os.pread(fd, 100, os.fstat(fd).st_size) == b""
assert len(os.pread(fd, 100, os.fstat(fd).st_size - 10)) == 10
os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_WILLNEED)
assert os.listdir(path) == ["a"]
dirfd = os.open(path, os.O_RDONLY); os.fsync(dirfd)
assert os.stat(path).st_mode & 0o7777 == 0o500
"""
    mount.run(script)
    assert mount.failures == []


def test_unmounting_ends_the_server(make: Make) -> None:
    mount = make()
    mount.add(sample_layer(), b"a")
    mount.run("open(path + '/a', 'rb').read(10)")
    subprocess.run(["umount", str(mount.path)], check=True, timeout=30)
    assert mount.unmounted.wait(10)


def test_a_successor_serves_the_same_descriptor(make: Make) -> None:
    """Built from descriptor, INIT state and journal: a read that its predecessor left unanswered gets its bytes."""
    mount = make(direct_io=True)
    lazy, source = mount.add(sample_layer(), b"a")
    source.gate.clear()
    reader = mount.spawn(READ_ONE, 4096)
    mount.wait_parked()
    init = mount.server.init
    mount.server.stop()
    journal = Journal(mount.state / "journal", fresh=False)
    assert journal.init == init
    assert list(journal.opens.values()) == [lazy.node_id]
    mount.server = mount.make_server(journal.init, journal)
    assert mount.server.node_id(b"a") == lazy.node_id
    mount.server.add(lazy)
    mount.server.start()
    late = mount.spawn(READ_ONE, 8192)
    assert init is not None
    if init.can_resend:
        mount.server.resend()
    else:
        reader.kill()  # an old kernel never gives that request out again
    source.gate.set()
    out, _ = late.communicate(timeout=20)
    assert out.split()[1] == b"4096"
    out, _ = reader.communicate(timeout=20)
    assert not init.can_resend or out.split()[1:] == [b"4096", sample_layer().data[4096:4104].hex().encode()]
    until = time.monotonic() + 10
    while mount.server.open_count(lazy.node_id):
        assert time.monotonic() < until


def test_mounting_on_nothing_is_a_clear_error(disk_path: Path) -> None:
    from shim.errors import MountError

    with pytest.raises(MountError, match=os.strerror(errno.ENOENT)):
        connection.mount(disk_path / "missing")
