"""The merged tree as columns, one kind of value beside its like, so that LZMA2 finds what repeats (FORMAT.md, TREE).

Entries are the tree's names in preorder, siblings sorted by byte, the root first without a name. An entry is a new
inode or another name of an earlier one. About 5 bytes an entry remain, nearly all of it names and sizes.
"""

from __future__ import annotations

import stat
from collections import Counter
from collections.abc import Iterator

from shim.errors import IndexFormatError
from shim.index.columns import frame, pack, split, unpack, unzigzag, zigzag
from shim.index.model import BLOCK, Extent, Node, Tree
from shim.index.validate import DEVICES, FILE_TYPE, MAX_ENTRIES, MAX_EXTENTS, MAX_PATH, MAX_XATTRS

MAX_RAW = 128 << 20  # of the section
BYTE_COLUMNS = ("names", "xattr_bytes", "size_low", "targets")
NUMBER_COLUMNS = (
    "children",
    "inodes",
    "links",
    "classes",
    "xattr_sets",
    "mtimes",
    "mtime_seconds",
    "mtime_ns",
    "size_high",
    "rdevs",
    "extent_counts",
    "extent_layers",
    "extent_offsets",
    "extent_gaps",
    "header_blocks",
)
COLUMNS = BYTE_COLUMNS + NUMBER_COLUMNS
_NS = 10**9


class _Encoder:
    """Gathers the columns entry by entry, in preorder."""

    def __init__(self) -> None:
        self.blobs = {name: bytearray() for name in BYTE_COLUMNS}
        self.numbers: dict[str, list[int]] = {name: [] for name in NUMBER_COLUMNS}
        self._links: dict[int, int] = {}  # id of a Node that is no directory → its number among those
        self._classes: dict[tuple[int, int, int, int], int] = {}
        self._xattr_sets: dict[tuple[tuple[bytes, bytes], ...], int] = {(): 0}
        self._mtimes: dict[int, int] = {}
        self._second = 0
        self._since = 0
        self._extents: list[tuple[Extent, int]] = []  # with the entries since the one before

    def entry(self, name: bytes, node: Node) -> None:
        """The next name. The root's is b""."""
        self.blobs["names"] += name + b"\0"
        self._since += 1
        if node.children is not None:
            self.numbers["children"].append(len(node.children))
        elif (number := self._links.get(id(node))) is not None:
            self.numbers["inodes"].append(0)
            self.numbers["links"].append(len(self._links) - number)
            return
        else:
            self._links[id(node)] = len(self._links)
        key = (node.mode, node.uid, node.gid, self._xattrs(node))
        self.numbers["inodes"].append(1 + self._classes.setdefault(key, len(self._classes)))
        self._mtime(node.mtime)
        kind = node.mode & FILE_TYPE
        if kind == stat.S_IFREG:
            self._file(node)
        elif kind == stat.S_IFLNK:
            self.blobs["targets"] += node.target + b"\0"
        elif kind in DEVICES:
            self.numbers["rdevs"].extend(node.rdev)

    def _xattrs(self, node: Node) -> int:
        if not node.xattrs:
            return 0
        wanted = tuple(sorted(node.xattrs))
        number = self._xattr_sets.get(wanted)
        if number is None:
            number = self._xattr_sets[wanted] = len(self._xattr_sets)
            self.numbers["xattr_sets"].append(len(wanted))
            for name, value in wanted:
                self.numbers["xattr_sets"] += (len(name), len(value))
                self.blobs["xattr_bytes"] += name + value
        return number

    def _mtime(self, mtime: int) -> None:
        number = self._mtimes.get(mtime)
        if number is not None:
            self.numbers["mtimes"].append(number)
            return
        self._mtimes[mtime] = len(self._mtimes) + 1
        seconds, ns = divmod(mtime, _NS)
        self.numbers["mtimes"].append(0)
        self.numbers["mtime_seconds"].append(zigzag(seconds - self._second))
        self.numbers["mtime_ns"].append(ns)
        self._second = seconds

    def _file(self, node: Node) -> None:
        self.blobs["size_low"].append(node.size & 255)
        self.numbers["size_high"].append(node.size >> 8)
        if not node.size:
            return
        if len(node.extents) == 1 and node.extents[0].logical == 0 and node.extents[0].length == node.size:
            self.numbers["extent_counts"].append(0)
        else:
            self.numbers["extent_counts"].append(len(node.extents) + 1)
            end = 0
            for extent in node.extents:
                self.numbers["extent_gaps"] += (extent.logical - end, extent.length)
                end = extent.logical + extent.length
        for extent in node.extents:
            self._extents.append((extent, self._since))
            self._since = 0

    def finish(self, layers: int) -> list[bytes]:
        """The columns, after the last entry."""
        numbers = self.numbers
        for key in self._classes:
            numbers["classes"] += key
        numbers["header_blocks"] = blocks = _header_blocks(self._extents, layers)
        ends = [0] * layers
        for extent, since in self._extents:
            error = extent.offset - _predict(ends[extent.layer], since, blocks[extent.layer])
            ends[extent.layer] = extent.offset + extent.length
            numbers["extent_layers"].append(extent.layer)
            numbers["extent_offsets"].append(zigzag(error) << 1 | 1 if error % BLOCK else zigzag(error // BLOCK) << 1)
        return [bytes(self.blobs[name]) for name in BYTE_COLUMNS] + [pack(numbers[name]) for name in NUMBER_COLUMNS]


def _predict(end: int, entries: int, blocks: int) -> int:
    """Where file data lies if the layer's tar is in path order: behind the data before it, which ends at `end` and is
    padded to whole blocks, and behind the headers, of `blocks` blocks each, of the entries since then."""
    return (end + BLOCK - 1 + BLOCK * blocks * entries) & -BLOCK


def _header_blocks(extents: list[tuple[Extent, int]], layers: int) -> list[int]:
    """For each layer the usual blocks a header takes: 1 in ustar, 3 where every entry has a PAX record."""
    votes = [Counter[int]() for _ in range(layers)]
    ends = [0] * layers
    for extent, since in extents:
        gap = extent.offset - _predict(ends[extent.layer], 0, 0)
        if since and gap > 0 and gap % (BLOCK * since) == 0:
            votes[extent.layer][gap // (BLOCK * since)] += 1
        ends[extent.layer] = extent.offset + extent.length
    return [min(vote, key=lambda blocks, vote=vote: (-vote[blocks], blocks)) if vote else 1 for vote in votes]  # type: ignore[misc]


def encode_tree(tree: Tree, layers: int) -> bytes:
    """Section TREE of a valid tree (`validate.validate_tree`) over `layers` layers."""
    return b"".join(encode_parts(tree, layers))


def encode_parts(tree: Tree, layers: int) -> tuple[bytes, bytes]:
    """The section in two parts that have little in common and take about as long to compress: names, and the rest."""
    encoder = _Encoder()
    stack = [(b"", tree.root)]
    while stack:
        name, node = stack.pop()
        encoder.entry(name, node)
        if node.children:
            stack.extend(sorted(node.children.items(), reverse=True))
    names, *others = columns = encoder.finish(layers)
    return frame([*map(len, columns)]) + names, b"".join(others)


class _Decoder:
    """The columns as iterators. Each method raises StopIteration when a column ends too early."""

    def __init__(self, raw: bytes, layers: int) -> None:
        self._raw = dict(zip(COLUMNS, split(raw, len(COLUMNS), "TREE"), strict=True))
        self.names = self._raw["names"].split(b"\0")
        if self.names.pop() != b"" or not 1 <= len(self.names) <= MAX_ENTRIES:
            raise IndexFormatError(f"the tree is damaged, or has more than {MAX_ENTRIES} entries")
        self._limit = len(self.names)
        self._open: dict[str, Iterator[int]] = {}
        self.inodes = self._number_list("inodes")
        self.children = self._numbers("children")
        self.links = self._numbers("links")
        self._mtime_ids = self._numbers("mtimes")
        self._mtime_seconds = self._numbers("mtime_seconds")
        self._mtime_ns = self._numbers("mtime_ns")
        self._size_low = self._open["size_low"] = iter(self._raw["size_low"])
        self._size_high = self._numbers("size_high")
        self._rdevs = self._numbers("rdevs", 2)
        self._extent_counts = self._numbers("extent_counts")
        self._extent_layers = self._numbers("extent_layers", extra=MAX_EXTENTS)
        self._extent_offsets = self._numbers("extent_offsets", extra=MAX_EXTENTS)
        self._extent_gaps = self._numbers("extent_gaps", 2, extra=2 * MAX_EXTENTS)
        targets = self._raw["targets"].split(b"\0")
        if targets.pop() != b"":
            raise IndexFormatError("the tree is damaged: a symlink target is cut off")
        self._targets = iter(targets)
        self._blocks = unpack(self._raw["header_blocks"], layers)
        if len(self.inodes) != len(self.names) or len(self._blocks) != layers:
            raise IndexFormatError("the tree is damaged: its columns differ in length")
        self._ends = [0] * layers
        self._mtimes: list[int] = []
        self._second = 0
        self.since = 0
        self.classes = self._read_classes()

    def _number_list(self, name: str, each: int = 1, extra: int = 0) -> list[int]:
        return unpack(self._raw[name], self._limit * each + extra)

    def _numbers(self, name: str, each: int = 1, extra: int = 0) -> Iterator[int]:
        self._open[name] = numbers = iter(self._number_list(name, each, extra))
        return numbers

    def _read_classes(self) -> list[tuple[int, int, int, tuple[tuple[bytes, bytes], ...]]]:
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
        table = self._number_list("classes", 4)
        if at != len(data) or len(table) % 4 or any(number >= len(sets) for number in table[3::4]):
            raise IndexFormatError("the tree is damaged: its attribute tables do not fit together")
        fields = iter(table)
        return [(mode, uid, gid, sets[number]) for mode, uid, gid, number in zip(*[fields] * 4, strict=True)]

    def inode(self, number: int) -> Node:
        """The next inode, of class `number`, counted from 1."""
        mode, uid, gid, xattrs = self.classes[number - 1] if number else self.classes[len(self.classes)]
        node = Node(mode, uid, gid, self._mtime(), xattrs=xattrs)
        kind = mode & FILE_TYPE
        if kind == stat.S_IFREG:
            node.size = next(self._size_low) | next(self._size_high) << 8
            if node.size:
                node.extents = self._extents(node.size)
        elif kind == stat.S_IFDIR:
            node.children = {}
            node.nlink = 2
        elif kind == stat.S_IFLNK:
            node.target = next(self._targets)
            node.size = len(node.target)
        elif kind in DEVICES:
            node.rdev = (next(self._rdevs), next(self._rdevs))
        return node

    def _mtime(self) -> int:
        number = next(self._mtime_ids)
        if number:
            return self._mtimes[number - 1]
        self._second += unzigzag(next(self._mtime_seconds))
        ns = next(self._mtime_ns)
        if ns >= _NS:
            raise IndexFormatError("the tree is damaged: a time has more than a second of nanoseconds")
        self._mtimes.append(self._second * _NS + ns)
        return self._mtimes[-1]

    def _extents(self, size: int) -> tuple[Extent, ...]:
        count = next(self._extent_counts)
        if not count:
            return (self._extent(0, size),)
        extents, logical = [], 0
        for _ in range(count - 1):
            logical += next(self._extent_gaps)
            extents.append(self._extent(logical, next(self._extent_gaps)))
            logical += extents[-1].length
        return tuple(extents)

    def _extent(self, logical: int, length: int) -> Extent:
        layer, code = next(self._extent_layers), next(self._extent_offsets)
        error = unzigzag(code >> 1)
        offset = _predict(self._ends[layer], self.since, self._blocks[layer]) + (error if code & 1 else error * BLOCK)
        self._ends[layer] = offset + length
        self.since = 0
        return Extent(logical, layer, offset, length)

    def check_end(self) -> None:
        """Raises IndexFormatError if a column has more than the tree took."""
        for name, numbers in [*self._open.items(), ("targets", self._targets)]:
            if next(numbers, None) is not None:
                raise IndexFormatError(f"the tree is damaged: column {name} is too long")


def decode_tree(raw: bytes, layers: int) -> Tree:
    """The tree of a TREE section, link counts set.

    Raises IndexFormatError where the columns do not make a tree of unique, sorted names within MAX_PATH. What the
    values themselves must obey is `validate.validate_tree`'s part.
    """
    try:
        decoder = _Decoder(raw, layers)
        root = _build(decoder)
    except (StopIteration, IndexError) as error:
        raise IndexFormatError("the tree is damaged: a column is too short, or a number points nowhere") from error
    decoder.check_end()
    return Tree(root)


def _build(decoder: _Decoder) -> Node:
    """Put the inodes under their names. No recursion: `stack` holds the open directories."""
    names, inodes = iter(decoder.names), iter(decoder.inodes)
    root = decoder.inode(next(inodes))
    if next(names) != b"" or root.children is None:
        raise IndexFormatError("the tree is damaged: it does not begin with the root directory")
    decoder.since = 1
    files: list[Node] = []
    stack: list[tuple[Node, int, int, bytes]] = []  # (directory, its path's length, children still to come, last name)
    parent, length, left, last = root, 0, next(decoder.children), b""
    for number, name in zip(inodes, names, strict=True):
        while not left:
            parent, length, left, last = stack.pop()
        left -= 1
        if name <= last:  # also the empty name
            raise IndexFormatError("the tree is damaged: names in a directory are not sorted, or not unique")
        last = name
        if length + 1 + len(name) > MAX_PATH:
            raise IndexFormatError(f"a path is longer than {MAX_PATH} bytes")
        decoder.since += 1
        assert parent.children is not None
        if not number:
            back = next(decoder.links)
            if not 1 <= back <= len(files):
                raise IndexFormatError("the tree is damaged: a link points nowhere")
            node = files[-back]
            node.nlink += 1
            parent.children[name] = node
            continue
        node = parent.children[name] = decoder.inode(number)
        if node.children is None:
            files.append(node)
            continue
        parent.nlink += 1
        stack.append((parent, length, left, last))
        parent, length, left, last = node, length + 1 + len(name), next(decoder.children), b""
    if left or any(entry[2] for entry in stack):
        raise IndexFormatError("the tree is damaged: a directory lacks entries")
    return root
