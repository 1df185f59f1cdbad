"""The gzip wrapper (RFC 1952): member headers, trailers, what may follow the last member."""

from __future__ import annotations

import struct

try:
    from isal.isal_zlib import crc32 as crc32  # four times as fast
except ImportError:
    from zlib import crc32 as crc32

from shim.errors import LayerError
from shim.layers.source import Source

MAGIC = b"\x1f\x8b"
TRAILER_SIZE = 8  # CRC-32 and the length modulo 2**32 of the member's data

_DEFLATE = 8
_FHCRC, _FEXTRA, _FNAME, _FCOMMENT, _RESERVED = 2, 4, 8, 16, 0xE0
_TEXT_LIMIT = 64 << 10  # of FNAME and FCOMMENT, which have no length; the same as FEXTRA's


def read_header(source: Source) -> None:
    """Pass over one member's header. Raises LayerError if there is none, or if it is damaged."""
    start = source.offset
    header = source.take(10)
    flags = header[3]
    if header[:2] != MAGIC or header[2] != _DEFLATE or flags & _RESERVED:
        raise LayerError(f"no gzip member where one must begin, at byte {start}")
    if not flags & (_FEXTRA | _FNAME | _FCOMMENT | _FHCRC):
        return
    parts = [header]
    if flags & _FEXTRA:
        length = source.take(2)
        parts += (length, source.take(int.from_bytes(length, "little")))
    for flag in (_FNAME, _FCOMMENT):
        if flags & flag:
            parts.append(_read_text(source, start))
    if flags & _FHCRC:
        expected = int.from_bytes(source.take(2), "little")
        if crc32(b"".join(parts)) & 0xFFFF != expected:
            raise LayerError(f"the gzip header at byte {start} does not match its checksum")


def _read_text(source: Source, start: int) -> bytes:
    parts: list[bytes] = []
    size = 0
    while True:
        source.need()
        end = source.chunk.find(b"\0", source.pos, source.pos + _TEXT_LIMIT - size)
        part = source.chunk[source.pos : end + 1 if end >= 0 else source.pos + _TEXT_LIMIT - size]
        source.pos += len(part)
        size += len(part)
        parts.append(part)
        if end >= 0:
            return b"".join(parts)
        if size >= _TEXT_LIMIT:
            raise LayerError(f"the gzip header at byte {start} has an endless name or comment")


def read_trailer(source: Source) -> tuple[int, int]:
    """(CRC-32, length modulo 2**32) of the member that has just ended."""
    crc, size = struct.unpack("<II", source.take(TRAILER_SIZE))
    return crc, size


def at_end(source: Source) -> bool:
    """After a member: is the layer over? Zero bytes up to the end are padding, as for gzip(1) and pigz.

    False if another member begins. Raises LayerError if padding is followed by something else.
    """
    if not source.more():
        return True
    if source.chunk[source.pos] != 0:
        return False
    start = source.offset
    if not source.rest_is_zero():
        raise LayerError(f"garbage after the last gzip member, at byte {start}")
    return True
