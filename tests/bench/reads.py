"""Cached reads of blob files, and of an EROFS tree over them, with and without the kernel's page cache for the blobs.

    python -m tests.bench.reads [DIRECTORY_TO_COPY]     prints the table; the tree part compares the ways to serve

The server is a process of its own, as in the daemon, and its cache is filled before anything is timed.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from shim.cache.fetch import LazyLayer
from shim.cache.pool import FetchPool
from shim.cache.store import LayerCache
from shim.erofs.writer import write_image
from shim.fuse import connection
from shim.fuse.journal import Journal
from shim.fuse.server import BlobServer
from shim.index.model import Compression
from shim.layers.scan import LayerScanner
from shim.mount.erofs import mount_erofs
from tests.bench.common import Row, drop_caches, pairs, table, timed
from tests.support.host import disk_directory

_MIB = 1 << 20
_CLIENT = """
import os, random, sys, time, mmap
fd = os.open(sys.argv[1], os.O_RDONLY)
size = os.fstat(fd).st_size
buffer = mmap.mmap(-1, 1 << 20)  # page-aligned, so that a read of 1 MiB is one request
start = time.perf_counter()
for offset in range(0, size - (1 << 20), 1 << 20):
    os.preadv(fd, [buffer], offset)
elapsed = time.perf_counter() - start
os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_RANDOM)
small = memoryview(buffer)[:4096]
rng = random.Random(1)
offsets = [rng.randrange(size // 4096) * 4096 for _ in range(20000)]
cpu = lambda: sum(map(int, open("/proc/" + sys.argv[2] + "/stat").read().rpartition(")")[2].split()[11:13])) / 100
times, used = [], cpu()
for offset in offsets:
    before = time.perf_counter()
    os.preadv(fd, [small], offset)
    times.append(time.perf_counter() - before)
used = cpu() - used
times.sort()
print(size / elapsed / 1e9, times[len(times) // 2] * 1e6, times[len(times) * 99 // 100] * 1e6, used / len(times) * 1e6)
"""


def serve(tar: Path, state: Path, mode: str) -> None:
    """Serve `tar` as the blob "layer" until SIGTERM; says "ready" when all of it is cached."""
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    with LayerScanner(Compression.NONE, 2 * _MIB, lambda _: None) as scanner, open(tar, "rb") as file:
        while chunk := file.read(_MIB):
            scanner.feed(chunk)
        result = scanner.finish()
    cached = LayerCache(state / "cache").layer(result.diff_id, result.spans)
    with open(tar, "rb") as file:
        for span in range(cached.count):
            cached.publish(span, file.read(cached.span_length(span)))
    fd = connection.mount(state / "blobs")
    server = BlobServer(fd, None, Journal(state / "journal", fresh=True), direct_io=mode == "direct")

    @contextmanager
    def nowhere(_start: int, _end: int) -> Iterator[Iterator[bytes]]:
        raise AssertionError("everything is cached")

    server.add(
        LazyLayer(
            node_id=server.node_id(b"layer"),
            name=b"layer",
            compression=Compression.NONE,
            cached=cached,
            open_range=nowhere,
            pool=FetchPool(2),
        )
    )
    server.start()
    print("ready", flush=True)
    signal.sigwait({signal.SIGTERM})
    server.stop()


@contextmanager
def served(tar: Path, base: Path, mode: str, read_ahead_kib: int = 0) -> Iterator[tuple[Path, int]]:
    """A server process for `tar`; gives the blob file and the server's pid."""
    state = base / f"{mode}-{read_ahead_kib}"
    (state / "blobs").mkdir(parents=True)
    command = [sys.executable, "-m", "tests.bench.reads", "serve", str(tar), str(state), mode]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, env=os.environ | {"PYTHONPATH": os.getcwd()})
    try:
        assert child.stdout is not None
        assert child.stdout.readline() == b"ready\n"
        if read_ahead_kib:
            set_read_ahead(state / "blobs", read_ahead_kib)
        yield state / "blobs" / "layer", child.pid
    finally:
        subprocess.run(["umount", state / "blobs"], check=True)
        child.terminate()
        child.wait()
        shutil.rmtree(state)


def set_read_ahead(mount: Path, kib: int) -> None:
    device = os.stat(mount).st_dev
    Path(f"/sys/class/bdi/{os.major(device)}:{os.minor(device)}/read_ahead_kb").write_text(str(kib))


def measure(base: Path) -> list[Row]:
    """Raw blob reads: 1 MiB sequential and 4 KiB random, the layer cached and its cache file in the page cache."""
    tar = base / "noise"
    with open(tar, "wb") as file:
        for _ in range(512):
            file.write(os.urandom(_MIB))
    rows = []
    for mode in ("direct", "page-cache"):
        with served(tar, base, mode) as (blob, pid):
            best = [0.0, 1e9, 1e9, 1e9]
            for _ in range(3):
                run = subprocess.run(
                    [sys.executable, "-c", _CLIENT, blob, str(pid)], check=True, capture_output=True, text=True
                )
                got = [float(word) for word in run.stdout.split()]
                best = [max(best[0], got[0]), *(min(a, b) for a, b in zip(best[1:], got[1:], strict=True))]
        rows += [
            Row(f"cached blob, 1 MiB reads ({mode})", f"{best[0]:.2f} GB/s", "≥ 1.5 GB/s", best[0] >= 1.5),
            Row(
                f"cached blob, 4 KiB random reads ({mode})",
                f"{best[1]:.0f} µs median, {best[2]:.0f} µs p99, {best[3]:.0f} µs of the server's CPU",
                "≤ 60 µs CPU",
                best[3] <= 60,
            ),
        ]
    tar.unlink()
    return rows


def compare_trees(base: Path, source: Path, rounds: int) -> list[Row]:
    """Every file of a tree, page cache dropped: EROFS over the blob against the same tree on ext4."""
    from tests.mounts.erofs_tools import tree_from_tars

    plain, tar = base / "plain", base / "tree.tar"
    subprocess.run(["cp", "-a", source, plain], check=True)
    with tarfile.open(tar, "w") as out:
        out.add(plain, ".")
    with open(base / "image.erofs", "wb+") as image:
        write_image(tree_from_tars([tar]), [tar.stat().st_size], image)
    read = 'find "$0" -type f -print0 | xargs -0 cat | wc -c'

    def cold(directory: Path) -> float:
        drop_caches()
        return timed(lambda: subprocess.run(["sh", "-c", read, str(directory)], check=True, stdout=subprocess.DEVNULL))

    rows = []
    ways = [("direct", 0, None), ("direct", 0, 512), ("direct", 0, 1024), ("page-cache", 128, None)]
    ways += [
        ("page-cache", 512, None),
        ("page-cache", 1024, None),
        ("page-cache", 1024, 512),
        ("page-cache", 4096, 128),
    ]
    for mode, blob_kib, tree_kib in ways:
        with served(tar, base, mode, blob_kib) as (blob, pid):
            target = base / "mnt"
            target.mkdir()
            mount_erofs(base / "image.erofs", [blob], target, read_ahead_kib=tree_kib)
            try:
                before = cpu_seconds(pid)
                mine, other, ratio = pairs(rounds, partial(cold, target), partial(cold, plain))
                used = (cpu_seconds(pid) - before) / rounds
            finally:
                subprocess.run(["umount", target], check=True)
                target.rmdir()
        what = f"every file of {source}, {mode}, read-ahead blob {blob_kib or '-'} / tree {tree_kib or 128} KiB"
        measured = f"{mine:.2f} s / {other:.2f} s = {ratio:.2f} ×, server {used:.2f} s CPU"
        rows.append(Row(what, measured, "", None))
        print(what, measured, flush=True)
    return rows


def cpu_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def main() -> None:
    base = disk_directory()
    try:
        print(table(measure(base)))
        if len(sys.argv) > 1:
            begin = time.perf_counter()
            print(table(compare_trees(base, Path(sys.argv[1]), 5)), f"\n({time.perf_counter() - begin:.0f} s)")
    finally:
        shutil.rmtree(base)


if __name__ == "__main__":
    if sys.argv[1:2] == ["serve"]:
        serve(Path(sys.argv[2]), Path(sys.argv[3]), sys.argv[4])
    else:
        main()
