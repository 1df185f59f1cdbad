"""Section DATA: an index whose only layer lies in an archive, in pieces, and where that archive is."""

from __future__ import annotations

from itertools import chain

from shim.errors import IndexFormatError
from shim.index import columns
from shim.index.model import Archive, Compression, Index

MAX_PIECES = 1_000_000
MAX_RAW = 16 << 20
MAX_LOCATION = 2048
_MAX_OFFSET = 1 << 62


def encode_archive(archive: Archive) -> bytes:
    """Columns: the location; for each piece, gap in the layer, gap in the archive, length."""
    numbers: list[int] = []
    layer_end = archive_end = 0
    for layer, offset, length in archive.pieces:
        numbers += (layer - layer_end, offset - archive_end, length)
        layer_end, archive_end = layer + length, offset + length
    return columns.join([archive.location.encode(), columns.pack(numbers)])


def decode_archive(raw: bytes) -> Archive:
    """Raises IndexFormatError. What it gives is checked by `validate_archive`."""
    location, packed = columns.split(raw, 2, "DATA")
    numbers = columns.unpack(packed, 3 * MAX_PIECES)
    if len(numbers) % 3:
        raise IndexFormatError("section DATA is damaged: a piece is cut off")
    pieces = []
    layer_end = archive_end = 0
    for gap, jump, length in zip(numbers[::3], numbers[1::3], numbers[2::3], strict=True):
        pieces.append((layer_end + gap, archive_end + jump, length))
        layer_end, archive_end = layer_end + gap + length, archive_end + jump + length
        if max(layer_end, archive_end) > _MAX_OFFSET:
            raise IndexFormatError("section DATA is damaged: a piece lies beyond any file")
    try:
        return Archive(location.decode("ascii"), pieces)
    except UnicodeDecodeError as error:
        raise IndexFormatError("section DATA names a place that is no URL") from error


def validate_archive(index: Index) -> None:
    """Raises IndexFormatError: pieces that overlap, are out of order or outside the layer; a strange location."""
    archive = index.archive
    if archive is None:
        return
    if len(index.layers) != 1 or index.layers[0].compression != Compression.NONE:
        raise IndexFormatError("an archive is one uncompressed layer")
    if len(archive.location) > MAX_LOCATION or not (archive.location == "" or archive.location.startswith("s3://")):
        raise IndexFormatError("the archive lies where this clip-shim does not know how to read")
    if not archive.location.isprintable() or not archive.location.isascii():
        raise IndexFormatError("the archive's location is no URL")
    if len(archive.pieces) > MAX_PIECES:
        raise IndexFormatError(f"the archive has more than {MAX_PIECES} pieces")
    layer_end = archive_end = 0
    for layer, offset, length in archive.pieces:
        if length <= 0 or layer < layer_end or offset < archive_end:
            raise IndexFormatError("the archive's pieces are empty, overlap or are not in order")
        layer_end, archive_end = layer + length, offset + length
    if layer_end > index.layers[0].uncompressed_size or archive_end > _MAX_OFFSET:
        raise IndexFormatError("the archive's pieces reach beyond their layer")


def flat(archive: Archive) -> list[int]:
    """The pieces as one list of numbers."""
    return list(chain.from_iterable(archive.pieces))
