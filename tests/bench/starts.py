"""Cold starts: a container whose image is only in the registry, against its warm start and `docker pull` + run."""

from __future__ import annotations

import bisect
import contextlib
import ctypes
import mmap
import os
import shutil
import statistics
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from shim.index import codec
from shim.index.model import Index
from tests.bench.common import Row, drop_caches, mb, timed
from tests.support import bundle
from tests.support.engines import Docker
from tests.support.host import Host, stop
from tests.support.images import Image, push
from tests.support.proxy import Proxy
from tests.support.registry import Registry

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]

LARGE = ["python3", "-c", "import numpy, pandas, sklearn.ensemble; print(1)"]
SMALL = ["python3", "-c", "print(1)"]
EVERYTHING = ["sh", "-c", "find / -xdev -type f -print0 | xargs -0 cat | wc -c"]


@dataclass(frozen=True)
class Needed:
    """Compressed bytes. `pages`: of exactly the pages that were read, each with its span's compression ratio. `spans`:
    of what lies between the restart points around them, which is the least that can be fetched."""

    pages: float
    spans: int

    @classmethod
    def of(cls, index: Index, tree: Path) -> Needed:
        pages, touched = 0.0, set[tuple[int, int, int]]()
        resident = _resident(tree)
        for path, node in index.tree.walk():
            if path not in resident or not node.extents:
                continue
            for extent in node.extents:
                spans = index.layers[extent.layer].spans
                for start, end in _ranges(tree, path, resident[path], node.size):
                    low = max(start, extent.logical)
                    high = min(end, extent.logical + extent.length)
                    at = extent.offset + low - extent.logical
                    while low < high:
                        span = bisect.bisect_right(spans.ustarts, at) - 1
                        part = min(high - low, spans.ustarts[span + 1] - at)
                        first, stop = spans.restart(span), spans.run_end(span)
                        whole = spans.ustarts[stop] - spans.ustarts[first]
                        pages += part * (spans.cstarts[stop] - spans.cstarts[first]) / whole
                        touched.add((extent.layer, first, stop))
                        low, at = low + part, at + part
        sizes = (
            index.layers[layer].spans.cstarts[stop] - index.layers[layer].spans.cstarts[first]
            for layer, first, stop in touched
        )
        return cls(pages, sum(sizes))


def _resident(tree: Path) -> dict[bytes, int]:
    """path in the tree -> bytes of it in the page cache, by fincore(1)."""
    command = 'cd "$0" && find . -xdev -type f -size +0 -print0 | xargs -0 fincore --bytes --noheadings -o RES,FILE'
    out = subprocess.run(["sh", "-c", command, str(tree)], check=True, capture_output=True).stdout
    found = {}
    for line in out.splitlines():
        size, _, name = line.strip().partition(b" ")
        if int(size):
            found[name.strip()[1:]] = int(size)
    return found


def _ranges(tree: Path, path: bytes, resident: int, size: int) -> Iterator[tuple[int, int]]:
    """The parts of a file that are in the page cache, by mincore(2)."""
    if resident >= size:
        yield 0, size
        return
    page = mmap.PAGESIZE
    count = (size + page - 1) // page
    flags = (ctypes.c_ubyte * count)()
    with open(os.fsencode(tree) + path, "rb") as file:
        address = _libc.mmap(None, size, mmap.PROT_READ, mmap.MAP_SHARED, file.fileno(), 0)
        assert address != ctypes.c_void_p(-1).value, "mmap"
        try:
            assert _libc.mincore(ctypes.c_void_p(address), ctypes.c_size_t(size), flags) == 0, "mincore"
        finally:
            _libc.munmap(ctypes.c_void_p(address), ctypes.c_size_t(size))
    for i in range(count):
        if flags[i] & 1:
            yield i * page, min(size, (i + 1) * page)


class Cold:
    """A host whose daemon can be put back to "nothing known but the index", and containers on it."""

    def __init__(self, host: Host, index: Path) -> None:
        self.host = host
        self.index = index
        self._number = 0
        self._daemon: subprocess.Popen[bytes] | None = None

    def forget(self) -> None:
        """A new daemon with nothing cached; page cache dropped."""
        self.end()
        self.host.run("rm", "-rf", "--one-file-system", *self.host.state_dir.iterdir())
        self._daemon = self.host.start_daemon()
        drop_caches()
        self._container(["/bin/busybox", "true"], None)  # runc and Python are in use on any node; the image is not

    def profiled(self, args: list[str]) -> Path:
        """The index with the start profile of one container, in a file of its own."""
        plain, profiled = self.index, self.index.with_suffix(".profiled.clip")
        self.forget()
        self.run(args)
        self.host.clip("profile", plain, "-o", profiled)
        return profiled

    def end(self) -> None:
        if self._daemon is not None:
            stop(self._daemon)

    def run(self, args: list[str]) -> float:
        """Seconds of one container from `runc run` to its end."""
        return self._container(args, self.index)

    def _container(self, args: list[str], index: Path | None) -> float:
        self._number += 1
        made = bundle.make(self.host.base / f"bundle-{self._number}", args, index=index)
        if index is None:
            (made / "rootfs/bin").mkdir()
            shutil.copy("/bin/busybox", made / "rootfs/bin/busybox")
            for name in ("proc", "dev", "sys"):
                (made / "rootfs" / name).mkdir()
        return timed(lambda: self.host.run(self.host.runtime, "run", "-b", made, f"bench-{self._number}", timeout=600))

    def fetched(self) -> tuple[int, int]:
        """(bytes, requests) of blobs since the daemon started."""
        counts = [count for key, count in self.host.status()["registries"].items() if key.endswith(" blob")]
        return sum(c["bytes"] for c in counts), sum(c["requests"] for c in counts)

    def needed(self) -> Needed:
        """What was read since `forget`, by the pages that the tree's files have in the page cache."""
        (image,) = self.host.status()["images"]
        return Needed.of(codec.decode(self.index.read_bytes()), Path(image["tree"]))


def measure(host: Host, image: Image, registry: Registry, index: Path, rounds: int = 3) -> list[Row]:
    """On loopback: cold against warm, and against Docker pulling and running the same image."""
    cold = Cold(host, index)
    reference = f"{registry.host}/{image.name}:latest"
    large, known, small, pulls, everything, whole = [], [], [], [], [], []
    try:
        with Docker(host) as docker:
            profiled = cold.profiled(LARGE)
            for _ in range(rounds):
                cold.forget()
                large.append((cold.run(LARGE), cold.run(LARGE)))
                cold.index = profiled
                cold.forget()
                known.append((cold.run(LARGE), cold.run(LARGE)))
                cold.index = index
                cold.forget()
                small.append((cold.run(SMALL), cold.run(SMALL)))
                cold.forget()
                everything.append(cold.run(EVERYTHING))
                pull, run = _docker(docker, reference)
                whole.append(pull)
                pulls.append(pull + run)
    finally:
        cold.end()
    rows = []
    for what, times in (("cold start, large working set", large), ("the same, start profile in the index", known)):
        first, warm = (statistics.median(column) for column in zip(*times, strict=True))
        ratio = statistics.median(a / b for a, b in times)
        against = statistics.median(p / a for p, (a, _) in zip(pulls, times, strict=True))
        rows += [
            Row(f"{what}, against warm", f"{first:.2f} s / {warm:.2f} s = {ratio:.2f} ×", "≤ 2 ×", ratio <= 2),
            Row(f"{what}, against `docker pull` + run",
                f"{statistics.median(pulls):.2f} s / {first:.2f} s = {against:.1f} × faster", "≥ 5 ×", against >= 5),
        ]  # fmt: skip
    extra = statistics.median(a - b for a, b in small)
    full = statistics.median(a / b for a, b in zip(everything, whole, strict=True))
    return [
        *rows,
        Row("cold start, small working set, more than warm",
            f"{statistics.median(a for a, _ in small):.2f} s, {extra:.2f} s more", "≤ 1.0 s", extra <= 1.0),
        Row("reading every file cold, against `docker pull`",
            f"{statistics.median(everything):.2f} s / {statistics.median(whole):.2f} s = {full:.2f} ×",
            "≤ 1.2 ×", full <= 1.2),
    ]  # fmt: skip


def _docker(docker: Docker, reference: str) -> tuple[float, float]:
    """Seconds of the pull, and of the run after it; the image is removed again."""
    drop_caches()
    pull = timed(lambda: docker.call("pull", "-q", reference, timeout=600))
    run = timed(lambda: docker.run("--rm", reference, *LARGE, runtime="plain"))
    docker.call("rmi", "-f", reference)
    return pull, run


def far_away(host: Host, image: Image, registry: Registry) -> list[Row]:
    """Behind a proxy of 30 ms and 100 MB/s a connection: what is fetched against what is needed."""
    rows = []
    with contextlib.ExitStack() as stack:
        proxy = stack.enter_context(Proxy(registry.host, round_trip=0.03, rate=100e6))
        host.trust_registry(proxy.address)
        reference = push(image, registry.host).replace(registry.host, proxy.address)
        index = host.index(reference, "far-away")
        cold = Cold(host, index)
        try:
            profiled = cold.profiled(LARGE)
            for name, args, known in (
                ("large working set", LARGE, index),
                ("large, start profile in the index", LARGE, profiled),
                ("small working set", SMALL, index),
            ):
                cold.index = known
                cold.forget()
                seconds = cold.run(args)
                got, requests = cold.fetched()
                needed = cold.needed()
                rows.append(
                    Row(f"{name}, 30 ms and 100 MB/s away: {seconds:.2f} s",
                        f"{mb(got)} in {requests} requests; spans needed {mb(needed.spans)}: "
                        f"{got / needed.spans:.2f} × (pages alone {mb(needed.pages)})",
                        "≤ 1.3 ×", got <= 1.3 * needed.spans)
                )  # fmt: skip
        finally:
            cold.end()
    return rows


def memory_of(pid: int) -> int:
    """Proportional set size in bytes of a process and its children (supervisor's, server's, job server's)."""
    total = 0
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                total += int(line.split()[1]) * 1024
    for thread in os.listdir(f"/proc/{pid}/task"):
        if thread != str(pid):
            children += Path(f"/proc/{pid}/task/{thread}/children").read_text().split()
    return total + sum(memory_of(int(child)) for child in children)
