"""The portable FUSE tree over layers that are slow or fail: nobody else waits, the killed die, errors are said."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from shim.errors import RegistryError
from shim.fuse import connection
from shim.fuse.blob import Done
from shim.fuse.journal import Journal
from shim.fuse.server import BlobServer
from tests.support.host import wait_for
from tests.support.ocitar import Entry, digest, tar
from tests.support.portable import Portable, Show, blob_names, make_index, showing
from tests.support.smallimage import noise

MIB = 1 << 20


@pytest.fixture
def show(disk_path: Path) -> Iterator[Show]:
    yield from showing(disk_path)


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
