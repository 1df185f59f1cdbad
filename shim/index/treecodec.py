"""The merged tree as columns, one kind of value beside its like, so that LZMA2 finds what repeats (FORMAT.md, TREE).

Entries are the tree's names in preorder, siblings sorted by byte, the root first without a name. An entry is a new
inode or another name of an earlier one. About 5 bytes an entry remain, nearly all of it names and sizes.
`treereader` reads them.
"""

from __future__ import annotations

import stat
from collections import Counter

from shim.index.columns import frame, pack, zigzag
from shim.index.model import BLOCK, Extent, Node, Tree
from shim.index.validate import DEVICES, FILE_TYPE

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
