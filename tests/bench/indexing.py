"""Making an index: time against bare zlib, memory, size."""

from __future__ import annotations

import json
import statistics
import sys
from pathlib import Path

from tests.bench.common import Row, mb, run
from tests.support.host import CLIP_SHIM, Host
from tests.support.images import Image

_ZLIB = """
import sys, zlib
for path in sys.argv[1:]:
    inflate = zlib.decompressobj(31)
    with open(path, "rb") as blob:
        while piece := blob.read(1 << 20):
            inflate.decompress(piece)
"""


def measure(host: Host, image: Image, reference: str, rounds: int = 3) -> list[Row]:
    """`clip-shim index` as a person runs it, whole process, against a process that only inflates the same blobs."""
    target = host.indexes / f"bench-{image.name}.clip"
    blobs = [str(layer.path) for layer in image.layers]
    ratios, times, peaks = [], [], []
    for _ in range(rounds):
        ours = run([CLIP_SHIM, "index", reference, "-o", target], host.env)
        bare = run([sys.executable, "-IS", "-c", _ZLIB, *blobs])
        ratios.append(ours.seconds / bare.seconds)
        times.append((ours.seconds, bare.seconds))
        peaks.append(ours.peak_kib)
    ratio = statistics.median(ratios)
    mine, bare_time = (statistics.median(column) for column in zip(*times, strict=True))
    peak = max(peaks) / 1024
    facts = json.loads(host.clip("inspect", target, "--json").stdout)
    part = 100 * facts["index_bytes"] / facts["image_bytes"]
    return [
        Row(f"index of `{image.name}`, against inflating it by zlib",
            f"{mine:.2f} s / {bare_time:.2f} s = {ratio:.2f} ×", "≤ 1.5 ×", ratio <= 1.5),
        Row(f"peak memory of that (`{image.name}`)", f"{peak:.0f} MiB", "≤ 300 MB", peak <= 286),
        Row(f"index file of `{image.name}` ({mb(facts['image_bytes'])} compressed)",
            f"{facts['index_bytes']:,} bytes = {part:.2f} %", "≤ 0.4 %", part <= 0.4),
    ]  # fmt: skip


def stored(host: Host, image: Image) -> Path:
    """The index that `measure` left."""
    return host.indexes / f"bench-{image.name}.clip"
