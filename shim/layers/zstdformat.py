"""zstd frames (RFC 8878), walked block by block: exact frame offsets, and memory bounded whatever the ratio.

One block gives at most 128 KiB, so a bomb cannot balloon, and the size of a frame's window is known before libzstd
allocates it. Dictionaries are refused: no registry stores them.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import TYPE_CHECKING

from shim.errors import LayerError
from shim.layers.source import Source

if TYPE_CHECKING:
    import zstandard

MAGIC = b"\x28\xb5\x2f\xfd"
MAX_WINDOW = 128 << 20  # what libzstd itself accepts by default (ZSTD_WINDOWLOG_LIMIT_DEFAULT)

_BLOCK_LIMIT = 128 << 10  # RFC 8878 3.1.1.2.4
_RLE, _RESERVED = 1, 3
_DICTIONARY_BYTES = (0, 1, 2, 4)
_CONTENT_BYTES = (0, 2, 4, 8)


def is_skippable(magic: bytes) -> bool:
    """Does a skippable frame begin with these four bytes (0x184D2A50 to 0x184D2A5F, little-endian)?"""
    return len(magic) == 4 and magic[1:] == b"\x2a\x4d\x18" and magic[0] & 0xF0 == 0x50


def decode(source: Source) -> Iterator[tuple[int, bytes]]:
    """Decode all frames up to the end of the stream.

    Yields (offset, b"") where a data frame starts, and (-1, data) for its blocks, at most 128 KiB each (perhaps empty).
    Raises LayerError for anything that is not valid zstd.
    """
    import zstandard  # late: it takes 5 ms, and most layers are gzip

    engine = zstandard.ZstdDecompressor(max_window_size=MAX_WINDOW)
    while source.more():
        start = source.offset
        magic = source.take(4)
        if is_skippable(magic):
            source.skip(struct.unpack("<I", source.take(4))[0])
            yield -1, b""
        elif magic == MAGIC:
            yield start, b""
            yield from _frame(source, engine, start)
        else:
            raise LayerError(f"no zstd frame where one must begin, at byte {start}")


def _frame(source: Source, engine: zstandard.ZstdDecompressor, start: int) -> Iterator[tuple[int, bytes]]:
    from zstandard import ZstdError

    header, checksum = _frame_header(source, start)
    stream = engine.decompressobj()
    try:
        pending = MAGIC + header
        last = False
        while not last:
            head = source.take(3)
            word = int.from_bytes(head, "little")
            last, kind, size = bool(word & 1), word >> 1 & 3, word >> 3
            if kind == _RESERVED or size > _BLOCK_LIMIT:
                raise LayerError(f"the zstd frame at byte {start} has a damaged block, before byte {source.offset}")
            pending += head + source.take(1 if kind == _RLE else size)
            if last and checksum:
                pending += source.take(4)
            yield -1, stream.decompress(pending)
            pending = b""
    except ZstdError as error:
        raise LayerError(f"the zstd frame at byte {start} is damaged: {error}") from error
    if not stream.eof or stream.unused_data:
        raise LayerError(f"the zstd frame at byte {start} does not end where it must")


def _frame_header(source: Source, start: int) -> tuple[bytes, bool]:
    """The frame header without its magic, and whether a content checksum follows the last block (RFC 8878 3.1.1.1)."""
    descriptor = source.take(1)
    flags = descriptor[0]
    single = bool(flags & 0x20)
    if flags & 0x08:
        raise LayerError(f"the zstd frame at byte {start} uses a reserved feature")
    window_byte = b"" if single else source.take(1)
    dictionary = source.take(_DICTIONARY_BYTES[flags & 3])
    content = source.take(_CONTENT_BYTES[flags >> 6] or single)
    if any(dictionary):
        raise LayerError(f"the zstd frame at byte {start} needs a dictionary")
    if single:
        window = int.from_bytes(content, "little") + (256 if len(content) == 2 else 0)
    else:
        base = 1 << (10 + (window_byte[0] >> 3))
        window = base + base // 8 * (window_byte[0] & 7)
    if window > MAX_WINDOW:
        raise LayerError(
            f"the zstd frame at byte {start} needs a window of {window >> 20} MiB, more than {MAX_WINDOW >> 20} MiB",
            hint="compress the image again without --long, or with a window of at most 128 MiB",
        )
    return descriptor + window_byte + dictionary + content, bool(flags & 4)
