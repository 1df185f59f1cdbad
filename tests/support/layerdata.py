"""Layers made in memory for tests: bytes with every kind of deflate block, in every kind of stream."""

from __future__ import annotations

import gzip
import io
import random
import struct
import zlib
from collections.abc import Callable
from functools import cache

import zstandard
from isal import igzip_lib

from shim.index.model import Compression
from shim.layers.scan import LayerScanner, ScanResult

SPACING = 64 << 10


@cache
def sample(size: int = 3 << 20, seed: int = 1) -> bytes:
    """Text, noise (stored blocks), zeros and far repeats, mixed: `size` bytes, the same for a seed."""
    rnd = random.Random(seed)
    words = [rnd.randbytes(rnd.randint(2, 9)).hex().encode() for _ in range(3000)]
    out = bytearray()
    while len(out) < size:
        kind = rnd.random()
        if kind < 0.6:
            out += b" ".join(rnd.choices(words, k=rnd.randint(500, 4000)))
        elif kind < 0.75:
            out += rnd.randbytes(rnd.randint(100, 60_000))
        elif kind < 0.85:
            out += bytes(rnd.randint(1, 50_000))
        elif out:
            start = max(0, len(out) - rnd.randint(1, 32_768))
            out += out[start : start + rnd.randint(3, 20_000)]
    return bytes(out[:size])


def deflate(data: bytes, level: int = 6, memory: int = 8, strategy: int = zlib.Z_DEFAULT_STRATEGY) -> bytes:
    """One gzip member by zlib; a small `memory` gives many blocks."""
    packer = zlib.compressobj(level, zlib.DEFLATED, 31, memory, strategy)
    return packer.compress(data) + packer.flush()


def members(data: bytes, size: int) -> bytes:
    """One gzip member for each `size` bytes, as eStargz and mgzip write."""
    return b"".join(gzip.compress(data[at : at + size], 6) for at in range(0, len(data), size))


def flushed(data: bytes, size: int, mode: int = zlib.Z_SYNC_FLUSH) -> bytes:
    """One member with a flush every `size` bytes, as pigz writes: empty stored blocks in between."""
    packer = zlib.compressobj(6, zlib.DEFLATED, 31)
    parts = [packer.compress(data[at : at + size]) + packer.flush(mode) for at in range(0, len(data), size)]
    return b"".join(parts) + packer.flush()


def one_block(data: bytes) -> bytes:
    """One member whose data is a single deflate block (ISA-L level 0)."""
    return bytes(igzip_lib.compress(data, level=0, flag=igzip_lib.COMP_GZIP))


def decorated(data: bytes) -> bytes:
    """A member with every optional header field, and the header checksum."""
    header = b"\x1f\x8b\x08" + bytes([2 | 4 | 8 | 16]) + b"\0\0\0\0\0\x03"
    header += struct.pack("<H", 700) + b"E" * 700 + b"a name\0" + b"a comment" * 90 + b"\0"
    header += struct.pack("<H", zlib.crc32(header) & 0xFFFF)
    return header + deflate(data)[10:]


def zstd(data: bytes) -> bytes:
    """One frame that says its content's size."""
    return zstandard.ZstdCompressor(level=3).compress(data)


def zstd_stream(data: bytes) -> bytes:
    """A frame that does not say its content's size, as a pipe gives."""
    packer = zstandard.ZstdCompressor(level=3, write_checksum=True).compressobj()
    return packer.compress(data) + packer.flush()


def skippable(data: bytes) -> bytes:
    return b"\x5e\x2a\x4d\x18" + struct.pack("<I", len(data)) + data


def zstd_chunked(data: bytes, size: int) -> bytes:
    """A frame for each piece, then skippable ones, as zstd:chunked writes."""
    frames = b"".join(zstd_stream(data[at : at + size]) for at in range(0, len(data), size))
    return skippable(b"lead") + frames + skippable(b"manifest" * 10) + skippable(b"footer")


STREAMS: dict[str, tuple[Compression, Callable[[bytes], bytes]]] = {
    "zlib": (Compression.GZIP, deflate),
    "zlib-small-blocks": (Compression.GZIP, lambda data: deflate(data, 9, 1)),
    "zlib-fixed-codes": (Compression.GZIP, lambda data: deflate(data, 6, 2, zlib.Z_FIXED)),
    "zlib-stored": (Compression.GZIP, lambda data: deflate(data, 0)),
    "pigz": (Compression.GZIP, lambda data: flushed(data, 128 << 10)),
    "full-flush": (Compression.GZIP, lambda data: flushed(data, 5000, zlib.Z_FULL_FLUSH)),
    "members": (Compression.GZIP, lambda data: members(data, 10_007)),
    "empty-members": (
        Compression.GZIP,
        lambda data: gzip.compress(b"") * 3 + members(data, 300_000) + gzip.compress(b"") * 2,
    ),
    "padded": (Compression.GZIP, lambda data: deflate(data) + bytes(3000)),
    "decorated": (Compression.GZIP, lambda data: decorated(data[:1_000_000]) + decorated(data[1_000_000:])),
    "one-block": (Compression.GZIP, one_block),
    "zstd": (Compression.ZSTD, zstd),
    "zstd-stream": (Compression.ZSTD, zstd_stream),
    "zstd-chunked": (Compression.ZSTD, lambda data: zstd_chunked(data, 50_000)),
    "plain": (Compression.NONE, bytes),
}


def scan(
    stream: bytes, spacing: int = SPACING, piece: int = 1 << 20, compression: Compression | None = None
) -> ScanResult:
    """Scan a stream that reaches the decoder in pieces of `piece` bytes."""
    kind = type("Scanner", (LayerScanner,), {"piece_size": piece})
    with kind(compression, spacing, ignore) as scanner:
        reader = io.BytesIO(stream)
        while chunk := reader.read(piece):
            scanner.feed(chunk)
        result: ScanResult = scanner.finish()
        return result


def ignore(_: memoryview) -> None:
    """An on_data that does nothing."""
