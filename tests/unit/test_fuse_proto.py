"""The FUSE protocol's bytes: sizes as in <linux/fuse.h>, INIT, listings, the journal, the look at pending signals."""

from __future__ import annotations

import errno
import os
import random
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from queue import SimpleQueue

import pytest

from shim import log
from shim.errors import DaemonError
from shim.fuse import proto
from shim.fuse.blob import Done
from shim.fuse.journal import FIRST_NODE, Journal
from shim.fuse.requests import kill_pending
from shim.fuse.server import BlobServer

OFFERED = proto.ASYNC_READ | proto.PARALLEL_DIROPS | proto.MAX_PAGES | proto.INIT_EXT | 1 << 3 | 1 << 17


def init_body(major: int = 7, minor: int = 45, flags: int = OFFERED | proto.HAS_RESEND) -> memoryview:
    return memoryview(proto.INIT_IN_EXT.pack(major, minor, 131072, flags & 0xFFFFFFFF, flags >> 32))


def test_structures_have_the_kernel_s_sizes() -> None:
    header = Path("/usr/include/linux/fuse.h")
    sizes = {
        "fuse_in_header": proto.IN_HEADER.size,
        "fuse_out_header": proto.OUT_HEADER.size,
        "fuse_init_in": proto.INIT_IN_EXT.size,
        "fuse_init_out": proto.INIT_OUT.size,
        "fuse_read_in": proto.READ_IN.size + 16,
        "fuse_open_out": proto.OPEN_OUT.size,
        "fuse_release_in": proto.RELEASE_IN.size + 16,
        "fuse_attr": proto.ATTR.size,
        "fuse_attr_out": proto.ATTR_OUT.size + proto.ATTR.size,
        "fuse_entry_out": proto.ENTRY_OUT.size + proto.ATTR.size,
        "fuse_statfs_out": proto.STATFS_OUT.size,
        "fuse_dirent": proto.DIRENT.size,
    }
    known = {"fuse_in_header": 40, "fuse_out_header": 16, "fuse_init_in": 64, "fuse_init_out": 64, "fuse_read_in": 40}
    known |= {"fuse_open_out": 16, "fuse_release_in": 24, "fuse_attr": 88, "fuse_attr_out": 104, "fuse_entry_out": 128}
    known |= {"fuse_statfs_out": 80, "fuse_dirent": 24}
    assert sizes == known
    if header.exists():
        text = header.read_text()
        assert all(f"struct {name} {{" in text for name in sizes)


def test_init_takes_what_is_known_and_no_more() -> None:
    state = proto.negotiate(init_body())
    assert (state.major, state.minor) == (7, proto.MINOR)
    assert state.flags == (OFFERED & ~(1 << 3 | 1 << 17)) | proto.HAS_RESEND
    assert state.can_resend
    assert not proto.negotiate(init_body(flags=OFFERED)).can_resend
    assert proto.negotiate(init_body(minor=31)).minor == 31
    assert proto.InitState.from_json(state.to_json()) == state
    reply = proto.INIT_OUT.unpack(proto.init_out(state))
    assert reply[9] == 0
    assert reply[8] == 256  # pages in a read: 1 MiB


@pytest.mark.parametrize("body", [init_body(minor=30), init_body(major=8), init_body(major=6), init_body()[:15]])
def test_init_refuses_what_it_does_not_speak(body: memoryview) -> None:
    with pytest.raises(proto.ProtocolError):
        proto.negotiate(body)


def test_a_listing_can_be_read_in_pieces() -> None:
    entries = [(FIRST_NODE + i, b"n" * (i % 9 + 1)) for i in range(50)]
    after, names = 0, []
    while True:
        data = proto.dirents(entries, after, 100)
        if not data:
            break
        assert len(data) <= 100
        position = 0
        while position < len(data):
            _, after, length, _ = proto.DIRENT.unpack_from(data, position)
            start = position + proto.DIRENT.size
            names.append(data[start : start + length])
            position = start + (length + 7) // 8 * 8
    assert names == [b".", b"..", *(name for _, name in entries)]


def test_the_journal_tells_a_successor_everything(tmp_path: Path) -> None:
    path = tmp_path / "blobs.journal"
    state = proto.negotiate(init_body())
    journal = Journal(path, fresh=True)
    journal.record_init(state)
    first, second = journal.allocate(b"aa"), journal.allocate(b"bb")
    assert first != second
    journal.add_node(first, b"aa", 1024)
    journal.add_node(second, b"bb", 2048)
    assert journal.allocate(b"aa") == first
    for handle in (100, 102, 104):
        journal.opened(handle, first)
    journal.opened(100, first)  # delivered twice
    journal.closed(102)
    journal.closed(102)
    journal.remove_node(second)
    journal.close()
    with open(path, "ab") as file:
        file.write(b'{"open": 999, "no')  # killed in the middle of a line
    for _ in range(2):  # loading rewrites it: the second time must say the same
        journal = Journal(path, fresh=False)
        assert journal.init == state
        assert journal.nodes == {first: (b"aa", 1024)}
        assert journal.opens == {100: first, 104: first}
        assert journal.open_count(first) == 2
        assert journal.allocate(b"bb") > second  # an id is never given to another name
        journal.close()
    assert Journal(path, fresh=True).nodes == {}


def test_the_journal_stays_small(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "j", fresh=True)
    journal.add_node(FIRST_NODE, b"a", 512)
    for handle in range(12_000):
        journal.opened(handle, FIRST_NODE)
        journal.closed(handle)
    assert (tmp_path / "j").stat().st_size < 700_000
    journal.close()
    assert Journal(tmp_path / "j", fresh=False).opens == {}


@pytest.mark.parametrize(
    "text", [b"", b"{}\n", b'{"v": 2, "next": 16}\n', b"junk\n", b'{"v":1,"next":16}\n{"open":"x"}\n']
)
def test_a_damaged_journal_is_an_error_not_a_guess(tmp_path: Path, text: bytes) -> None:
    (tmp_path / "j").write_bytes(text)
    with pytest.raises(DaemonError):
        Journal(tmp_path / "j", fresh=False)


def test_only_a_pending_sigkill_counts() -> None:
    child = subprocess.Popen(
        [sys.executable, "-c", "import signal; signal.pthread_sigmask(0, [10]); print(1, flush=True); signal.pause()"],
        stdout=subprocess.PIPE,
    )
    try:
        assert child.stdout is not None
        child.stdout.readline()
        assert not kill_pending(child.pid)
        os.kill(child.pid, signal.SIGUSR1)  # blocked, so it stays pending
        status = Path(f"/proc/{child.pid}/status").read_text()
        assert "ShdPnd:\t0000000000000200" in status
        assert not kill_pending(child.pid)
    finally:
        child.kill()
        child.wait()
    assert not kill_pending(child.pid)
    assert not kill_pending(0)


@pytest.fixture
def kernel(tmp_path: Path) -> Iterator[tuple[socket.socket, BlobServer]]:
    """A server whose "kernel" is the other end of a socket pair, which may send what it likes."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    ours.settimeout(10)
    server = BlobServer(theirs.fileno(), None, Journal(tmp_path / "j", fresh=True), read_deadline=5)
    server.start()
    yield ours, server
    server.stop()
    ours.close()
    theirs.close()


def request(opcode: int, unique: int, body: bytes = b"", node: int = proto.ROOT_ID) -> bytes:
    return proto.IN_HEADER.pack(proto.IN_HEADER.size + len(body), opcode, unique, node, 0, 0, 0, 0, 0) + body


def test_requests_that_make_no_sense_are_answered_and_end_nothing(
    kernel: tuple[socket.socket, BlobServer], monkeypatch: pytest.MonkeyPatch
) -> None:
    ours, server = kernel
    lines: list[str] = []
    for level in ("error", "exception"):
        monkeypatch.setattr(log, level, lambda event, **_: lines.append(event))
    ours.send(request(proto.INIT, 2, bytes(init_body())))
    assert len(ours.recv(4096)) == proto.OUT_HEADER.size + proto.INIT_OUT.size
    assert server.init is not None
    ours.send(b"short")  # no header: nobody to answer
    rng = random.Random(7)
    unanswered = (proto.FORGET, proto.BATCH_FORGET, proto.INTERRUPT)
    opcodes = [*range(60), 4096, 1 << 20, (1 << 32) - 1]
    for unique, opcode in enumerate(opcodes * 3, start=10):
        ours.send(
            request(opcode, unique, rng.randbytes(rng.choice((0, 1, 7, 39, 300))), rng.choice((0, 1, 16, 1 << 63)))
        )
        if opcode not in unanswered:
            length, error, answered = proto.OUT_HEADER.unpack_from(answer := ours.recv(1 << 20))
            assert answered == unique
            assert length == len(answer)
            assert -134 <= error <= 0
    ours.send(request(proto.LOOKUP, 5, b"nothing\0"))
    assert proto.OUT_HEADER.unpack(ours.recv(4096)) == (16, -errno.ENOENT, 5)
    ours.send(request(51, 6))
    assert proto.OUT_HEADER.unpack(ours.recv(4096)) == (16, -errno.ENOSYS, 6)
    ours.send(request(proto.RELEASE, 8, b"1234"))
    assert proto.OUT_HEADER.unpack(ours.recv(4096)) == (16, -errno.EINVAL, 8)
    assert set(lines) <= {"cannot serve this kernel"}


class BrokenBlob:
    """A blob whose methods raise what they must not."""

    node_id, name, size, data_fd, epoch = FIRST_NODE, b"broken", 1 << 20, -1, 0

    def stamp(self, offset: int, _size: int) -> int:
        if offset == 0:
            raise ZeroDivisionError
        return -1 if offset > 8192 else 0  # 0: read from a descriptor that is none

    def read_cached(self, _offset: int, _size: int) -> bytes | None:
        return None

    def read_missing(self, offset: int, _size: int, done: Done) -> None:
        if offset == 16384:
            raise DaemonError("out of threads")
        done(b"too short")

    def trouble(self) -> str:
        return ""


def test_a_blob_that_misbehaves_gives_eio(
    kernel: tuple[socket.socket, BlobServer], monkeypatch: pytest.MonkeyPatch
) -> None:
    ours, server = kernel
    lines: SimpleQueue[str] = SimpleQueue()  # written after the answer, by whichever thread gave it
    for level in ("error", "exception"):
        monkeypatch.setattr(log, level, lambda event, **fields: lines.put(str(fields.get("cause", event))))
    server.add(BrokenBlob())
    expected = {
        0: "a FUSE request failed",
        4096: "9 bytes came instead of 4096",
        12288: "9 bytes came instead of 4096",
        16384: "out of threads",
    }
    for unique, (offset, line) in enumerate(expected.items()):
        body = proto.READ_IN.pack(1, offset, 4096, 0) + bytes(16)
        ours.send(request(proto.READ, unique, body, FIRST_NODE))
        assert proto.OUT_HEADER.unpack(ours.recv(4096)) == (16, -errno.EIO, unique)
        assert lines.get(timeout=10) == line


class PunchedBlob(BrokenBlob):
    """Bytes are taken away while they are read: what was read must not go out."""

    name = b"punched"

    def __init__(self, path: Path) -> None:
        path.write_bytes(bytes(1 << 20))
        self.data_fd = os.open(path, os.O_RDONLY)
        self.reads = 0

    def stamp(self, _offset: int, _size: int) -> int:
        return 4

    @property
    def epoch(self) -> int:  # type: ignore[override]
        self.reads += 1
        return 5

    def read_missing(self, _offset: int, size: int, done: Done) -> None:
        done(b"R" * size)


def test_bytes_that_were_taken_away_while_they_were_read_are_read_again(
    kernel: tuple[socket.socket, BlobServer], tmp_path: Path
) -> None:
    ours, server = kernel
    blob = PunchedBlob(tmp_path / "data")
    server.add(blob)
    ours.send(request(proto.READ, 2, proto.READ_IN.pack(1, 0, 4096, 0) + bytes(16), FIRST_NODE))
    assert ours.recv(8192)[16:] == b"R" * 4096
    assert blob.reads == 1
    os.close(blob.data_fd)
