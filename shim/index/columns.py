"""Columns of integers and bytes inside a section: LEB128 varints, zigzag for signed ones, and the frame around them."""

from __future__ import annotations

import struct
from collections.abc import Iterable, Sequence

from shim.errors import IndexFormatError

_CONTINUED = bytes(range(128, 256))
_MAX_SHIFT = 63  # ten bytes hold 70 bits: enough for a zigzag difference of two 64-bit values


def pack(values: Iterable[int]) -> bytes:
    """Each value (>= 0) as a varint: seven bits a byte, low ones first, bit 7 set on all but the last."""
    numbers = list(values)
    try:
        out = bytearray(numbers)
    except ValueError:  # one is above 255
        out = bytearray(b"\x80")
    if out.isascii():  # all of one byte: the usual case, and twenty times as fast
        return bytes(out)
    out.clear()
    for number in numbers:
        value = number
        while value > 127:
            out.append(value & 127 | 128)
            value >>= 7
        out.append(value)
    return bytes(out)


def unpack(data: bytes, at_most: int) -> list[int]:
    """All varints of a column. Raises IndexFormatError for one that is cut off or longer than ten bytes, and, before
    anything is allocated, for more than `at_most` of them."""
    if len(data) > at_most and len(data.translate(None, _CONTINUED)) > at_most:
        raise IndexFormatError("a column has more numbers than it can have")
    if data.isascii():  # all of one byte: the usual case, and twenty times as fast
        return list(data)
    if data[-1] > 127:
        raise IndexFormatError("a number is cut off at a column's end")
    out: list[int] = []
    append = out.append
    rest = iter(data)
    for byte in rest:
        if byte < 128:
            append(byte)
            continue
        value, shift = byte & 127, 7
        for more in rest:
            if more < 128:
                append(value | more << shift)
                break
            value |= (more & 127) << shift
            shift += 7
            if shift > _MAX_SHIFT:
                raise IndexFormatError("a number in a column is too long")
    return out


def zigzag(value: int) -> int:
    """0, -1, 1, -2 … as 0, 1, 2, 3 …"""
    return value << 1 if value >= 0 else ~(value << 1)


def unzigzag(value: int) -> int:
    return ~(value >> 1) if value & 1 else value >> 1


def frame(lengths: Sequence[int]) -> bytes:
    """How a section begins: its columns' lengths (u32 each, little-endian)."""
    return struct.pack(f"<{len(lengths)}I", *lengths)


def join(columns: Sequence[bytes]) -> bytes:
    """A section's raw bytes: the columns' lengths, then the columns."""
    return frame([*map(len, columns)]) + b"".join(columns)


def split(raw: bytes, count: int, name: str) -> list[bytes]:
    """The `count` columns of section `name`. Raises IndexFormatError if the lengths do not add up."""
    at = 4 * count
    if len(raw) < at:
        raise IndexFormatError(f"section {name} is shorter than its column table")
    out = []
    for length in struct.unpack_from(f"<{count}I", raw):
        if length > len(raw) - at:
            raise IndexFormatError(f"section {name} is damaged: a column reaches past its end")
        out.append(raw[at : at + length])
        at += length
    if at != len(raw):
        raise IndexFormatError(f"section {name} is damaged: bytes behind its last column")
    return out
