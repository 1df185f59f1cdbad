"""Blob files on a real FUSE mount, served in this process."""

from __future__ import annotations

import os
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
from shim.fuse import connection
from shim.fuse.blob import ReadFailure
from shim.fuse.journal import Journal
from shim.fuse.server import BlobServer
from tests.support.lazylayers import SampleLayer, Source

RUN = Path(__file__).resolve().parents[2]

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
