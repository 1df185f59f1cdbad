"""Read an archive through and compare every span with its index."""

from __future__ import annotations

from collections.abc import Callable
from hashlib import sha256

from shim.archive.source import ArchiveBytes, Reader
from shim.errors import IntegrityError
from shim.index import archived
from shim.index.model import Index

Progress = Callable[[int, int], None]
MAX_DIFFERENCES = 50


def check_archive(index: Index, reader: Reader, *, progress: Progress | None = None) -> list[str]:
    """What is wrong with the data of an archive's index, one line each, at most 50; empty if all is right.

    Raises StoreError: it cannot be read.
    """
    assert index.archive is not None
    layer = ArchiveBytes(reader, archived.flat(index.archive))
    spans = index.layers[0].spans
    wrong: list[str] = []
    for i in range(spans.count):
        start, end = spans.ustart(i), spans.ustart(i + 1)
        try:
            data = layer.read(start, end)
        except IntegrityError as error:
            return [*wrong, str(error)]
        if sha256(data).digest() != spans.digest(i):
            wrong.append(f"the data at {start} to {end} are not what the index says")
            if len(wrong) == MAX_DIFFERENCES:
                return wrong
        if progress is not None:
            progress(end, spans.ustart(spans.count))
    return wrong
