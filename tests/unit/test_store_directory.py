"""A directory as a store, into which others may write too."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from shim.cli.main import main
from shim.errors import StoreError
from shim.index import codec, container
from shim.registry.ref import ImageRef
from shim.stores.base import name_of, whole_file
from shim.stores.directory import DirectoryStore
from tests.support.descriptors import descriptors
from tests.support.indexes import sample


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
    before = descriptors()
    with pytest.raises(StoreError, match="is no regular file of at most"), open(os.devnull, "wb") as null:
        DirectoryStore(tmp_path / "store").find(image, null)
    assert descriptors() <= before


def test_what_is_no_file_is_not_replaced(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`-o /dev/null`, by root: the machine would have a file there from then on, and /dev/stdout is a link."""
    index = tmp_path / "a.clip"
    codec.write_index(index, sample())
    pipe, link = tmp_path / "null", tmp_path / "stdout"
    os.mkfifo(pipe)
    link.symlink_to("null")
    for place in (pipe, link):
        assert main(["push", str(index), str(place)]) == 1
        assert f"{place} cannot be written: it is there, and is no regular file" in capsys.readouterr().err
        with pytest.raises(StoreError, match="is no regular file"), whole_file(place) as out:
            out.write(b"x")
        with pytest.raises(FileExistsError, match="is no regular file"):
            codec.write_file(place, b"x")
    assert pipe.is_fifo()
    assert link.is_symlink()
    assert {path.name for path in tmp_path.iterdir()} == {"a.clip", "null", "stdout"}
