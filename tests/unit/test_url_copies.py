"""Copies of what URLs gave: beside the cleaner, which may take one at any moment."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from shim.daemon import resolve
from shim.daemon.flights import Flights
from shim.daemon.resolve import Resolver
from shim.stores import urls

URL = "s3://bucket/a.clip"


@pytest.fixture
def resolver(tmp_path: Path) -> Resolver:
    made = Resolver.__new__(Resolver)
    made._urls = tmp_path
    made._flights = Flights()
    return made


def test_a_copy_that_is_cleaned_while_its_store_is_asked(resolver: Resolver, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str | None] = []

    def fetch(_value: str, _place: object, kept: Path, known: str | None) -> None:
        asked.append(known)
        if known:  # "unchanged"
            kept.unlink()
        else:
            kept.write_bytes(b"again")

    kept = resolver._urls / resolve.sha256(URL.encode()).hexdigest()
    kept.write_bytes(b"first")
    os.setxattr(kept, resolve._TAG, b"etag")
    monkeypatch.setattr(resolver, "_fetch", fetch)
    fd = resolver._url(URL, urls.parse(URL))
    try:
        assert os.read(fd, 9) == b"again"
    finally:
        os.close(fd)
    assert asked == ["etag", None]


def test_a_copy_that_is_used_does_not_grow_old(resolver: Resolver, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = resolver._urls / resolve.sha256(URL.encode()).hexdigest()
    kept.write_bytes(b"x")
    old = time.time() - 20 * 86400
    os.utime(kept, (old, old))
    monkeypatch.setattr(resolver, "_fetch", lambda *_: None)
    os.close(resolver._url(URL, urls.parse(URL)))
    assert kept.stat().st_mtime > time.time() - 60
