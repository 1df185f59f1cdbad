"""Sparse deflate windows: which of the 32 KiB before a restart point does the data after it really use?

Two inflaters start at the point with made-up windows whose bytes, taken together, encode their own position: byte i of
one window and byte i of the other form a pair of *unequal* bytes that no other position has. What comes out of the
first 32 KiB is either equal in both (a literal) or such a pair (a copy of a window byte). Further on no distance can
reach the window (RFC 1951: at most 32 KiB back), and copies of copies were seen already. The rest is zeroed, exactly.
"""

from __future__ import annotations

from array import array
from functools import cache

from shim.index.model import WINDOW_SIZE
from shim.layers import libz

# A pair of bytes as a 16-bit number is a multiple of 257 where they are equal. So position p is the pair
# p // 256 * 257 + p % 256 + 1, and where pairs are indexes, every 257th place is none of the window's.
_ROW = 257
_EQUAL = range(0, 1 << 16, _ROW)


@cache
def _markers() -> tuple[bytes, bytes]:
    """The two windows."""
    pairs = [pair for pair in range(1 << 16) if pair % _ROW][:WINDOW_SIZE]
    both = array("H", pairs).tobytes()  # native order, as in `sparse`
    return both[0::2], both[1::2]


class MarkerProbe:
    """Follows the compressed data after one restart point after another."""

    def __init__(self) -> None:
        self._inflaters = (libz.RawInflate(), libz.RawInflate())
        self._outputs = (bytearray(WINDOW_SIZE), bytearray(WINDOW_SIZE))
        self._targets = tuple(libz.address_of_buffer(output) for output in self._outputs)
        self._sizes = [0, 0]
        self._ended = False

    def start(self, bits: int, byte: int) -> None:
        """Begin at a point whose first bits are the upper `bits` of `byte`."""
        for inflater, marker in zip(self._inflaters, _markers(), strict=True):
            inflater.reset()
            inflater.prime(bits, byte)
            inflater.set_window(marker)
        self._sizes = [0, 0]
        self._ended = False

    def feed(self, chunk: bytes, start: int, end: int) -> None:
        """The next compressed bytes, `chunk[start:end]`. What lies past 32 KiB of output is ignored."""
        address = libz.address_of(chunk)
        for i, inflater in enumerate(self._inflaters):
            at = start
            while at < end and self._sizes[i] < WINDOW_SIZE and not self._ended:
                status, consumed, produced, _ = inflater.inflate(
                    address + at,
                    end - at,
                    self._targets[i] + self._sizes[i],
                    WINDOW_SIZE - self._sizes[i],
                    libz.Z_NO_FLUSH,
                )
                at += consumed
                self._sizes[i] += produced
                if status == libz.Z_STREAM_END:
                    self._ended = i == 1  # the second one has to see this input too
                    break
                if not consumed and not produced:
                    break

    def sparse(self, window: bytes) -> bytes:
        """`window` (what came before the point) with unused bytes zeroed, WINDOW_SIZE long; b"" if none is used."""
        size = min(self._sizes)
        pairs = bytearray(2 * size)
        pairs[0::2] = memoryview(self._outputs[0])[:size]
        pairs[1::2] = memoryview(self._outputs[1])[:size]
        used = set(array("H", pairs))  # twice as fast as of a memoryview
        used.difference_update(_EQUAL)
        if not used:
            return b""
        full = window.rjust(WINDOW_SIZE, b"\0")
        by_pair = b"\0" + b"\0".join([full[at : at + _ROW - 1] for at in range(0, WINDOW_SIZE, _ROW - 1)])
        result = bytearray(len(by_pair))
        for pair in used:
            result[pair] = by_pair[pair]
        del result[::_ROW]
        return bytes(result)
