"""The nodes of a Go clip index as a Tree: what is there, and nothing made up but directories that no node names."""

from __future__ import annotations

import stat
from typing import NamedTuple

from shim.errors import IndexFormatError
from shim.goclip.files import GoClip, GoNode, type_bits
from shim.index.model import Node, Tree

_MAX_PATH = 4095
_MAX_NAME = 255
_MAX_ID = (1 << 32) - 2
_MAX_SIZE = 1 << 40
_NS = 10**9


class Data(NamedTuple):
    """A file's data in an archive: `size` bytes from `position` on, its CRC behind."""

    position: int
    size: int


def tree_of(clip: GoClip) -> tuple[Tree, dict[int, Data]]:
    """(the tree, id of each file that has data → where they are). Extents are left empty.

    Two names for one block are one file, as Go clip shows it: twice, each by itself. Raises IndexFormatError: names
    that no file can have, one twice, something below what is no directory, data outside of the archive.
    """
    root = Node(stat.S_IFDIR | 0o755, children={})
    places: dict[int, Data] = {}
    made: dict[bytes, Node] = {b"": root}
    for item in sorted(clip.nodes, key=lambda node: node.path):
        parts = item.path.split(b"/")
        if item.path == b"/":
            _set(root, item)
            if item.kind != "dir":
                raise IndexFormatError("the Go clip file's root is no directory")
            continue
        if len(item.path) > _MAX_PATH or any(
            part in (b"", b".", b"..") or b"\0" in part or len(part) > _MAX_NAME for part in parts[1:]
        ):
            raise IndexFormatError(f"the Go clip file has a path that no file can have: {item.path[:64]!r}")
        parent, name = _parent(made, item.path)
        assert parent.children is not None
        if name in parent.children:
            raise IndexFormatError(f"the Go clip file has a path twice: {item.path[:64]!r}")
        node = parent.children[name] = _node(item)
        if node.children is not None:
            made[item.path] = node
        elif node.is_file and node.size and clip.place is None:
            if item.data < 0 or item.data + item.size + 8 > clip.data_end:
                raise IndexFormatError(f"the Go clip file's data do not hold {item.path[:64]!r}")
            places[id(node)] = Data(item.data, item.size)
    tree = Tree(root)
    tree.count_links()
    return tree, places


def _parent(made: dict[bytes, Node], path: bytes) -> tuple[Node, bytes]:
    """The directory of `path`, made if no node names it, and the name in it."""
    above, _, name = path.rpartition(b"/")
    known = made.get(above)
    if known is not None:
        return known, name
    missing = [name]
    while above not in made:
        above, _, part = above.rpartition(b"/")
        missing.append(part)
    here = made[above]
    for part in reversed(missing[1:]):
        assert here.children is not None
        if part in here.children:
            raise IndexFormatError(f"the Go clip file has something below what is no directory: {path[:64]!r}")
        child = Node(stat.S_IFDIR | 0o755, children={})
        here.children[part] = child
        here = child
        above += b"/" + part
        made[above] = here
    return here, name


def _node(item: GoNode) -> Node:
    node = Node(0, children={} if item.kind == "dir" else None)
    _set(node, item)
    if item.kind == "symlink":
        if not item.target or b"\0" in item.target or len(item.target) > _MAX_PATH:
            raise IndexFormatError(f"the Go clip file has a symlink without a target: {item.path[:64]!r}")
        node.target, node.size = item.target, len(item.target)
    elif item.kind == "file":
        if not 0 <= item.size <= _MAX_SIZE:
            raise IndexFormatError(f"the Go clip file has a file of an impossible size: {item.path[:64]!r}")
        node.size = item.size
    return node


def _set(node: Node, item: GoNode) -> None:
    node.mode = type_bits(item.kind) | item.mode
    node.uid, node.gid = min(item.uid, _MAX_ID), min(item.gid, _MAX_ID)
    node.mtime = max(-(1 << 62) * _NS, min(item.mtime, (1 << 62) * _NS))
