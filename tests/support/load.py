"""Load: many containers at once, many readers of one blob, and how long reads take meanwhile.

    python -m tests.support.load latency BLOB SECONDS [SEED]    times of 4 KiB reads, in ms, as JSON
    python -m tests.support.load readers BLOB COUNT PIECES      COUNT threads read PIECES times 128 KiB each; JSON

Readers are processes of their own: their Python must not be the daemon's, nor the test's. They open the daemon's blob
files with O_DIRECT, so that every read is a request to it.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import mmap
import os
import random
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.support import bundle, leaks
from tests.support.host import Host
from tests.support.images import Image

PIECE = 128 << 10
EVERYTHING = "find / -xdev -type f -links 1 -exec sha256sum {} + | sort | sha256sum"  # not busybox, 270 times
_ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Ended:
    """A container: what it printed, and the seconds from the start of all until it printed its first line and ended."""

    index: Path
    code: int
    output: str
    first: float
    seconds: float


def storm(host: Host, indexes: Sequence[Path], count: int, work: Path) -> list[Ended]:
    """Start `count` containers of the images at once, in turns; each says that it runs, then hashes the files it has.

    Bundles are made before anything starts.
    """
    script = f"echo up; {EVERYTHING}"
    made = [
        bundle.make(work / f"load-{n}", ["sh", "-c", script], index=indexes[n % len(indexes)]) for n in range(count)
    ]
    ended: list[Ended | None] = [None] * count
    oci = [str(word) for word in host.oci]
    barrier = threading.Barrier(count + 1)
    begin = [0.0]

    def start(number: int) -> None:
        path = made[number]
        barrier.wait()
        child = subprocess.Popen(
            [*oci, "run", "--bundle", str(path), path.name], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, text=True, env=host.env,
        )  # fmt: skip
        assert child.stdout is not None
        line = child.stdout.readline()
        first = time.monotonic() - begin[0]
        rest = child.stdout.read()
        code = child.wait()
        output = rest if line == "up\n" else line + rest
        ended[number] = Ended(indexes[number % len(indexes)], code, output, first, time.monotonic() - begin[0])

    threads = [threading.Thread(target=start, args=(n,)) for n in range(count)]
    for thread in threads:
        thread.start()
    begin[0] = time.monotonic()
    barrier.wait()
    for thread in threads:
        thread.join()
    return [item for item in ended if item is not None]


def blob_of(host: Host, diff_id: str) -> Path:
    """The daemon's file of a layer."""
    (name,) = [layer["blob"] for layer in host.status()["layers"] if layer["diff_id"] == diff_id]
    return host.run_dir / "blobs" / str(name)


def layer_row(host: Host, diff_id: str) -> dict[str, Any]:
    """The layer in `status --json`."""
    (row,) = [layer for layer in host.status()["layers"] if layer["diff_id"] == diff_id]
    return dict(row)


def largest(image: Image) -> tuple[str, bytes]:
    """(diff id, uncompressed bytes) of the image's largest layer."""
    layer = max(image.layers, key=lambda blob: blob.size)
    return layer.diff_id, gzip.decompress(layer.path.read_bytes())


def start_reader(*words: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "tests.support.load", *map(str, words)]
    return subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True, cwd=_ROOT)


def result(child: subprocess.Popen[str], timeout: float = 120) -> Any:
    out, _ = child.communicate(timeout=timeout)
    assert child.returncode == 0
    return json.loads(out)


def percentile(times: Sequence[float], share: float) -> float:
    """times: sorted."""
    return times[min(len(times) - 1, int(len(times) * share))]


@contextmanager
def busy(count: int) -> Iterator[None]:
    """`count` processes that do nothing but use a CPU."""
    mark = {**os.environ, leaks.MARK: os.environ.get(leaks.MARK, "x")}
    children = [subprocess.Popen(["sh", "-c", "while :; do :; done"], env=mark) for _ in range(count)]
    try:
        yield
    finally:
        for child in children:
            child.kill()
            child.wait()


@contextmanager
def little_memory(pid: int, limit: int) -> Iterator[bool]:
    """A process in a memory cgroup of `limit` bytes, page cache included. False where there is no such controller."""
    for root, name in (
        (Path("/sys/fs/cgroup/memory"), "memory.limit_in_bytes"),
        (Path("/sys/fs/cgroup"), "memory.max"),
    ):
        group = root / f"clip-test-{os.getpid()}"
        try:
            group.mkdir()
        except OSError:
            continue
        try:
            if not (group / name).exists():
                continue
            (group / name).write_text(str(limit))
            (group / "cgroup.procs").write_text(str(pid))
            yield True
            (root / "cgroup.procs").write_text(str(pid))
            return
        finally:
            group.rmdir()
    yield False


def _aligned(size: int) -> mmap.mmap:
    return mmap.mmap(-1, size)  # page-aligned, as O_DIRECT wants it


def _latency(blob: str, seconds: float, seed: int) -> list[float]:
    fd = os.open(blob, os.O_RDONLY | os.O_DIRECT)
    pages = os.fstat(fd).st_size // 4096
    buffer, rng, times = _aligned(4096), random.Random(seed), []
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        offset = rng.randrange(pages) * 4096
        begin = time.perf_counter()
        os.preadv(fd, [buffer], offset)
        times.append((time.perf_counter() - begin) * 1000)
    return sorted(times)


def _readers(blob: str, count: int, pieces: int) -> dict[str, Any]:
    """Every thread in an order of its own. `sums`: piece number → SHA-256; a piece that two saw differently is in
    `wrong`."""
    fd = os.open(blob, os.O_RDONLY | os.O_DIRECT)
    total = os.fstat(fd).st_size // PIECE
    sums: dict[int, str] = {}
    wrong: list[int] = []
    errors: list[str] = []
    barrier = threading.Barrier(count)

    def read(seed: int) -> None:
        buffer = _aligned(PIECE)
        order = random.Random(seed).sample(range(total), min(total, pieces))
        barrier.wait()
        try:
            for number in order:
                got = os.preadv(fd, [buffer], number * PIECE)
                digest = hashlib.sha256(memoryview(buffer)[:got]).hexdigest()
                if sums.setdefault(number, digest) != digest:
                    wrong.append(number)
        except OSError as error:
            errors.append(str(error))

    threads = [threading.Thread(target=read, args=(seed,)) for seed in range(count)]
    begin = time.monotonic()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return {"seconds": time.monotonic() - begin, "sums": sums, "wrong": wrong, "errors": errors}


def check_sums(sums: dict[str, str], data: bytes) -> list[int]:
    """Pieces that are not the layer's."""
    return [
        int(n)
        for n, digest in sums.items()
        if hashlib.sha256(data[int(n) * PIECE : (int(n) + 1) * PIECE]).hexdigest() != digest
    ]


if __name__ == "__main__":
    if sys.argv[1] == "latency":
        json.dump(_latency(sys.argv[2], float(sys.argv[3]), int((sys.argv[4:] or ["1"])[0])), sys.stdout)
    else:
        json.dump(_readers(sys.argv[2], int(sys.argv[3]), int(sys.argv[4])), sys.stdout)
