"""Which span has to be shown by who claims a cached layer: one that nobody can make up."""

from __future__ import annotations

import random
import time
from array import array
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import sha256
from types import SimpleNamespace
from typing import Any, cast

import pytest

from shim.archive.source import ArchiveBytes
from shim.cache.layer import CachedLayer
from shim.daemon import access
from shim.daemon.access import Access, Held
from shim.errors import IntegrityError
from shim.index.model import Compression, Restart, SpanTable
from shim.registry.client import RegistryClient
from shim.registry.ref import ImageRef

SPAN = 4096
COUNT = 500
IMAGE = ImageRef("liar.example.com", "app", None, "sha256:" + "0" * 64)


def table(data: bytes, lengths: list[int], kind: Restart = Restart.STREAM) -> SpanTable:
    """Spans of uncompressed `data`; all but the first are of `kind`."""
    spans = SpanTable()
    at = 0
    for length in lengths:
        spans.digests += sha256(data[at : at + length]).digest()
        at += length
        spans.ustarts.append(at)
        spans.kinds.append(kind if spans.kinds else Restart.STREAM)
    spans.cstarts = array("Q", spans.ustarts)
    spans.bits = bytearray(len(lengths))
    spans.windows = [b""] * len(lengths)
    return spans


def cached(spans: SpanTable) -> CachedLayer:
    known = SimpleNamespace(registries=lambda: {"mine.example.com"}, has=lambda _: False)
    return cast(CachedLayer, SimpleNamespace(spans=spans, cached_bytes=1, access=known, allow=lambda _: None))


class Shown:
    """A registry, or an archive, with these bytes. asked: the ranges; sent: chunks that were taken of the answers."""

    def __init__(self, data: bytes) -> None:
        self.data = data
        self.asked: list[tuple[int, int]] = []
        self.sent = 0
        self.place = "the file x"

    def check_access(self, *_: object, **__: object) -> None:
        pass

    @contextmanager
    def open_blob(self, _ref: ImageRef, _digest: str, start: int, end: int, **_: Any) -> Iterator[Iterator[bytes]]:
        self.asked.append((start, end))
        yield self._chunks(start, end)

    def _chunks(self, start: int, end: int) -> Iterator[bytes]:
        for at in range(start, end, SPAN):
            self.sent += 1
            yield self.data[at : min(end, at + SPAN)]

    @contextmanager
    def stream(self, start: int, end: int) -> Iterator[list[bytes]]:
        self.asked.append((start, end))
        yield [self.data[start:end]]


def ask_registry(spans: SpanTable, shown: Shown) -> None:
    gate = Access(cast(RegistryClient, shown), "confirmed")
    gate.confirm(IMAGE, [Held(cached(spans), "sha256:" + "1" * 64, Compression.NONE)], time.monotonic() + 10)


def ask_archive(spans: SpanTable, shown: Shown) -> None:
    gate = Access(cast(RegistryClient, None), "confirmed")
    gate.confirm_archive(cached(spans), ArchiveBytes(shown, [0, 0, len(shown.data)]))


@pytest.mark.parametrize("ask", [ask_registry, ask_archive])
@pytest.mark.parametrize("regular", [True, False])
def test_zeros_prove_nothing(ask: Any, regular: bool) -> None:
    """One span in 500 has data: that is the one."""
    chance = random.Random(1)
    lengths = [SPAN if regular else chance.randrange(512, SPAN) for _ in range(COUNT)]
    size = sum(lengths)
    where = sum(lengths[:321])
    data = bytes(where) + chance.randbytes(lengths[321]) + bytes(size - where - lengths[321])
    spans = table(data, lengths)
    honest = Shown(data)
    ask(spans, honest)
    assert honest.asked == [(where, where + lengths[321])]
    for _ in range(3):
        with pytest.raises(IntegrityError):
            ask(spans, Shown(bytes(size)))


@pytest.mark.parametrize("ask", [ask_registry, ask_archive])
def test_a_layer_of_zeros_is_everybodys(ask: Any) -> None:
    shown = Shown(bytes(COUNT * SPAN))
    ask(table(shown.data, [SPAN] * COUNT), shown)
    ask(table(b"", []), shown)
    assert shown.asked == []


@pytest.mark.parametrize("ask", [ask_registry, ask_archive])
def test_spans_of_many_lengths_cost_no_end_of_hashing(ask: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Then a span counts that may be one of zeros, as good as any."""
    monkeypatch.setattr(access, "_ZEROS", 3 * SPAN)
    lengths = list(range(512, 512 + COUNT))
    shown = Shown(bytes(sum(lengths)))
    ask(table(shown.data, lengths), shown)
    assert len(shown.asked) == 1


def test_no_span_far_from_a_restart_point_is_asked_for() -> None:
    """A stream that can only be read from its start is not fetched whole."""
    data = random.Random(2).randbytes(COUNT * SPAN)
    for _ in range(20):
        shown = Shown(data)
        ask_registry(table(data, [SPAN] * COUNT, Restart.CONTINUE), shown)
        assert 1 <= shown.sent <= 16
