"""Layers for tests of the data path: real compressed streams with real span tables, sources that can be disturbed."""

from __future__ import annotations

import gzip
import random
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache

import zstandard

from shim.index.model import Compression, SpanTable
from shim.layers.scan import MIN_SPACING, LayerScanner


@dataclass(frozen=True)
class SampleLayer:
    """`data` uncompressed, `blob` compressed, and what a scan says of it."""

    data: bytes
    blob: bytes
    compression: Compression
    diff_id: str
    spans: SpanTable


def sample_bytes(size: int, seed: int = 1) -> bytes:
    """Half text-like, half noise, no two 4 KiB blocks equal: wrong offsets never go unseen."""
    rng = random.Random(seed)
    words = [rng.randbytes(rng.randrange(3, 12)) for _ in range(500)]
    out = bytearray()
    while len(out) < size:
        out += len(out).to_bytes(8, "little") + rng.randbytes(2000) + b"".join(rng.choices(words, k=300))
    return bytes(out[:size])


@cache
def sample_layer(
    size: int = 8 << 20, compression: Compression = Compression.GZIP, *, seed: int = 1, points: bool = True
) -> SampleLayer:
    """points=False (zstd): one frame, which cannot be restarted anywhere but at its start."""
    data = sample_bytes(size, seed)
    if compression == Compression.GZIP:
        blob = gzip.compress(data, 1, mtime=0)
    elif compression == Compression.ZSTD:
        pieces = [data[i : i + MIN_SPACING] for i in range(0, size, MIN_SPACING)] if points else [data]
        blob = b"".join(zstandard.ZstdCompressor(level=1).compress(piece) for piece in pieces)
    else:
        blob = data
    with LayerScanner(compression, MIN_SPACING, lambda _: None) as scanner:
        scanner.feed(blob)
        result = scanner.finish()
    return SampleLayer(data, blob, compression, result.diff_id, result.spans)


@dataclass
class Source:
    """`open_range` over a layer's blob. `requests` lists the ranges asked for. `gate`: closed, no byte comes.

    before(n, start, end): called before the n-th request's first byte (n from 0); may raise. change(chunk): what is
    sent instead.
    """

    layer: SampleLayer
    gate: threading.Event = field(default_factory=threading.Event)
    requests: list[tuple[int, int]] = field(default_factory=list)
    before: Callable[[int, int, int], None] = lambda _n, _start, _end: None
    change: Callable[[bytes], bytes] = lambda chunk: chunk
    chunk: int = 1 << 16

    def __post_init__(self) -> None:
        self.gate.set()

    @contextmanager
    def open_range(self, start: int, end: int) -> Iterator[Iterator[bytes]]:
        number = len(self.requests)
        self.requests.append((start, end))
        self.before(number, start, end)
        yield self._chunks(start, end)

    def _chunks(self, start: int, end: int) -> Iterator[bytes]:
        for position in range(start, end, self.chunk):
            self.gate.wait()
            yield self.change(self.layer.blob[position : min(position + self.chunk, end)])
