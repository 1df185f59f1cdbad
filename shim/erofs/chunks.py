"""Where a file's bytes lie: its extents as EROFS chunk indexes, and what must be copied into the image.

A chunk is a power of two of blocks, and the whole of it is one piece of one device, or a hole
(fs/erofs/data.c: erofs_map_blocks). Nearly every file of a tar is one extent and so one chunk; sparse members are not.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence

from shim.erofs.format import BLOCK, BLOCK_BITS, CHUNK_INDEX, MAX_ADDR, MAX_CHUNK_BITS, NULL_ADDR
from shim.errors import IndexFormatError
from shim.index.model import Extent

MAX_FILE = (MAX_ADDR + 1) << BLOCK_BITS  # 2 TiB: 32-bit block addresses
MAX_INDEX_BYTES = 64 << 20  # chunk indexes of one file; also bounds the memory it takes
_COPY = 1 << 20
_HOLE = CHUNK_INDEX.pack(0, 0, NULL_ADDR)

ReadLayer = Callable[[int, int, int], bytes]


class Plan:
    """A file that is not one plain chunk. `bits`: log2 of the chunk size in blocks; `indexes`: the packed chunk
    indexes; `copies`: (chunk number, first byte, end) in the file of each chunk whose data goes into the image."""

    __slots__ = ("bits", "copies", "extents", "indexes")

    def __init__(self, bits: int, indexes: bytearray, copies: list[tuple[int, int, int]], extents: list[Extent]):
        self.bits = bits
        self.indexes = indexes
        self.copies = copies
        self.extents = extents

    @property
    def copied_blocks(self) -> int:
        return sum((end - start + BLOCK - 1) >> BLOCK_BITS for _, start, end in self.copies)

    def place(self, block: int) -> None:
        """Say at which block of the image the copied chunks begin; they follow each other."""
        for number, start, end in self.copies:
            CHUNK_INDEX.pack_into(self.indexes, number * CHUNK_INDEX.size, 0, 0, block)
            block += (end - start + BLOCK - 1) >> BLOCK_BITS

    def read_copies(self, read_layer: ReadLayer) -> Iterator[bytes]:
        """The copied chunks' bytes, each padded to a block, in pieces of at most 1 MiB."""
        starts = [extent.logical for extent in self.extents]
        for _, start, end in self.copies:
            for position in range(start, end, _COPY):
                stop = min(position + _COPY, end)
                piece = bytearray(stop - position)
                i = max(bisect_right(starts, position) - 1, 0)
                while i < len(starts) and starts[i] < stop:
                    self._copy(self.extents[i], position, stop, piece, read_layer)
                    i += 1
                yield bytes(piece) + bytes(-len(piece) % BLOCK)

    @staticmethod
    def _copy(extent: Extent, position: int, stop: int, piece: bytearray, read_layer: ReadLayer) -> None:
        first = max(extent.logical, position)
        last = min(extent.logical + extent.length, stop)
        if first >= last:
            return
        data = read_layer(extent.layer, extent.offset + first - extent.logical, last - first)
        if len(data) != last - first:
            raise IndexFormatError(f"layer {extent.layer} gave {len(data)} bytes where {last - first} were asked for")
        piece[first - position : last - position] = data


def chunk_bits(size: int) -> int:
    """log2 of the smallest chunk, in blocks, that holds `size` > 0 bytes, or the largest there is."""
    return min(((size - 1) >> BLOCK_BITS).bit_length(), MAX_CHUNK_BITS)


def too_sparse(most: int) -> IndexFormatError:
    return IndexFormatError(
        f"the image's sparse files need more than {most >> 20} MiB copied into the tree image",
        hint="use the portable tree for this image: set `tree: fuse`",
    )


def plan(size: int, extents: Sequence[Extent], device_sizes: Sequence[int], most: int) -> Plan:
    """Cut a file into chunks so that indexes and copied bytes together are fewest, the copies at most `most` bytes.
    IndexFormatError if it cannot be."""
    if not 0 < size <= MAX_FILE:
        raise IndexFormatError("a file larger than 2 TiB cannot be mounted")
    merged = _merged(size, extents, device_sizes)
    bits, mixed = _choose(merged, size)
    chunk = BLOCK << bits
    if sum(min(b * chunk + chunk, size) - a * chunk for a, b in mixed) > most:
        raise too_sparse(most)
    count = (size + chunk - 1) // chunk
    indexes = bytearray(_HOLE) * count
    pack, step = CHUNK_INDEX.pack_into, chunk >> BLOCK_BITS
    for extent in merged:
        shift = extent.offset - extent.logical
        if shift % BLOCK:
            continue
        end = extent.logical + extent.length
        first = (extent.logical + chunk - 1) // chunk
        last = count if end == size else end // chunk
        block = (first * chunk + shift) >> BLOCK_BITS
        for number in range(first, last):
            pack(indexes, number * CHUNK_INDEX.size, 0, extent.layer + 1, block)
            block += step
    copies = [
        (number, number * chunk, min(number * chunk + chunk, size)) for a, b in mixed for number in range(a, b + 1)
    ]
    return Plan(bits, indexes, copies, merged)


def _merged(size: int, extents: Sequence[Extent], device_sizes: Sequence[int]) -> list[Extent]:
    """The file's extents, checked, neighbours that continue each other made one."""
    merged: list[Extent] = []
    reached = 0
    for extent in extents:
        logical, layer, offset, length = extent
        if length <= 0 or offset < 0 or logical < reached or logical + length > size:
            raise IndexFormatError("its extents overlap, are out of order or lie outside the file")
        if not 0 <= layer < len(device_sizes) or offset + length > device_sizes[layer]:
            raise IndexFormatError("one of its extents lies outside its layer")
        if merged and logical == reached and merged[-1].layer == layer:
            last = merged[-1]
            if last.offset + last.length == offset:
                merged[-1] = last._replace(length=last.length + length)
                reached = logical + length
                continue
        merged.append(extent)
        reached = logical + length
    return merged


def _choose(extents: list[Extent], size: int) -> tuple[int, list[tuple[int, int]]]:
    """(bits, ranges of chunks to copy) with the least bytes. Copied bytes only grow with the chunk size."""
    boundaries = 0
    unaligned = False
    for extent in extents:
        end = extent.logical + extent.length
        boundaries |= extent.logical | (0 if end == size else end)
        unaligned = unaligned or (extent.offset - extent.logical) % BLOCK != 0
    largest = chunk_bits(size)
    smallest = largest
    if unaligned or boundaries % BLOCK:
        smallest = 0
    elif boundaries:  # up to here every chunk is all hole or all one extent
        smallest = min(((boundaries & -boundaries) >> BLOCK_BITS).bit_length() - 1, largest)
    best: tuple[int, int, list[tuple[int, int]]] | None = None
    for bits in range(smallest, largest + 1):
        chunk = BLOCK << bits
        table = (size + chunk - 1) // chunk * CHUNK_INDEX.size
        if table > MAX_INDEX_BYTES:
            continue
        mixed = _mixed(extents, size, chunk)
        copied = sum(min(b * chunk + chunk, size) - a * chunk for a, b in mixed)
        if best is None or table + copied <= best[0]:
            best = (table + copied, bits, mixed)
        if copied >= best[0]:
            break
    if best is None:
        raise IndexFormatError("it has too many holes for its size")
    return best[1], best[2]


def _mixed(extents: list[Extent], size: int, chunk: int) -> list[tuple[int, int]]:
    """The chunks, as sorted inclusive ranges, that no single aligned extent fills."""
    ranges: list[tuple[int, int]] = []

    def add(a: int, b: int) -> None:
        if ranges and a <= ranges[-1][1] + 1:
            ranges[-1] = (ranges[-1][0], max(b, ranges[-1][1]))
        else:
            ranges.append((a, b))

    for logical, _, offset, length in extents:
        end = logical + length
        first, last = logical // chunk, (end - 1) // chunk
        if (offset - logical) % BLOCK:
            add(first, last)
            continue
        if logical % chunk:
            add(first, first)
        if end % chunk and end != size:
            add(last, last)
    return ranges
