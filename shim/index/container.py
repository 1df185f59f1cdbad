"""The index file's outer form: header, section table, sections, trailer (FORMAT.md has the byte table).

All offsets are relative to the header, and the last 16 bytes of the file lead to it, so the whole may stand behind
other data: a file may begin with a Go clip file, and each reader sees its own part. What a section means is not known
here.
"""

from __future__ import annotations

import lzma
import struct
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from hashlib import sha256
from types import TracebackType

from shim.errors import IndexFormatError

MAGIC = b"\x89CSI\r\n\x1a\n"  # a high byte, letters, both line ends and ctrl-Z: text-mode transfers damage it visibly
END_MAGIC = b"CSI-END\n"
GO_MAGIC = b"\x89CLIP\r\n\x1a\n"
MAJOR = 1
MINOR = 0
MAX_FILE = 512 << 20
MAX_SECTIONS = 64
MANDATORY = 1  # flag: a reader that does not know the section must refuse the file

STORED = 0
LZMA2 = 1
_MAX_DICT = 8 << 20  # decoding takes this much memory beside the result, encoding about 12 times as much
PIECE = 256 << 10  # sections are compressed in pieces of this length, side by side; those longer than _SMALL in pieces
_SMALL = 4 << 20  # of _LARGE_PIECE: two at a time take 12 times as much memory, and nearly all that repeats does so
_LARGE_PIECE = 4 << 20  # within one
_FREE_RAW = 64 << 10
_MAX_RATIO = 64  # raw bytes for each byte of the file: what a small file can make a reader allocate is bounded
_PADDING = b"fill"  # an optional section of zeros that a very regular index gets to keep within that ratio

_HEADER = struct.Struct("<8sHHIQ8s32s")  # magic, major, minor, sections, total length, zero, SHA-256 of the table
_ROW = struct.Struct("<4sHHQQQ32s")  # tag, flags, codec, offset, stored length, raw length, SHA-256 of the stored bytes
_TRAILER = struct.Struct("<Q8s")  # total length, end magic


@dataclass(frozen=True, slots=True)
class Section:
    """One row of the section table. `offset` counts from the header."""

    tag: bytes
    flags: int
    codec: int
    offset: int
    length: int
    raw_length: int
    sha256: bytes


@dataclass(frozen=True, slots=True)
class Container:
    """A parsed section table over `view`, our part of the file (header to trailer). Sections are checked when read."""

    view: memoryview
    sections: Mapping[bytes, Section]
    minor: int

    def read(self, tag: bytes, limit: int) -> bytes:
        """The raw bytes of section `tag`, its hash and lengths checked; at most `limit` bytes are allocated for them.

        Raises IndexFormatError: the section is absent, damaged, longer than `limit`, or of an unknown codec.
        """
        name = tag.decode("ascii", "replace")
        section = self.sections.get(tag)
        if section is None:
            raise IndexFormatError(f"the index has no section {name}")
        if section.raw_length > limit:
            raise IndexFormatError(f"section {name} is {section.raw_length} bytes long, at most {limit} are allowed")
        stored = bytes(self.view[section.offset : section.offset + section.length])
        if sha256(stored).digest() != section.sha256:
            raise IndexFormatError(f"section {name} is damaged: its SHA-256 is not the one in the table")
        if section.codec == STORED:
            if section.raw_length != section.length:
                raise IndexFormatError(f"section {name} contradicts itself: stored as it is, with two lengths")
            return stored
        if section.codec != LZMA2:
            raise IndexFormatError(f"section {name} uses codec {section.codec}, which this version does not know")
        return _decompress(stored, section.raw_length, name)


def _filters(raw_length: int) -> list[dict[str, int]]:
    """LZMA2 as section raw bytes of this length are coded; the decoder needs `dict_size` alone of it."""
    size = min(max(4096, 1 << (raw_length - 1).bit_length()) if raw_length else 4096, _MAX_DICT)
    # nice_len: half of the preset's saves a sixth of the time and costs a hundredth of a tree's length
    return [{"id": lzma.FILTER_LZMA2, "preset": 9, "nice_len": 32, "dict_size": size, "lc": 3, "lp": 0, "pb": 0}]


def _decompress(stored: bytes, raw_length: int, name: str) -> bytes:
    decoder = lzma.LZMADecompressor(lzma.FORMAT_RAW, filters=_filters(raw_length))
    try:
        raw = decoder.decompress(stored, max_length=raw_length + 1)
    except (lzma.LZMAError, EOFError) as error:
        raise IndexFormatError(f"section {name} cannot be decompressed: {error}") from error
    if len(raw) != raw_length or not decoder.eof or decoder.unused_data:
        raise IndexFormatError(f"section {name} does not decompress to the {raw_length} bytes the table promises")
    return raw


def _compress(piece: bytes) -> bytes:
    """One LZMA2 stream. Its dictionary is no longer than the piece, so the section's decoder can read it."""
    return lzma.compress(piece, lzma.FORMAT_RAW, filters=_filters(len(piece)))


class Piece:
    """A piece of a section that is being compressed, or is.

    Each is an LZMA2 stream, which begins by resetting the dictionary and ends with a zero byte: without those in
    between, the streams one after the other are one stream. Costs a hundredth of the length, saves half the time.
    """

    def __init__(self, pool: ThreadPoolExecutor, raw: bytes) -> None:
        self.raw = raw
        self._packed = pool.submit(_compress, raw)

    def packed(self) -> bytes:
        """Waits for it."""
        return self._packed.result()


@dataclass(frozen=True, slots=True)
class _Section:
    tag: bytes
    flags: int
    raw: bytes
    pieces: Sequence[Piece]

    def stored(self) -> tuple[int, bytes]:
        """(codec, stored bytes): whichever is shorter."""
        *others, last = (piece.packed() for piece in self.pieces)
        packed = b"".join([*(other[:-1] for other in others), last])
        return (LZMA2, packed) if len(packed) < len(self.raw) else (STORED, self.raw)


class Packer:
    """Makes a file of sections, compressing what it has while the caller makes the rest. Use it in a `with` block."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(2)
        self._sections: list[_Section] = []

    def __enter__(self) -> Packer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._pool.shutdown(cancel_futures=True)

    def pieces(self, raw: bytes) -> list[Piece]:
        """Begin to compress a section, or the next part of one."""
        most = PIECE if len(raw) <= _SMALL else _LARGE_PIECE
        size = -(-len(raw) // -(-len(raw) // most)) if raw else 1
        return [Piece(self._pool, raw[at : at + size]) for at in range(0, max(1, len(raw)), size)]

    def add(self, tag: bytes, flags: int, pieces: Sequence[Piece]) -> None:
        """tag: four bytes; pieces: at least one."""
        self._sections.append(_Section(tag, flags, b"".join([piece.raw for piece in pieces]), pieces))

    def finish(self, order: Sequence[bytes] = ()) -> bytes:
        """The file, its sections in the order of the tags in `order`, others as they were added, and padding if need
        be. Raises IndexFormatError if it is too long."""
        place = {tag: number for number, tag in enumerate(order)}
        sections = sorted(self._sections, key=lambda section: place.get(section.tag, len(place)))
        return _assemble([(s.tag, s.flags, s.raw) for s in sections], [s.stored() for s in sections])


def pack(sections: list[tuple[bytes, int, bytes]]) -> bytes:
    """The file made of `sections`: (four-byte tag, flags, raw bytes), in this order, and padding if need be."""
    with Packer() as packer:
        for tag, flags, raw in sections:
            packer.add(tag, flags, packer.pieces(raw))
        return packer.finish()


def _assemble(sections: list[tuple[bytes, int, bytes]], packed: list[tuple[int, bytes]]) -> bytes:
    parts = [(tag, flags, len(raw), *done) for (tag, flags, raw), done in zip(sections, packed, strict=True)]
    total = _HEADER.size + _TRAILER.size + sum(_ROW.size + len(stored) for *_, stored in parts)
    excess = sum(len(raw) for *_, raw in sections) - _FREE_RAW - _MAX_RATIO * total
    if excess > 0:
        padding = bytes(excess // (_MAX_RATIO - 1) + 1)
        parts.append((_PADDING, 0, len(padding), STORED, padding))
        total += _ROW.size + len(padding)
    rows = []
    offset = _HEADER.size + _ROW.size * len(parts)
    for tag, flags, length, codec, stored in parts:
        rows.append(_ROW.pack(tag, flags, codec, offset, len(stored), length, sha256(stored).digest()))
        offset += len(stored)
    table = b"".join(rows)
    if total > MAX_FILE:
        raise IndexFormatError(f"the index would be {total} bytes long, at most {MAX_FILE} are allowed")
    header = _HEADER.pack(MAGIC, MAJOR, MINOR, len(parts), total, bytes(8), sha256(table).digest())
    return b"".join([header, table, *(stored for *_, stored in parts), _TRAILER.pack(total, END_MAGIC)])


def start_of_part(read: Callable[[int, int], bytes], size: int) -> int:
    """Where our part of a file of `size` bytes begins, by its trailer; 0 if it has none that could be true.

    read(offset, length) gives bytes of the file. What stands before our part, an archive's data, may be huge.
    """
    tail = read(size - _TRAILER.size, _TRAILER.size) if size >= _TRAILER.size else b""
    if len(tail) == _TRAILER.size:
        total, magic = _TRAILER.unpack(tail)
        if magic == END_MAGIC and _HEADER.size + _TRAILER.size <= total <= min(size, MAX_FILE):
            return int(size - total)
    return 0


def locate(view: memoryview) -> tuple[int, int]:
    """(offset, length) of our part within a file. Raises IndexFormatError if there is none."""
    if len(view) >= _TRAILER.size:
        total, magic = _TRAILER.unpack_from(view, len(view) - _TRAILER.size)
        if magic == END_MAGIC:
            if not _HEADER.size + _TRAILER.size <= total <= min(len(view), MAX_FILE):
                raise IndexFormatError("the index is damaged: its trailer gives an impossible length")
            return len(view) - total, total
    if len(view) == 0:
        raise IndexFormatError("the file is empty, not an index")
    if bytes(view[: len(GO_MAGIC)]) == GO_MAGIC:
        raise IndexFormatError("this is a Go clip file, which has no restart points and no full file attributes")
    if bytes(view[: len(MAGIC)]) == MAGIC:
        raise IndexFormatError("the index is cut short or has bytes behind its end")
    raise IndexFormatError("the file is not a clip index")


def parse(view: memoryview, known: frozenset[bytes]) -> Container:
    """Find our part of the file in `view` and check header, table and trailer; `known` are the tags the caller reads.

    Raises IndexFormatError: not an index, damaged, of another major version, or with a mandatory section not `known`.
    """
    base, total = locate(view)
    part = view[base : base + total]
    magic, major, minor, count, claimed, zero, digest = _HEADER.unpack_from(part)
    if magic != MAGIC or claimed != total:
        raise IndexFormatError("the index is damaged: header and trailer do not belong together")
    if major != MAJOR:
        raise IndexFormatError(f"the index has format version {major}.{minor}, this clip-shim reads {MAJOR}.x")
    if any(zero) or not 1 <= count <= MAX_SECTIONS or _HEADER.size + count * _ROW.size + _TRAILER.size > total:
        raise IndexFormatError("the index header is damaged")
    end = _HEADER.size + count * _ROW.size
    if sha256(part[_HEADER.size : end]).digest() != digest:
        raise IndexFormatError("the section table is damaged: its SHA-256 is not the one in the header")
    sections: dict[bytes, Section] = {}
    for row in range(count):
        section = Section(*_ROW.unpack_from(part, _HEADER.size + row * _ROW.size))
        # One after the other without gaps: nothing can overlap or hide.
        if section.offset != end or section.length > total - _TRAILER.size - end:
            raise IndexFormatError(f"the section table is damaged: row {row} lies outside its place")
        if section.tag in sections:
            raise IndexFormatError(f"the section table is damaged: row {row} repeats a tag")
        if section.tag not in known and section.flags & MANDATORY:
            name = section.tag.decode("ascii", "backslashreplace")
            raise IndexFormatError(f"the index has a section {name} that a reader must know: update clip-shim")
        end += section.length
        sections[section.tag] = section
    if sum(section.raw_length for section in sections.values()) > _FREE_RAW + _MAX_RATIO * total:
        raise IndexFormatError("the index claims to expand more than a reader believes")
    if end != total - _TRAILER.size:
        raise IndexFormatError("the section table is damaged: it does not cover the file")
    return Container(part, sections, minor)
