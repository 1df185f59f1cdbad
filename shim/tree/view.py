"""A Tree as a file system sees it: inode numbers, path lookup, and where a file's bytes lie."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator

from shim.index.model import Node, Tree

ROOT_INO = 1


class TreeView:
    """Inodes of a merged tree, numbered from 1 (the root) in preorder; hard links share a number.

    The numbers depend on the tree alone, so they are the same after a remount. Read-only: any thread may use it.
    """

    def __init__(self, tree: Tree) -> None:
        self._root = tree.root
        self._nodes: list[Node] = []
        self._inos: dict[int, int] = {}
        self.total_size = 0  # bytes of all files
        for _, node in tree.walk():
            if id(node) not in self._inos:
                self._nodes.append(node)
                self._inos[id(node)] = len(self._nodes)
                if node.is_file:
                    self.total_size += node.size

    @property
    def count(self) -> int:
        """How many inodes there are."""
        return len(self._nodes)

    def node(self, ino: int) -> Node:
        return self._nodes[ino - 1]

    def ino(self, node: Node) -> int:
        return self._inos[id(node)]

    def find(self, path: bytes) -> Node | None:
        """The node at an absolute path that needs no symlink followed, as FUSE paths are; None if there is none."""
        node = self._root
        for name in path.split(b"/"):
            if name:
                if node.children is None:
                    return None
                child = node.children.get(name)
                if child is None:
                    return None
                node = child
        return node

    def path_of(self, ino: int) -> bytes:
        """One path of an inode, for messages; walks the whole tree."""
        node = self.node(ino)
        return next(path for path, other in Tree(self._root).walk() if other is node)


def pieces(node: Node, offset: int, size: int) -> Iterator[tuple[int, int, int, int]]:
    """(place in the answer, layer, offset in the layer, length) of the data in [offset, offset + size) of a file.

    What no piece covers is a hole. The range must lie inside the file.
    """
    end = offset + size
    extents = node.extents
    first = bisect_right(extents, offset, key=lambda extent: extent.logical) - 1
    for number in range(max(first, 0), len(extents)):
        logical, layer, at, length = extents[number]
        if logical >= end:
            break
        start = max(logical, offset)
        stop = min(logical + length, end)
        if start < stop:
            yield start - offset, layer, at + start - logical, stop - start
