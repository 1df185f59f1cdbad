"""Layers that are put into the cache whole, from outside the daemon."""

from __future__ import annotations

import errno
import os
from hashlib import sha256
from pathlib import Path

import pytest

from shim.archive.blocks import SPAN, layer_of
from shim.cache.seed import Seed
from shim.cache.store import LayerCache
from shim.index.model import Layer
from shim.index.spanfile import SpanFile, write_span_file
from tests.support.smallimage import noise

DATA = noise(3, 3 * SPAN + 77)


def layer() -> Layer:
    return layer_of(len(DATA), [sha256(DATA[at : at + SPAN]).digest() for at in range(0, len(DATA), SPAN)])


def test_the_cache_has_it(tmp_path: Path) -> None:
    root = tmp_path / "cache"
    seed = Seed(root)
    for at in range(0, len(DATA), 100_000):
        seed.write(DATA[at : at + 100_000])
    assert seed.keep(layer())
    seed.close()
    write_span_file(tmp_path / "spans", layer())
    cache = LayerCache(root)
    with SpanFile(tmp_path / "spans") as spans:
        cached = cache.layer(layer().diff_id, spans, spans.identity)
        assert cached.cached_bytes == len(DATA)
        assert all(cached.verify(span) for span in range(cached.count))
        assert cached.read(SPAN - 5, 10) == DATA[SPAN - 5 : SPAN + 5]
        cache.close()
    assert [path.name for path in root.iterdir() if path.is_dir()] == [cached.path.name]


def test_what_is_there_stays(tmp_path: Path) -> None:
    for _ in range(2):
        seed = Seed(tmp_path)
        seed.write(DATA)
        kept = seed.keep(layer())
        seed.close()
    assert not kept
    assert len(list(tmp_path.iterdir())) == 1


def test_what_was_left_is_removed(tmp_path: Path) -> None:
    seed = Seed(tmp_path)
    seed.write(DATA)
    assert len(list(tmp_path.iterdir())) == 1
    LayerCache(tmp_path).close()
    assert [path.name for path in tmp_path.iterdir()] == ["lock"]


def test_a_full_disk_is_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, "no space")

    seed = Seed(tmp_path)
    monkeypatch.setattr(os, "write", full)
    seed.write(DATA)
    monkeypatch.undo()
    assert seed.failed is not None
    assert not seed.keep(layer())
    seed.close()
    assert not list(tmp_path.iterdir())


def test_a_disk_that_is_nearly_full_is_left_alone(tmp_path: Path) -> None:
    seed = Seed(tmp_path, free_low=1.0)
    seed.write(DATA)
    assert not seed.keep(layer())
    assert not list(tmp_path.iterdir())
