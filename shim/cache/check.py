"""Check a cached layer as it lies on disk, also while a daemon uses it. Nothing is changed here."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from shim.cache import bitmap
from shim.cache.hashing import hash_range
from shim.cache.layer import padded
from shim.index.model import Spans


@dataclass(slots=True)
class Checked:
    """What a layer claims to have (`spans`, `bytes` uncompressed), which of it hashes wrong, and what else is amiss.

    wrong: numbers of spans. torn: the bitmap cannot be used, so the layer counts as empty when it is opened.
    """

    spans: int = 0
    bytes: int = 0
    wrong: list[int] = field(default_factory=list)
    torn: bool = False
    problems: list[str] = field(default_factory=list)


def claimed(path: Path, spans: Spans) -> int:
    """Uncompressed bytes that the layer in directory `path` claims to have on disk; 0 if its bitmap is unusable."""
    flags = bitmap.load(path / "bitmap", spans.count, spans.table_digest()) or b""
    return sum(spans.ustart(i + 1) - spans.ustart(i) for i, flag in enumerate(flags) if flag)


def check_layer(path: Path, spans: Spans, progress: Callable[[int], None] = lambda _: None) -> Checked:
    """Hash every span that the layer in directory `path` claims. progress: called with the bytes
    hashed since the last call.

    A daemon may fetch and drop spans meanwhile: a bit is set after its data and cleared before, so what hashes wrong is
    wrong only if its bit is still set afterwards. Raises nothing: what cannot be read counts as wrong.
    """
    found = Checked()
    digest = spans.table_digest()
    flags = bitmap.load(path / "bitmap", spans.count, digest)
    if flags is None:
        found.torn = (path / "bitmap").exists()
        if found.torn:
            found.problems.append("its bitmap is torn: all of it will be fetched again")
        return found
    try:
        fd = os.open(path / "data", os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    except OSError as error:
        found.torn = True
        found.problems.append(f"its data cannot be opened: {error.strerror}")
        return found
    try:
        wanted, actual = padded(spans.ustart(spans.count)), os.fstat(fd).st_size
        if actual != wanted:
            found.problems.append(f"its data file has {actual} bytes instead of {wanted}")
        for i in (i for i, flag in enumerate(flags) if flag):
            start, end = spans.ustart(i), spans.ustart(i + 1)
            found.spans += 1
            found.bytes += end - start
            if hash_range(fd, start, end) != spans.digest(i):
                found.wrong.append(i)
            progress(end - start)
    finally:
        os.close(fd)
    if found.wrong:
        now = bitmap.load(path / "bitmap", spans.count, digest) or bytes(spans.count)
        found.wrong = [i for i in found.wrong if now[i]]
    if found.wrong:
        found.problems.append(f"{len(found.wrong)} of {found.spans} spans have wrong bytes")
    if not (path / "meta.json").exists():
        found.problems.append("its meta.json is missing")
    return found
