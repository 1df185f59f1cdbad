"""Which index a descriptor is, and when that is remembered."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from shim.daemon import indexfile
from shim.errors import CacheError, IndexFormatError
from shim.index import codec
from tests.support.indexes import sample


@pytest.fixture
def index(tmp_path: Path) -> Path:
    codec.write_index(tmp_path / "a.clip", sample())
    return tmp_path / "a.clip"


def test_a_file_that_was_just_written_is_not_remembered(index: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It may change again within one tick of the file system's clock and keep its times."""
    known: dict[indexfile.Identity, indexfile.Head] = {}
    with open(index, "rb") as file:
        first = indexfile.identify(file.fileno(), known)
        assert f"sha256:{first.hex}" == codec.index_digest(index.read_bytes())
        assert known == {}
        now = time.time_ns()
        monkeypatch.setattr(time, "time_ns", lambda: now + 10**10)
        assert indexfile.identify(file.fileno(), known) == first
        assert list(known.values()) == [first]
        monkeypatch.setattr(indexfile, "_pieces", lambda _: pytest.fail("it was read again"))
        assert indexfile.identify(file.fileno(), known) == first


def test_a_copy_has_the_hash_it_is_named_by(index: Path, tmp_path: Path) -> None:
    with open(index, "r+b") as file:
        hex_ = indexfile.identify(file.fileno(), {}).hex
        place = tmp_path / "trees" / hex_
        place.parent.mkdir()
        os.pwrite(file.fileno(), b"x", os.fstat(file.fileno()).st_size - 20)  # in the last section
        with pytest.raises(IndexFormatError, match="changed while it was read"):
            indexfile.keep(file.fileno(), hex_, place)
        assert list(place.parent.iterdir()) == []
        hex_ = indexfile.identify(file.fileno(), {}).hex
        assert indexfile.keep(file.fileno(), hex_, place) is True
        assert indexfile.keep(file.fileno(), hex_, place) is False
        assert (place / "index.clip").read_bytes() == index.read_bytes()


def test_a_disk_that_takes_nothing_is_named(index: Path, tmp_path: Path) -> None:
    with open(index, "rb") as file, pytest.raises(CacheError, match=r"cannot be kept in .*none.*No such file"):
        indexfile.keep(file.fileno(), "0" * 64, tmp_path / "none" / "x")
