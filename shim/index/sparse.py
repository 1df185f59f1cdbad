"""A sparse deflate window as a short record: only its runs of non-zero bytes. So kept in memory and span files.

Record: u16 count, count times (u16 start, u16 length), little-endian, then the runs' bytes. b"" stands for no window.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterable, MutableSequence, Sequence
from typing import overload

from shim.errors import IndexFormatError
from shim.index.model import WINDOW_SIZE

# A lone zero costs less inside a run than as the gap between two (measured: 0.5 % of the windows' size).
# What lies between runs is searched for, not the runs: repeats of one byte are what `re` is fast at.
_GAP = re.compile(rb"\0\0+|\A\0|\0\Z")
MAX_RUNS = WINDOW_SIZE // 2


def pack_window(window: bytes) -> bytes:
    """The record of a window of WINDOW_SIZE bytes, or b"" of b""."""
    if not window:
        return b""
    numbers: list[int] = []
    pieces = []
    start = 0
    for gap in _GAP.finditer(window):
        end, following = gap.span()
        if end > start:
            numbers += (start, end - start)
            pieces.append(window[start:end])
        start = following
    if start < len(window):
        numbers += (start, len(window) - start)
        pieces.append(window[start:])
    return make_record(numbers, b"".join(pieces))


def make_record(numbers: Sequence[int], data: bytes) -> bytes:
    """The record of runs given as start, length, start, length …, and their bytes."""
    return struct.pack(f"<{len(numbers) + 1}H", len(numbers) // 2, *numbers) + data


def split_record(record: bytes) -> tuple[tuple[int, ...], int]:
    """(start, length, start, length …; where the runs' bytes begin) of a non-empty record.

    Raises IndexFormatError unless the runs are ascending, disjoint, within the window and as long as the bytes given.
    """
    count = record[0] | record[1] << 8 if len(record) >= 2 else MAX_RUNS + 1
    at = 2 + 4 * count
    if count > MAX_RUNS or at > len(record):
        raise IndexFormatError("a window's record is damaged")
    numbers = struct.unpack_from(f"<{2 * count}H", record, 2)
    end = 0
    for start, length in zip(numbers[::2], numbers[1::2], strict=True):
        if start < end or not length:
            raise IndexFormatError("a window's runs overlap")
        end = start + length
    if end > WINDOW_SIZE or sum(numbers[1::2]) != len(record) - at:
        raise IndexFormatError("a window's runs do not fit their bytes")
    return numbers, at


def unpack_window(record: bytes) -> bytes:
    """The window of a record. Raises IndexFormatError for a damaged one."""
    if not record:
        return b""
    numbers, at = split_record(record)
    window = bytearray(WINDOW_SIZE)
    for start, length in zip(numbers[::2], numbers[1::2], strict=True):
        window[start : start + length] = record[at : at + length]
        at += length
    return bytes(window)


class SparseWindows(MutableSequence[bytes]):
    """A list of windows that holds their records: some 4 KiB each. Items go in and come out WINDOW_SIZE long or b""."""

    def __init__(self, windows: Iterable[bytes] = (), *, records: list[bytes] | None = None) -> None:
        self.records: list[bytes] = [] if records is None else records
        self.extend(windows)

    def __len__(self) -> int:
        return len(self.records)

    @overload
    def __getitem__(self, index: int) -> bytes: ...
    @overload
    def __getitem__(self, index: slice) -> SparseWindows: ...
    def __getitem__(self, index: int | slice) -> bytes | SparseWindows:
        if isinstance(index, slice):
            return SparseWindows(records=self.records[index])
        return unpack_window(self.records[index])

    @overload
    def __setitem__(self, index: int, value: bytes) -> None: ...
    @overload
    def __setitem__(self, index: slice, value: Iterable[bytes]) -> None: ...
    def __setitem__(self, index: int | slice, value: bytes | Iterable[bytes]) -> None:
        if isinstance(index, slice):
            self.records[index] = [pack_window(bytes(window)) for window in value]
        else:
            assert isinstance(value, bytes)
            self.records[index] = pack_window(value)

    def __delitem__(self, index: int | slice) -> None:
        del self.records[index]

    def insert(self, index: int, value: bytes) -> None:
        self.records.insert(index, pack_window(value))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, MutableSequence) and len(self) == len(other) and all(map(bytes.__eq__, self, other))

    __hash__ = None  # type: ignore[assignment]


def records_of(windows: MutableSequence[bytes]) -> list[bytes]:
    """The records of any list of windows; no work if it holds them already."""
    return windows.records if isinstance(windows, SparseWindows) else [pack_window(window) for window in windows]
