"""Blob files on a real FUSE mount: bytes, kills, signals, stalls, deadlines."""

from __future__ import annotations

import signal
import threading
import time

import pytest

from shim.errors import RegistryError
from shim.index.model import Compression
from tests.support.blobmount import READ_ONE, Make, direct_io, make
from tests.support.lazylayers import sample_layer

__all__ = ["direct_io", "make"]

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
