"""The merged tree as columns: what goes over all inodes of an image is several times as fast over lists as over Nodes.

`treecodec` decodes into it and `shim/erofs/` writes from it, which is what a container's start waits for; `nodes` and
`flatten` lead to and from `model.Tree`, for everybody else.
"""

from __future__ import annotations

import stat
from bisect import bisect_left
from dataclasses import dataclass, field
from operator import attrgetter
from typing import NamedTuple

from shim.errors import IndexFormatError
from shim.index.model import Extent, Node, Tree

_inode = attrgetter("inode")


class Attributes(NamedTuple):
    """What many inodes have in common; fields as in `model.Node`."""

    mode: int
    uid: int
    gid: int
    xattrs: tuple[tuple[bytes, bytes], ...]

    @property
    def kind(self) -> int:
        """st_mode >> 12: 0o10 for files, 0o04 for directories …"""
        return self.mode >> 12


@dataclass(slots=True)
class Directory:
    """inode: its number; parent: number of the directory above (the root's is its own); entry: its own name's;
    entries: of the names in it."""

    inode: int
    parent: int
    entry: int
    entries: list[int] = field(default_factory=list)


@dataclass(slots=True)
class FlatTree:
    """Three numberings, each in preorder with siblings sorted by byte, each from the root, 0: *entries* are names,
    *inodes* are counted where their first name is, *directories* are numbered among themselves.
    """

    names: list[bytes] = field(default_factory=lambda: [b""])  # by entry
    parents: list[int] = field(default_factory=lambda: [0])  # entry → number of the directory it is in
    inodes: list[int] = field(default_factory=list)  # entry → inode
    directories: list[Directory] = field(default_factory=list)
    attributes: list[Attributes] = field(default_factory=list)  # the distinct ones
    mtimes: list[int] = field(default_factory=list)  # the distinct ones, ns since the epoch
    attribute_of: list[int] = field(default_factory=list)  # from here on by inode
    mtime_of: list[int] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)  # st_size of files and symlinks, else 0
    links: list[int] = field(default_factory=list)  # st_nlink
    layers: list[int] = field(default_factory=list)  # of a file that is one extent from its first byte to its last …
    offsets: list[int] = field(default_factory=list)  # … where that is; -1 and 0 for all others
    extents: dict[int, tuple[Extent, ...]] = field(default_factory=dict)  # of other files with data
    targets: dict[int, bytes] = field(default_factory=dict)
    rdevs: dict[int, tuple[int, int]] = field(default_factory=dict)

    def path(self, entry: int) -> bytes:
        """The whole path of an entry; b"/" for the root. For messages: time is linear in the depth."""
        parts = []
        while entry:
            parts.append(self.names[entry])
            entry = self.directories[self.parents[entry]].entry
        return b"/" + b"/".join(reversed(parts))

    def first_entries(self) -> list[int]:
        """inode → its first name."""
        found, seen = [], -1
        for entry, inode in enumerate(self.inodes):
            if inode > seen:
                seen = inode
                found.append(entry)
        return found

    def directory_of(self, inode: int) -> int | None:
        """The number of the directory that an inode is, if it is one."""
        at = bisect_left(self.directories, inode, key=_inode)
        return at if at < len(self.directories) and self.directories[at].inode == inode else None

    def child(self, directory: int, name: bytes) -> int | None:
        """The inode called `name` in a directory (its number), if there is one."""
        entries = self.directories[directory].entries
        at = bisect_left(entries, name, key=self.names.__getitem__)
        return self.inodes[entries[at]] if at < len(entries) and self.names[entries[at]] == name else None

    def data_of(self, inode: int) -> tuple[Extent, ...]:
        if self.layers[inode] >= 0:
            return (Extent(0, self.layers[inode], self.offsets[inode], self.sizes[inode]),)
        return self.extents.get(inode, ())

    def nodes(self) -> Tree:
        """The same as Nodes, link counts set."""
        nodes = []
        for inode, (number, time) in enumerate(zip(self.attribute_of, self.mtime_of, strict=True)):
            mode, uid, gid, xattrs = self.attributes[number]
            node = Node(mode, uid, gid, self.mtimes[time], self.sizes[inode], xattrs=xattrs, nlink=self.links[inode])
            node.extents = self.data_of(inode)
            nodes.append(node)
        for inode, target in self.targets.items():
            nodes[inode].target = target
        for inode, rdev in self.rdevs.items():
            nodes[inode].rdev = rdev
        names, inodes = self.names, self.inodes
        for directory in self.directories:
            nodes[directory.inode].children = {names[entry]: nodes[inodes[entry]] for entry in directory.entries}
        return Tree(nodes[0])


def flatten(tree: Tree) -> FlatTree:
    """The columns of a tree of Nodes, links counted. Raises IndexFormatError if a directory has two names, or one that
    no file system allows."""
    return _Flattener().run(tree.root)


class _Flattener:
    def __init__(self) -> None:
        self._flat = FlatTree()
        self._numbers: dict[int, int] = {}  # id of a Node → its inode
        self._attributes: dict[Attributes, int] = {}
        self._mtimes: dict[int, int] = {}

    def run(self, root: Node) -> FlatTree:
        flat = self._flat
        if root.children is None or not stat.S_ISDIR(root.mode):
            raise IndexFormatError("the tree's root is no directory")
        flat.inodes.append(self._inode(root))
        flat.directories.append(Directory(0, 0, 0))
        stack = [(0, name, child) for name, child in sorted(root.children.items(), reverse=True)]
        while stack:
            parent, name, node = stack.pop()
            entry = len(flat.names)
            flat.names.append(name)
            flat.parents.append(parent)
            flat.directories[parent].entries.append(entry)
            known = self._numbers.get(id(node))
            if known is not None:
                flat.inodes.append(known)
                if node.children is not None:
                    raise IndexFormatError(f"directory {show_path(flat, entry)} has a second name")
                flat.links[known] += 1
                continue
            flat.inodes.append(self._inode(node))
            if name in (b"", b".", b"..") or b"/" in name or b"\0" in name or len(name) > 255:
                where = show_path(flat, flat.directories[parent].entry)
                raise IndexFormatError(f"directory {where} has a name that no file system allows")
            if node.children is not None:
                flat.links[flat.directories[parent].inode] += 1
                number = len(flat.directories)
                flat.directories.append(Directory(flat.inodes[-1], parent, entry))
                stack.extend((number, below, child) for below, child in sorted(node.children.items(), reverse=True))
        flat.attributes, flat.mtimes = list(self._attributes), list(self._mtimes)
        return flat

    def _inode(self, node: Node) -> int:
        flat = self._flat
        inode = self._numbers[id(node)] = len(flat.links)
        kind = Attributes(node.mode, node.uid, node.gid, node.xattrs)
        flat.attribute_of.append(self._attributes.setdefault(kind, len(self._attributes)))
        flat.mtime_of.append(self._mtimes.setdefault(node.mtime, len(self._mtimes)))
        flat.links.append(1 if node.children is None else 2)
        first = node.extents[0] if len(node.extents) == 1 else Extent(0, -1, 0, 0)
        whole = not first.logical and first.length == node.size > 0 and first.layer >= 0
        flat.layers.append(first.layer if whole else -1)
        flat.offsets.append(first.offset if whole else 0)
        if node.extents and not whole:
            flat.extents[inode] = node.extents
        if stat.S_ISLNK(node.mode):
            flat.targets[inode] = node.target
        if node.rdev != (0, 0):
            flat.rdevs[inode] = node.rdev
        flat.sizes.append(len(node.target) if stat.S_ISLNK(node.mode) else node.size if node.children is None else 0)
        return inode


def show_path(flat: FlatTree, entry: int) -> str:
    """A path for an error message: its beginning and its end, if it is long."""
    text = cut_path(flat.path(entry))
    return text if text.isprintable() else ascii(text)


def cut_path(path: bytes) -> str:
    """The beginning and the end of a path, as text."""
    path = path if len(path) <= 300 else path[:150] + b"..." + path[-150:]
    return path.decode("utf-8", "backslashreplace")
