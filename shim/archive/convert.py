"""A foreign v1 archive as an Index: read once, CRCs compared, SHA-256 of each span noted; the data stay where they are.

The layer is made up: each file's data in the archive's order, at multiples of 512, zeros between them. `Archive.pieces`
says where they are really.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from hashlib import sha256

from fastcrc import crc64

from shim.archive.blocks import SPAN, layer_of
from shim.archive.source import Reader
from shim.errors import IndexFormatError, IntegrityError, LayerError
from shim.goclip import files
from shim.goclip.tree import Data, tree_of
from shim.index.model import BLOCK, Archive, Extent, Index
from shim.layers.source import Source
from shim.registry import platform as platforms

_PIECE = 1 << 20
_CRC = 8


def convert(
    read: files.ReadAt,
    size: int,
    reader: Reader,
    location: str,
    *,
    name: str = "foreign",
    on_data: Callable[[bytes], None] | None = None,
) -> Index:
    """The index of the archive that `read` and `reader` give, `size` bytes long; location: as of `model.Archive`.

    on_data gets the made-up layer's bytes in order. What Go clip's format does not have (xattrs, devices, hard links)
    is not there. Raises IndexFormatError, IntegrityError (a CRC is wrong), StoreError.
    """
    clip = files.read(read, size)
    if clip.place is not None:
        raise IndexFormatError(f"it is a {clip.kind}, not an archive")
    tree, places = tree_of(clip)
    starts, archive = _lay_out(sorted(set(places.values())), location)
    for _, node in tree.walk():
        data = places.get(id(node))
        if data is not None:
            node.extents = (Extent(0, 0, starts[data], data.size),)
    digests: list[bytes] = []
    span = bytearray()

    def take(piece: bytes) -> None:
        span.extend(piece)
        if on_data is not None:
            on_data(piece)
        while len(span) >= SPAN:
            digests.append(sha256(memoryview(span)[:SPAN]).digest())
            del span[:SPAN]

    length = 0
    for at, piece in _contents(reader, archive):
        take(bytes(at - length))
        take(piece)
        length = at + len(piece)
    if span:
        digests.append(sha256(span).digest())
    platform = str(platforms.host())
    config = json.dumps({"os": "linux", "architecture": platform.split("/")[1]}).encode()
    header = files.read_header(read, size)
    digest = "sha256:" + sha256(read(header.index, header.index_length)).hexdigest()
    return Index(
        f"archive.invalid/{name}:latest", digest, platform, config, [layer_of(length, digests)], tree, archive=archive
    )


def _lay_out(blocks: list[Data], location: str) -> tuple[dict[Data, int], Archive]:
    """Where each block is in the layer."""
    starts: dict[Data, int] = {}
    pieces = []
    at = end = 0
    for block in blocks:
        if block.position < end + _CRC * bool(end):
            raise IndexFormatError("the Go clip file has data of two files in one place")
        end = block.position + block.size
        at = -(-at // BLOCK) * BLOCK
        starts[block] = at
        pieces.append((at, block.position, block.size))
        at += block.size
    return starts, Archive(location, pieces)


def _contents(reader: Reader, archive: Archive) -> Iterator[tuple[int, bytes]]:
    """(offset in the layer, bytes there) of all pieces in order, each block's CRC compared at its end."""
    if not archive.pieces:
        return
    first, last = archive.pieces[0], archive.pieces[-1]
    try:
        with reader.stream(first[1], last[1] + last[2] + _CRC) as chunks:
            source = Source(chunks, first[1])
            for layer, offset, count in archive.pieces:
                source.skip(offset - source.offset)
                check = 0
                for at in range(0, count, _PIECE):
                    piece = source.take(min(_PIECE, count - at))
                    check = crc64.go_iso(piece, check)
                    yield layer + at, piece
                if source.take(_CRC) != check.to_bytes(_CRC, "big"):
                    raise IntegrityError(
                        f"{reader.place} is damaged: the CRC-64 behind byte {offset + count} is wrong",
                        hint="fetch or make the archive again",
                    )
    except LayerError as error:
        raise IntegrityError(f"{reader.place} is cut short", hint="fetch or make the archive again") from error
