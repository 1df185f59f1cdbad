"""The end of making an archive: Go's index, ours behind it, and the header in front."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any, BinaryIO

from shim.archive.blocks import BASE, Block, BlockWriter
from shim.errors import StoreError
from shim.goclip import write
from shim.index import codec
from shim.index.model import BLOCK, Archive, Extent, Index, Node, Tree

Blocks = dict[tuple[int, int], Block]
"""Where files' data are, by (layer, offset in its tar) of a file's first extent."""
_EMPTY = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"


@dataclass(frozen=True, slots=True)
class Source:
    """What an archive was made of, as Index has it."""

    image: str
    digest: str
    platform: str
    config: bytes


def finish(out: BinaryIO, writer: BlockWriter, tree: Tree, blocks: Blocks, source: Source) -> tuple[Index, list[bytes]]:
    """Write what follows the data, and the header; (our index, paths that Go clip will not see).

    The extents of `tree` are changed from places in layers to places in the archive. Raises StoreError.
    """
    places = _move(tree, blocks, writer)
    layer, end = writer.finish(list(places.values()))
    size = layer.uncompressed_size
    archive = Archive("", [(0, BASE, size)] if size else [])
    index = Index(source.image, source.digest, source.platform, source.config, [layer], tree, archive=archive)
    nodes, left_out = go_nodes(tree, places)
    header, rest = write.pack(nodes, data_end=end)
    try:
        out.seek(end)
        out.write(rest)
        out.write(codec.encode(index))
        out.seek(0)
        out.write(header)
        out.flush()
        os.fsync(out.fileno())
    except OSError as error:
        raise StoreError(f"the archive cannot be written: {error.strerror}", hint="is the disk full?") from error
    return index, left_out


def go_nodes(tree: Tree, places: dict[int, Block]) -> tuple[bytes, list[bytes]]:
    """The gob of Go's nodes, and paths that are left out. places: id of a Node → its block."""

    def data(node: Node) -> dict[str, Any]:
        block = places[id(node)]
        return {"ContentHash": block.content_hash, "DataPos": block.position, "DataLen": block.size}

    return write.encode_nodes(tree, data)


def _move(tree: Tree, blocks: Blocks, writer: BlockWriter) -> dict[int, Block]:
    """Point every file's extents into the archive; the block of each."""
    places: dict[int, Block] = {}
    for _, node in tree.walk():
        if not node.is_file or not node.size or id(node) in places:
            continue
        if node.extents:
            block = blocks[node.extents[0].layer, node.extents[0].offset]
        else:  # nothing but a hole: Go needs its zeros
            writer.begin(node.size)
            writer.zeros(node.size)
            block = writer.end()
        places[id(node)] = block
        node.extents = _extents(node, block.position - BASE)
    return places


def _extents(node: Node, start: int) -> tuple[Extent, ...]:
    """The file's extents in the archive: in whole blocks, since what surrounds the data there is the hole's zeros."""
    out: list[Extent] = []
    for logical, _, _, length in node.extents:
        low = logical // BLOCK * BLOCK
        high = min(node.size, -(-(logical + length) // BLOCK) * BLOCK)
        if out and low <= out[-1].logical + out[-1].length:
            last = out.pop()
            low = last.logical
        out.append(Extent(low, 0, start + low, high - low))
    return tuple(out)
