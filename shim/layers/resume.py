"""Inflating from the middle of a deflate stream, with ISA-L where it can be had, else with zlib.

ISA-L is about twice as fast but has no inflatePrime. A stream that begins inside a byte is given to it behind a prefix
of *empty* deflate blocks whose bits end exactly where the stream begins, so the stream's bits keep their places in
their bytes. (Shifting them instead would be wrong: stored blocks are aligned to the bytes of the original stream.)
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from functools import cache
from typing import Any, Protocol

from shim.errors import LayerError
from shim.index.model import WINDOW_SIZE
from shim.layers import libz

_STEP = 64 << 10  # compressed bytes given to an inflater at a time
_ROOM = 512 << 10  # most bytes it gives back at a time


class Inflater(Protocol):
    """One raw deflate stream from a restart point."""

    eof: bool  # the stream has ended
    hungry: bool  # it needs input to go on; False: there is more output than it could give at once

    def inflate(self, chunk: bytes, start: int) -> tuple[bytes | bytearray, int]:
        """Inflate from `chunk[start:]`: (some output, the new start). Raises LayerError if the stream is not valid."""


Begin = Callable[[int, int, bytes], Inflater]  # (bits, the byte they belong to, window) -> Inflater


class LibzInflater:
    """By zlib: inflatePrime sets the first bits."""

    def __init__(self, bits: int, byte: int, window: bytes) -> None:
        self.eof = False
        self.hungry = True
        self._inflater = libz.RawInflate()
        self._inflater.prime(bits, byte)
        if window:
            self._inflater.set_window(window)

    def inflate(self, chunk: bytes, start: int) -> tuple[bytes | bytearray, int]:
        output = bytearray(min(_ROOM, max(1 << 16, 8 * (len(chunk) - start))))
        status, used, made, _ = self._inflater.inflate(
            libz.address_of(chunk) + start,
            len(chunk) - start,
            libz.address_of_buffer(output),
            len(output),
            libz.Z_NO_FLUSH,
        )
        self.eof = status == libz.Z_STREAM_END
        self.hungry = made < len(output)
        del output[made:]
        return output, start + used


class IsalInflater:
    """By ISA-L: a prefix of empty blocks stands for the bits that are not ours."""

    def __init__(self, bits: int, byte: int, window: bytes) -> None:
        from isal import igzip_lib

        self.eof = False
        self.hungry = True
        self._error: Any = igzip_lib.error
        self._stream: Any = igzip_lib.IgzipDecompressor(flag=igzip_lib.DECOMP_DEFLATE, zdict=window)
        self._lead = b""
        if bits:
            prefix = prefixes()[8 - bits]
            self._lead = prefix[:-1] + bytes([prefix[-1] | byte >> (8 - bits) << (8 - bits)])

    def inflate(self, chunk: bytes, start: int) -> tuple[bytes | bytearray, int]:
        try:
            if self._lead:
                lead, self._lead = self._lead, b""
                output: bytes = self._stream.decompress(lead, _ROOM)
                if self._stream.eof:  # a point is never behind the last block's end
                    raise LayerError("not valid deflate data: it ends where it begins")
                if output:
                    return output, start
            end = min(start + _STEP, len(chunk)) if self.hungry else start
            output = self._stream.decompress(chunk[start:end], _ROOM)
        except self._error as error:
            raise LayerError(f"not valid deflate data: {error}") from None
        self.eof = self._stream.eof
        self.hungry = self._stream.needs_input
        return output, end - len(self._stream.unused_data) if self.eof else end


@cache
def prefixes() -> tuple[bytes, ...]:
    """For k = 0..7: empty deflate blocks whose bits end in the k low bits of the last byte (b"" for 0).

    An empty block with fixed codes is 10 bits long; for odd k one with dynamic codes, 91 bits, goes first.
    """
    fixed = [0, 1, 0] + [0] * 7  # BFINAL=0, BTYPE=01 (low bit first), end of block
    table: list[bytes] = [b""]
    for k in range(1, 8):
        bits = _empty_dynamic_block() if k % 2 else []
        while len(bits) % 8 != k:
            bits = bits + fixed
        padded = bits + [0] * (-len(bits) % 8)
        table.append(
            bytes(sum(bit << i for i, bit in enumerate(padded[at : at + 8])) for at in range(0, len(padded), 8))
        )
    return tuple(table)


def _empty_dynamic_block() -> list[int]:
    """RFC 1951 3.2.7: codes for the literal 255, the end of block and one distance, all one bit long; then the end."""

    def number(value: int, width: int) -> list[int]:
        return [value >> i & 1 for i in range(width)]

    bits = [0, 0, 1]  # BFINAL=0, BTYPE=10
    bits += number(0, 5) + number(0, 5) + number(14, 4)  # 257 literal codes, 1 distance code, 18 code length codes
    order = (16, 17, 18, 0, 8, 7, 9, 6, 10, 5, 11, 4, 12, 3, 13, 2, 14, 1)
    for symbol in order:
        bits += number(1 if symbol in (1, 18) else 0, 3)  # code 0 is "length 1", code 1 is "11 to 138 zeros"
    bits += [1, *number(138 - 11, 7), 1, *number(117 - 11, 7)]  # 255 zeros
    bits += [0, 0, 0]  # literal 255, end of block, distance 0: length 1 each
    return [*bits, 1]  # the end of block (of two codes of one bit, the second)


@cache
def best_inflater() -> Begin:
    """ISA-L if it is installed and passes a check of all bit positions, else zlib."""
    try:
        return IsalInflater if _works(IsalInflater) else LibzInflater
    except (ImportError, LayerError):
        return LibzInflater


def _works(begin: Begin) -> bool:
    """Does `begin` resume at each bit position, with a window?"""
    window = bytes(range(256)) * (WINDOW_SIZE // 256)
    text = window[1000:3000] + b"end"
    packer = zlib.compressobj(9, zlib.DEFLATED, -15, 9, zlib.Z_DEFAULT_STRATEGY, window)
    stream = packer.compress(text) + packer.flush()
    for k in range(8):
        data = (int.from_bytes(stream, "little") << k).to_bytes(len(stream) + 1, "little")  # it has no stored blocks
        inflater = begin(8 - k, data[0], window) if k else begin(0, 0, window)
        output, at = bytearray(), min(k, 1)
        while not inflater.eof:
            piece, following = inflater.inflate(data, at)
            if not piece and following == at and at == len(data):
                return False
            output += piece
            at = following
        if output != text:
            return False
    return True
