"""A directory as a store, into which others may write too."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from shim.errors import StoreError
from shim.index import container
from shim.registry.ref import ImageRef
from shim.stores.base import name_of
from shim.stores.directory import DirectoryStore


@pytest.mark.parametrize("what", ["directory", "pipe", "endless"])
def test_what_is_no_index_in_a_directory(what: str, tmp_path: Path) -> None:
    """Nothing is waited for, and no disk is filled."""
    image = ImageRef("r.io", "team/app", None, "sha256:" + "ab" * 32)
    place = tmp_path / "store" / name_of(image)
    place.parent.mkdir(parents=True)
    if what == "directory":
        place.mkdir()
    elif what == "pipe":
        os.mkfifo(place)
    else:
        place.touch()
        os.truncate(place, container.MAX_FILE + 1)
    before = os.listdir("/proc/self/fd")
    with pytest.raises(StoreError, match="is no regular file of at most"), open(os.devnull, "wb") as null:
        DirectoryStore(tmp_path / "store").find(image, null)
    assert os.listdir("/proc/self/fd") == before
