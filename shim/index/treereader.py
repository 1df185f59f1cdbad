"""A TREE section (treecodec) to a FlatTree. A container's start waits for it, and the bytes may be hostile."""

from __future__ import annotations

import stat
from collections.abc import Iterator, Sequence
from itertools import accumulate

from shim.errors import IndexFormatError
from shim.index.columns import split, unpack, unzigzag
from shim.index.flat import Attributes, Directory, FlatTree, show_path
from shim.index.model import BLOCK, Extent
from shim.index.treecodec import COLUMNS
from shim.index.validate import (
    DEVICES,
    FILE_TYPE,
    MAX_ENTRIES,
    MAX_EXTENTS,
    MAX_MAJOR,
    MAX_MINOR,
    MAX_NAME,
    MAX_PATH,
    MAX_SECONDS,
    MAX_SIZE,
    MAX_TARGET,
    MAX_XATTRS,
    check_attributes,
)

_NS = 10**9


class _Decoder:
    """From columns to columns: whatever can be is done for all entries at once. Raises StopIteration or IndexError
    where a column ends too early or a number points nowhere."""

    def __init__(self, raw: bytes, sizes: Sequence[int]) -> None:
        self._raw = dict(zip(COLUMNS, split(raw, len(COLUMNS), "TREE"), strict=True))
        self._sizes = sizes
        self._flat = flat = FlatTree()
        names = self._raw["names"]
        if names[-1:] != b"\0" or names.count(b"\0") > MAX_ENTRIES:  # before anything is made of them
            raise IndexFormatError(f"the tree is damaged, or has more than {MAX_ENTRIES} entries")
        flat.names = names[:-1].split(b"\0")
        self._limit = len(flat.names)
        self._codes = self._numbers("inodes")  # by entry: 0 for a further name, else 1 + the attributes' number
        _check_length("inodes", len(self._codes), self._limit)
        if not self._codes[0]:
            raise _damaged("a link points nowhere")
        if flat.names[0] != b"":
            raise _damaged("it does not begin with the root directory")

    def _numbers(self, name: str, each: int = 1, extra: int = 0) -> list[int]:
        return unpack(self._raw[name], self._limit * each + extra)

    def run(self) -> FlatTree:
        flat = self._flat
        flat.attributes = self._attributes()
        flat.attribute_of = [code - 1 for code in self._codes if code]
        if max(flat.attribute_of) >= len(flat.attributes):
            raise IndexError
        self._check_names()
        self._place()
        self._times()
        flat.sizes = [0] * len(flat.links)
        flat.layers, flat.offsets = [-1] * len(flat.links), [0] * len(flat.links)
        self._small()
        self._files()
        return flat

    def _attributes(self) -> list[Attributes]:
        sets: list[tuple[tuple[bytes, bytes], ...]] = [()]
        numbers, data, at = iter(unpack(self._raw["xattr_sets"], 3 * MAX_XATTRS)), self._raw["xattr_bytes"], 0
        for count in numbers:
            items = []
            for _ in range(count):
                middle = at + next(numbers)
                end = middle + next(numbers)
                items.append((data[at:middle], data[middle:end]))
                at = end
            sets.append(tuple(items))
        table = self._numbers("classes", 4)
        if at != len(data) or len(table) % 4 or any(number >= len(sets) for number in table[3::4]):
            raise _damaged("its attribute tables do not fit together")
        fields = iter(table)
        found = [Attributes(mode, uid, gid, sets[number]) for mode, uid, gid, number in zip(*[fields] * 4, strict=True)]
        check_attributes(found)
        return found

    def _of(self, *kinds: int) -> list[int]:
        """The inodes of these kinds (S_IF...), in order."""
        wanted = [kind.mode & FILE_TYPE in kinds for kind in self._flat.attributes]
        return [inode for inode, number in enumerate(self._flat.attribute_of) if wanted[number]]

    def _check_names(self) -> None:
        names = self._flat.names
        bad = b"." in names or b".." in names or b"/" in self._raw["names"]
        if bad or max(map(len, names)) > MAX_NAME:
            raise IndexFormatError("the tree has a name that no file can have")

    def _place(self) -> None:
        """Put the entries into their directories. No recursion: `stack` holds the open ones."""
        flat, names, codes = self._flat, self._flat.names, self._codes
        folder = [False, *(kind.mode & FILE_TYPE == stat.S_IFDIR for kind in flat.attributes)]  # by code
        if not folder[codes[0]]:
            raise _damaged("it does not begin with the root directory")
        children, backs = iter(self._numbers("children")), iter(self._numbers("links"))
        linkable = [i for i, number in enumerate(flat.attribute_of) if not folder[number + 1]] if 0 in codes else []
        links = flat.links = [1] * len(flat.attribute_of)
        links[0] = 2
        directories, parents, inodes = flat.directories, flat.parents, flat.inodes
        directories.append(Directory(0, 0, 0))
        inodes.append(0)
        here, left, last, length = 0, next(children), b"", 0  # of the directory: its path's length
        append = directories[0].entries.append
        stack: list[tuple[int, int, bytes, int]] = []
        inode = 1
        for entry in range(1, len(names)):
            while not left:
                here, left, last, length = stack.pop()
                append = directories[here].entries.append
            left -= 1
            name = names[entry]
            if name <= last:  # also the empty name
                raise _damaged("names in a directory are not sorted, or not unique")
            last = name
            if length + len(name) >= MAX_PATH:
                raise IndexFormatError(f"a path is longer than {MAX_PATH} bytes")
            append(entry)
            parents.append(here)
            code = codes[entry]
            if not code:
                before = inode - len(directories)  # inodes that can have further names
                back = next(backs)
                if not 1 <= back <= before:
                    raise _damaged("a link points nowhere")
                inodes.append(linkable[before - back])
                links[inodes[-1]] += 1
                continue
            inodes.append(inode)
            if folder[code]:
                links[directories[here].inode] += 1
                links[inode] = 2
                stack.append((here, left, last, length))
                directories.append(Directory(inode, here, entry))
                here, left, last, length = len(directories) - 1, next(children), b"", length + 1 + len(name)
                append = directories[here].entries.append
            inode += 1
        if left or any(waiting[1] for waiting in stack):
            raise _damaged("a directory lacks entries")
        _check_used(children=children, links=backs)

    def _times(self) -> None:
        flat = self._flat
        seconds = list(accumulate(map(unzigzag, self._numbers("mtime_seconds"))))
        ns = self._numbers("mtime_ns")
        if ns and max(ns) >= _NS:
            raise _damaged("a time has more than a second of nanoseconds")
        if seconds and not -MAX_SECONDS <= min(seconds) <= max(seconds) < MAX_SECONDS:
            raise IndexFormatError("the tree has a time that does not fit 64 bits of seconds")
        flat.mtimes = [second * _NS + part for second, part in zip(seconds, ns, strict=False)]
        known, append = 0, flat.mtime_of.append
        numbers = self._numbers("mtimes")
        for number in numbers:
            if number > known:
                raise IndexError
            append(number - 1 if number else known)
            known += not number
        _check_length("mtimes", len(numbers), len(flat.links))
        _check_length("mtime_seconds", len(seconds), known)
        _check_length("mtime_ns", len(ns), known)

    def _small(self) -> None:
        """Symlinks and devices."""
        flat = self._flat
        raw = self._raw["targets"]
        if raw and raw[-1] != 0:
            raise _damaged("a symlink target is cut off")
        symlinks, devices = self._of(stat.S_IFLNK), self._of(*DEVICES)
        rdevs = self._numbers("rdevs", 2)
        _check_length("targets", raw.count(b"\0"), len(symlinks))
        targets = raw.split(b"\0")[:-1]
        _check_length("rdevs", len(rdevs), 2 * len(devices))
        if targets and not 1 <= min(map(len, targets)) <= max(map(len, targets)) <= MAX_TARGET:
            raise IndexFormatError("the tree has a symlink target that is empty or too long")
        if rdevs and (max(rdevs[::2]) > MAX_MAJOR or max(rdevs[1::2]) > MAX_MINOR):
            raise IndexFormatError("the tree has an impossible device number")
        flat.targets = dict(zip(symlinks, targets, strict=True))
        flat.rdevs = {inode: (rdevs[2 * i], rdevs[2 * i + 1]) for i, inode in enumerate(devices)}
        for inode, target in flat.targets.items():
            flat.sizes[inode] = len(target)

    def _files(self) -> None:
        flat, sizes = self._flat, self._flat.sizes
        files = self._of(stat.S_IFREG)
        low, high = self._raw["size_low"], self._numbers("size_high")
        _check_length("size_low", len(low), len(files))
        _check_length("size_high", len(high), len(files))
        for inode, lower, upper in zip(files, low, high, strict=True):
            sizes[inode] = lower | upper << 8
        if max(sizes) > MAX_SIZE:
            raise IndexFormatError("the tree has a file of an impossible size")
        full = [inode for inode in files if sizes[inode]]
        counts = self._numbers("extent_counts")
        _check_length("extent_counts", len(counts), len(full))
        blocks = unpack(self._raw["header_blocks"], len(self._sizes))
        _check_length("header_blocks", len(blocks), len(self._sizes))
        steps = [BLOCK * count for count in blocks]
        ends, limits, layers, offsets = [0] * len(blocks), self._sizes, flat.layers, flat.offsets
        entries = flat.first_entries()
        numbers = iter(self._numbers("extent_layers", extra=MAX_EXTENTS))
        codes = iter(self._numbers("extent_offsets", extra=MAX_EXTENTS))
        gaps = iter(self._numbers("extent_gaps", 2, extra=2 * MAX_EXTENTS))
        since = -1  # the entry that the extent before this one belongs to
        several = 0
        for inode, count in zip(full, counts, strict=True):
            size, entry = sizes[inode], entries[inode]
            pieces: list[Extent] = []
            logical = 0
            for _ in range(count - 1 if count else 1):
                length = size
                if count:
                    logical += next(gaps)
                    length = next(gaps)
                layer, code = next(numbers), next(codes)
                error = ~(code >> 2) if code & 2 else code >> 2  # zigzag behind the lowest bit
                offset = (ends[layer] + BLOCK - 1 + steps[layer] * (entry - since)) & -BLOCK  # as `_predict`
                offset += error if code & 1 else error * BLOCK
                end = offset + length
                if offset < 0 or end > limits[layer]:
                    raise self._wrong(entry, f"data outside layer {layer}")
                ends[layer], since = end, entry
                if count:
                    if not length:
                        raise self._wrong(entry, "its data extents are empty")
                    pieces.append(Extent(logical, layer, offset, length))
                    logical += length
                else:
                    layers[inode], offsets[inode] = layer, offset
            if pieces:
                several += len(pieces) if len(pieces) > 1 else 0
                if logical > size or several > MAX_EXTENTS:
                    raise self._wrong(entry, f"more data than its size, or more than {MAX_EXTENTS} extents")
                flat.extents[inode] = tuple(pieces)
        _check_used(extent_layers=numbers, extent_offsets=codes, extent_gaps=gaps)

    def _wrong(self, entry: int, problem: str) -> IndexFormatError:
        return IndexFormatError(f"{show_path(self._flat, entry)}: {problem}")


def _damaged(problem: str) -> IndexFormatError:
    return IndexFormatError(f"the tree is damaged: {problem}")


def _check_length(name: str, length: int, wanted: int) -> None:
    if length != wanted:
        raise _damaged(f"column {name} is too {'long' if length > wanted else 'short'}")


def _check_used(**columns: Iterator[int]) -> None:
    """Raises IndexFormatError if a column has more than the tree took."""
    for name, numbers in columns.items():
        if next(numbers, None) is not None:
            raise _damaged(f"column {name} is too long")


def decode_tree(raw: bytes, sizes: Sequence[int]) -> FlatTree:
    """The tree of a TREE section over layers of these uncompressed sizes, link counts set.

    Raises IndexFormatError where the columns do not make a tree that `validate.validate_tree` would let pass.
    """
    try:
        return _Decoder(raw, sizes).run()
    except (StopIteration, IndexError) as error:
        raise _damaged("a column is too short, or a number points nowhere") from error
