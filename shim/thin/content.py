"""Files' bytes straight from the registry: only the spans that hold them are fetched, and each is verified."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from functools import partial
from io import BufferedReader, RawIOBase
from typing import BinaryIO, NamedTuple

from shim.errors import IntegrityError, LayerError
from shim.index.build import from_sources
from shim.index.model import Extent, Index, Layer, Node
from shim.layers.inflate import compressed_range, inflate_spans
from shim.registry.client import Descriptor, RegistryClient
from shim.registry.ref import ImageRef


class _Piece(NamedTuple):
    """`length` bytes at `offset` of a layer's tar belong at `place` of the spool."""

    offset: int
    length: int
    place: int


class Spool:
    """The content of files, one behind the other in `file` (a temporary one, empty, read and written)."""

    def __init__(self, file: BinaryIO) -> None:
        self._fd = file.fileno()
        self._places: dict[int, tuple[int, int]] = {}
        self._end = 0

    def fetch(self, index: Index, ref: ImageRef, client: RegistryClient, nodes: Iterable[Node]) -> None:
        """Get the content of `nodes`, which are files of `index`; `ref` says where its layers are.

        Raises RegistryError, IntegrityError and LayerError (these name the layer).
        """
        pieces: dict[int, list[_Piece]] = {}
        for node in nodes:
            place = self._end
            self._places[id(node)] = place, node.size
            self._end += node.size
            for extent in node.extents:
                pieces.setdefault(extent.layer, []).append(_piece(extent, place))
        os.ftruncate(self._fd, self._end)  # holes of sparse files are holes here
        for number in sorted(pieces):
            self._layer(index.layers, number, ref, client, sorted(pieces[number]))

    def open(self, node: Node) -> BinaryIO:
        """A file object of a node's content; positions of several are independent."""
        start, size = self._places[id(node)]
        return BufferedReader(_Window(self._fd, start, size))

    def _layer(
        self, layers: list[Layer], number: int, ref: ImageRef, client: RegistryClient, pieces: list[_Piece]
    ) -> None:
        named = [Descriptor(layer.media_type, layer.digest, layer.size) for layer in layers]
        for first, stop, wanted in _runs(layers[number], pieces):
            run = partial(self._run, layers[number], first, stop, ref, client, wanted)
            from_sources(client, ref, number, named, run)

    def _run(
        self, layer: Layer, first: int, stop: int, ref: ImageRef, client: RegistryClient, pieces: list[_Piece]
    ) -> None:
        start, end = compressed_range(layer.spans, first, stop)
        todo = iter(pieces)
        piece = next(todo, None)
        with client.open_blob(ref, layer.digest, start, end) as stream:
            try:
                for span, data in inflate_spans(layer.spans, layer.compression, first, stream, stop):
                    base = layer.spans.ustart(span)
                    view = memoryview(data)
                    while piece is not None and piece.offset < base + len(data):
                        low = max(piece.offset, base)
                        high = min(piece.offset + piece.length, base + len(data))
                        _write(self._fd, view[low - base : high - base], piece.place + low - piece.offset)
                        if piece.offset + piece.length > high:
                            break  # the rest lies in the next span
                        piece = next(todo, None)
            except (IntegrityError, LayerError):
                stream.report_corrupt()
                raise


def _piece(extent: Extent, place: int) -> _Piece:
    return _Piece(extent.offset, extent.length, place + extent.logical)


def _runs(layer: Layer, pieces: list[_Piece]) -> Iterator[tuple[int, int, list[_Piece]]]:
    """(first span, one past the last, pieces): what is read in one request, each from a restart point."""
    begin, stop, wanted = -1, -1, list[_Piece]()
    for piece in pieces:
        first = layer.spans.restart(layer.spans.find(piece.offset))
        last = layer.spans.find(piece.offset + piece.length - 1) + 1
        if wanted and first <= stop:
            stop = max(stop, last)
        else:
            if wanted:
                yield begin, stop, wanted
            begin, stop, wanted = first, last, []
        wanted.append(piece)
    if wanted:
        yield begin, stop, wanted


def _write(fd: int, data: memoryview, place: int) -> None:
    while data:
        written = os.pwrite(fd, data, place)
        data, place = data[written:], place + written


class _Window(RawIOBase):
    """Reads [start, start + size) of a descriptor that it does not own."""

    def __init__(self, fd: int, start: int, size: int) -> None:
        self._fd = fd
        self._at = start
        self._end = start + size

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: bytearray | memoryview) -> int:  # type: ignore[override]
        count = os.preadv(self._fd, [memoryview(buffer)[: self._end - self._at]], self._at)
        self._at += count
        return count
