"""A pull reader over pieces of a compressed stream that knows its absolute offset."""

from __future__ import annotations

from collections.abc import Iterable

from shim.errors import LayerError


class Source:
    """Reads `chunks` in order. `chunk[pos:]` is what is left of the current piece; `offset` is that of `chunk[pos]`.

    Decoders look at `chunk` and move `pos` themselves: inflating needs addresses, not copies.
    """

    __slots__ = ("_base", "_chunks", "chunk", "pos")

    def __init__(self, chunks: Iterable[bytes], offset: int = 0) -> None:
        self._chunks = iter(chunks)
        self._base = offset  # of chunk[0]
        self.chunk = b""
        self.pos = 0

    @property
    def offset(self) -> int:
        return self._base + self.pos

    def more(self) -> bool:
        """Make at least one byte available; False at the end of the stream."""
        while self.pos >= len(self.chunk):
            following = next(self._chunks, None)
            if following is None:
                return False
            self._base += len(self.chunk)
            self.chunk = following if isinstance(following, bytes) else bytes(following)
            self.pos = 0
        return True

    def need(self) -> None:
        """Make at least one byte available; LayerError at the end of the stream."""
        if not self.more():
            raise LayerError(f"the compressed stream ends too early, at byte {self.offset}")

    def peek(self, count: int) -> bytes:
        """The next `count` bytes without moving on; fewer only at the end of the stream."""
        while len(self.chunk) - self.pos < count:
            following = next(self._chunks, None)
            if following is None:
                break
            rest = self.chunk[self.pos :]
            self._base += self.pos
            self.chunk, self.pos = rest + following, 0
        return self.chunk[self.pos : self.pos + count]

    def take(self, count: int) -> bytes:
        """Exactly `count` bytes; LayerError if the stream ends before."""
        piece = self.chunk[self.pos : self.pos + count]
        self.pos += len(piece)
        if len(piece) == count:
            return piece
        pieces = [piece]
        missing = count - len(piece)
        while missing:
            self.need()
            piece = self.chunk[self.pos : self.pos + missing]
            self.pos += len(piece)
            missing -= len(piece)
            pieces.append(piece)
        return b"".join(pieces)

    def skip(self, count: int) -> None:
        """Pass over exactly `count` bytes in constant memory; LayerError if the stream ends before."""
        while count:
            self.need()
            step = min(count, len(self.chunk) - self.pos)
            self.pos += step
            count -= step

    def rest_is_zero(self) -> bool:
        """Read to the end of the stream: are all remaining bytes zero?"""
        while self.more():
            if self.chunk.count(0, self.pos) != len(self.chunk) - self.pos:
                return False
            self.pos = len(self.chunk)
        return True
