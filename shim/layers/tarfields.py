"""The parts of tar headers: numbers, PAX records, times and sparse maps, each judged as Go's archive/tar judges it.

Docker and containerd read layers with archive/tar, so a layer means what it says there; sources cited are its files.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache

from shim.errors import LayerError

SPECIAL_LIMIT = 1 << 20  # a PAX header, GNU long name or sparse map is at most this long (format.go maxSpecialFileSize)
INT64_MAX = (1 << 63) - 1
INT64_MIN = -(1 << 63)

XATTR_PREFIX = b"SCHILY.xattr."
SPARSE_MAP = b"GNU.sparse.map"
_SPARSE_OFFSET, _SPARSE_LENGTH = b"GNU.sparse.offset", b"GNU.sparse.numbytes"
_STRING_KEYS = (b"path", b"linkpath", b"uname", b"gname")

SparseMap = list[tuple[int, int]]  # (logical offset, length), as the archive gives them


def bad(what: str, offset: int) -> LayerError:
    """The error for a header that archive/tar refuses too."""
    return LayerError(f"not a valid tar archive: {what} at byte {offset}")


def parse_number(field: bytes, offset: int) -> int:
    """A numeric header field: octal, or base-256 if its first bit is set (strconv.go parseNumeric, parseOctal)."""
    if field[0] & 0x80:
        negative = bool(field[0] & 0x40)
        body = bytes([field[0] & 0x7F]) + field[1:]
        if negative:
            body = bytes([~field[0] & 0x7F]) + bytes(~byte & 0xFF for byte in field[1:])
        value = int.from_bytes(body, "big")
        if value > INT64_MAX:
            raise bad("number out of range in the header", offset)
        return ~value if negative else value
    digits = field.strip(b" \0").partition(b"\0")[0]
    if not digits:
        return 0
    if digits.translate(None, b"01234567"):
        raise bad("malformed number in the header", offset)
    value = int(digits, 8)
    if value >= 1 << 64:
        raise bad("number out of range in the header", offset)
    # Go parses 64 unsigned bits and takes them as signed.
    return value if value <= INT64_MAX else value - (1 << 64)


def number(field: bytes, offset: int) -> int:
    """parse_number, quickly for the usual form."""
    value = _usual(field)
    return parse_number(field, offset) if value is None else value


def _usual(field: bytes) -> int | None:
    """A number of octal digits, then spaces or NULs; None for any other form."""
    text = field.rstrip(b"\0 ")
    if not text:
        return 0
    if text.isdigit():
        try:
            return int(text, 8)
        except ValueError:
            pass  # it has an 8 or a 9
    return None


@lru_cache(256)
def owner(mode: bytes, uid: bytes, gid: bytes) -> tuple[int, int, int] | None:
    """These fields in their usual form, or None: entries have few different ones."""
    numbers = _usual(mode), _usual(uid), _usual(gid)
    return None if None in numbers else numbers  # type: ignore[return-value]


def parse_int(text: bytes, offset: int) -> int:
    """A decimal number of a PAX record or sparse map (Go's ParseInt with 64 bits)."""
    digits = text[1:] if text[:1] in (b"+", b"-") else text
    if digits.isdigit() and len(digits := digits.lstrip(b"0") or b"0") < 20:
        value = -int(digits) if text[:1] == b"-" else int(digits)
        if INT64_MIN <= value <= INT64_MAX:
            return value
    raise bad("malformed number in an extended header", offset)


def parse_time(text: bytes, offset: int) -> int:
    """A PAX time, seconds with a fraction, as nanoseconds (strconv.go parsePAXTime): digits past the ninth are cut."""
    whole, _, rest = text.partition(b".")
    if rest and not rest.isdigit():
        raise bad("malformed time in an extended header", offset)
    seconds = parse_int(whole, offset) * 1_000_000_000
    fraction = int(rest[:9].ljust(9, b"0"))
    return seconds - fraction if text[:1] == b"-" else seconds + fraction


def clamp_time(nanoseconds: int) -> int:
    """What fits in signed 64 bits, as file systems and the index keep it (the years 1678 to 2262)."""
    return max(INT64_MIN, min(INT64_MAX, nanoseconds))


def parse_pax(data: bytes, offset: int) -> dict[bytes, bytes]:
    """The records of one PAX extended header (reader.go parsePAX, strconv.go parsePAXRecord); a later key wins.

    Sparse format 0.0, with its repeated keys, comes out as format 0.1's map.
    """
    records: dict[bytes, bytes] = {}
    sparse: list[bytes] = []
    at = 0
    while at < len(data):
        space = data.find(b" ", at, at + 20)
        length = parse_int(data[at:space] if space > 0 else b"", offset)
        end = at + length
        if length < 5 or end > len(data) or end <= space + 1 or data[end - 1] != 0x0A:
            raise bad("malformed extended header", offset)
        key, equals, value = data[space + 1 : end - 1].partition(b"=")
        if not key or not equals or (b"\0" in (value if key in _STRING_KEYS else key)):
            raise bad("malformed extended header", offset)
        if key in (_SPARSE_OFFSET, _SPARSE_LENGTH):
            if (key == _SPARSE_LENGTH) != len(sparse) % 2 or b"," in value:
                raise bad("malformed sparse map", offset)
            sparse.append(value)
        else:
            records[key] = value
        at = end
    if sparse:
        records[SPARSE_MAP] = b",".join(sparse)
    return records


def sparse_version(records: dict[bytes, bytes]) -> str:
    """ "0" for sparse formats 0.0 and 0.1, "1" for 1.0, "" for a file that is not sparse, or in no known format."""
    major, minor = records.get(b"GNU.sparse.major", b""), records.get(b"GNU.sparse.minor", b"")
    if major == b"0" and minor in (b"0", b"1"):
        return "0"
    if major == b"1" and minor == b"0":
        return "1"
    return "0" if not major and not minor and records.get(SPARSE_MAP) else ""


def sparse_from_pax(records: dict[bytes, bytes], offset: int) -> SparseMap:
    """The map of PAX sparse formats 0.0 and 0.1 (reader.go readGNUSparseMap0x1)."""
    count = parse_int(records.get(b"GNU.sparse.numblocks", b""), offset)
    numbers = records.get(SPARSE_MAP, b"").split(b",") if records.get(SPARSE_MAP) else []
    if count < 0 or len(numbers) != 2 * count:
        raise bad("malformed sparse map", offset)
    return _pairs((parse_int(number, offset) for number in numbers), count)


class SparseMapReader:
    """The map that starts the data of a PAX sparse 1.0 file, read block by block (reader.go readGNUSparseMap1x0).

    A count, then count times offset and length, each on a line of its own; the file's data begins with the next block.
    """

    def __init__(self, offset: int) -> None:
        self._offset = offset
        self._data = bytearray()
        self._lines = 0
        self._count = -1

    def feed(self, block: bytes) -> SparseMap | None:
        """The map, or None if another block is needed."""
        self._data += block
        self._lines += block.count(b"\n")
        if len(self._data) > SPECIAL_LIMIT:
            raise bad("a sparse map that is too long", self._offset)
        if self._count < 0 and self._lines:
            self._count = parse_int(bytes(self._data[: self._data.index(b"\n")]), self._offset)
            if not 0 <= self._count <= SPECIAL_LIMIT:
                raise bad("malformed sparse map", self._offset)
        wanted = 2 * self._count + 1
        if self._count < 0 or self._lines < wanted:
            return None
        lines = bytes(self._data).split(b"\n", wanted)[1:wanted]
        return _pairs((parse_int(line, self._offset) for line in lines), self._count)


def sparse_from_block(block: bytes, start: int, entries: int, offset: int) -> tuple[SparseMap, bool]:
    """One piece of an old GNU sparse map: up to `entries` pairs from `start`, then whether more follow.

    (reader.go readOldGNUSparseMap.)
    """
    found: SparseMap = []
    for at in range(start, start + 24 * entries, 24):
        if block[at] == 0:
            break
        found.append((parse_number(block[at : at + 12], offset), parse_number(block[at + 12 : at + 24], offset)))
    return found, block[start + 24 * entries] > 0


def _pairs(numbers: Iterable[int], count: int) -> SparseMap:
    iterator = iter(numbers)
    return [(next(iterator), next(iterator)) for _ in range(count)]


def place_sparse(
    sparse: SparseMap, size: int, data_offset: int, stored: int, offset: int
) -> tuple[tuple[int, int, int], ...]:
    """(logical, tar offset, length) of each piece of a sparse file of `size` bytes, of which `stored` are in the tar.

    Refuses what archive/tar refuses (common.go validateSparseEntries; reader.go errMissData, errUnrefData).
    """
    extents: list[tuple[int, int, int]] = []
    previous, at = 0, data_offset
    for logical, length in sparse:
        if logical < previous or length < 0 or logical + length > size:
            raise bad("impossible sparse map", offset)
        if length:
            extents.append((logical, at, length))
        previous = logical + length
        at += length
    if size < 0 or at != data_offset + stored:
        raise bad("sparse map that does not match its data", offset)
    return tuple(extents)
