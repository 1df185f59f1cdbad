"""Times the scan of a layer against bare zlib, and reading from its restart points; prints the figures.

    python -m tests.bench.scan [LAYER.tar.gz ...] [--spacing-mib 2] [--pairs 3] [--big-gib 0]

Without a layer it packs one from /usr. --big-gib N also scans N GiB of zeros in a process of its own, for its memory.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
import zlib
from collections.abc import Iterator
from pathlib import Path

import zstandard

from shim.index.model import Compression, Restart
from shim.layers import libz
from shim.layers.inflate import compressed_range, inflate_spans
from shim.layers.resume import Begin, IsalInflater, LibzInflater
from shim.layers.scan import LayerScanner, ScanResult
from shim.layers.tar import TarWalker
from shim.layers.windows import MarkerProbe
from tests.bench.common import run, timed

PIECE = 256 << 10
SOURCES = ["usr/sbin", "usr/share/doc", "usr/share/perl", "usr/lib/python3", "usr/lib/systemd", "usr/include", "etc"]


def read_pieces(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        while piece := file.read(PIECE):
            yield piece


def bare(path: Path) -> None:
    """What zlib alone needs: inflate, its own CRC, nothing else."""
    inflater = zlib.decompressobj(31)
    for piece in read_pieces(path):
        rest = piece
        while rest:
            if inflater.eof:
                inflater = zlib.decompressobj(31)
            inflater.decompress(rest)
            rest = inflater.unused_data


def scan(path: Path, spacing: int) -> tuple[ScanResult, TarWalker]:
    """The whole index pass: digests, spans, windows, tar headers."""
    walker = TarWalker()
    with LayerScanner(None, spacing, walker.feed) as scanner:
        for piece in read_pieces(path):
            scanner.feed(piece)
        result = scanner.finish()
    walker.finish()
    return result, walker


def resume(path: Path, result: ScanResult, begin: Begin) -> float:
    """MB/s of uncompressed bytes, each run from its own point, hashed and compared."""
    stream = path.read_bytes()
    table, i = result.spans, 0
    start = time.perf_counter()
    while i < table.count:
        stop = table.run_end(i)
        low, high = compressed_range(table, i, stop)
        for _ in inflate_spans(table, result.compression, i, iter([stream[low:high]]), stop, begin=begin):
            pass
        i = stop
    return result.uncompressed_size / 1e6 / (time.perf_counter() - start)


def window_cost(path: Path, result: ScanResult) -> float:
    """ms to find one sparse window."""
    stream = path.read_bytes()
    table = result.spans
    points = [i for i in range(table.count) if table.kind(i) == Restart.DEFLATE][:100]
    if not points:
        return 0.0
    probe = MarkerProbe()
    full = bytes(range(256)) * 128

    def one(i: int) -> None:
        bits, at = table.bit(i), table.cstart(i)
        probe.start(bits, stream[at])
        probe.feed(stream[at + (bits > 0) : at + 80_000], 0, min(80_000, len(stream) - at) - (bits > 0))
        probe.sparse(full)

    return statistics.median(timed(lambda i=i: one(i)) for i in points) * 1000  # type: ignore[misc]


def walk_cost(path: Path, walker: TarWalker) -> float:
    """µs an entry for the tar walker alone."""
    inflater = zlib.decompressobj(31)
    again = TarWalker()
    spent = 0.0
    for piece in read_pieces(path):
        data = inflater.decompress(piece)
        spent += timed(lambda data=data: again.feed(data))  # type: ignore[misc]
    return spent / max(1, len(walker.entries)) * 1e6


def report(path: Path, spacing: int, count: int) -> None:
    ratios, seconds = [], []
    result, walker = scan(path, spacing)
    for _ in range(count):
        seconds.append(timed(lambda: bare(path)))
        ratios.append(timed(lambda: scan(path, spacing)) / seconds[-1])
    table = result.spans
    points = sum(kind != Restart.CONTINUE for kind in table.kinds)
    together = len(zstandard.compress(b"".join(table.windows), 19))
    size, unpacked = result.size / 1e6, result.uncompressed_size / 1e6
    print(f"{path.name}: {size:.0f} MB of {unpacked:.0f} MB, {len(walker.entries)} entries")
    print(f"  bare zlib {statistics.median(seconds):.2f} s; whole scan {statistics.median(ratios):.2f} times that")
    print(f"  {table.count} spans, {points} restart points; windows {together} bytes, {together / size / 1e4:.3f} %")
    print(f"  a window {window_cost(path, result):.2f} ms; a tar entry {walk_cost(path, walker):.1f} µs")
    for name, begin in (("isal", IsalInflater), ("libz", LibzInflater)):
        print(f"  resumed by {name}: {resume(path, result, begin):.0f} MB/s, verified")


def pack(directory: str) -> Path:
    """A layer of this machine's own files, as `docker build` would pack them."""
    tar, path = Path(directory) / "layer.tar", Path(directory) / "layer.tar.gz"
    sources = [name for name in SOURCES if Path("/", name).exists()]
    run(["tar", "--format=pax", "--ignore-failed-read", "-cf", tar, "-C", "/", *sources])
    packer = zlib.compressobj(6, zlib.DEFLATED, 31)
    with tar.open("rb") as source, path.open("wb") as target:
        while piece := source.read(1 << 20):
            target.write(packer.compress(piece))
        target.write(packer.flush())
    tar.unlink()
    return path


def scan_zeros(gib: int) -> None:
    """Scan `gib` GiB of zeros, made on the way; print the process's peak memory in KiB."""
    packer = zlib.compressobj(6, zlib.DEFLATED, 31)
    walker = TarWalker()
    with LayerScanner(Compression.GZIP, 2 << 20, walker.feed) as scanner:
        for _ in range(gib << 10):
            scanner.feed(packer.compress(bytes(1 << 20)))
        scanner.feed(packer.flush())
        scanner.finish()
    # Not getrusage: its peak is inherited over fork and exec.
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    print(int(status["VmHWM"].split()[0]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("layers", nargs="*", type=Path)
    parser.add_argument("--spacing-mib", type=int, default=2)
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--big-gib", type=int, default=0)
    parser.add_argument("--zeros", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.zeros:
        scan_zeros(args.zeros)
        return
    libz.RawInflate().close()  # loads the library outside what is timed
    with tempfile.TemporaryDirectory() as directory:
        for path in args.layers or [pack(directory)]:
            report(path, args.spacing_mib << 20, args.pairs)
    if args.big_gib:
        ran = run([sys.executable, "-m", "tests.bench.scan", "--zeros", str(args.big_gib)])
        print(f"{args.big_gib} GiB of zeros: {ran.seconds:.0f} s, peak memory {int(ran.output) >> 10} MiB")


if __name__ == "__main__":
    main()
