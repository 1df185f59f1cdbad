"""Which of STATE/indexes the cleaner may take: what the daemon brought there, while nobody uses it."""

from __future__ import annotations

import os
import time
from dataclasses import replace
from pathlib import Path

import pytest

from shim.cache.clean import Item
from shim.daemon import indexfile
from shim.daemon.keptindexes import KeptIndexes, note_of
from shim.index import codec
from shim.stores.directory import DirectoryStore
from tests.support.indexes import sample

NAME = "registry.example.com/app/sha256-1.clip"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "indexes").mkdir()
    return tmp_path / "indexes"


@pytest.fixture
def head(root: Path) -> indexfile.Head:
    """NAME, by the daemon, which is 1000 s old; and mine.clip, by somebody."""
    file = root.parent / "a.clip"
    codec.write_index(file, sample())
    with open(file, "rb") as opened:
        found = indexfile.identify(opened.fileno(), {})
    store = DirectoryStore(root)
    store.put(NAME, file, note=note_of(found))
    store.put("mine.clip", file)
    old = time.time() - 1000
    os.utime(root / NAME, (old, old))
    return found


def test_what_somebody_put_there_is_not_listed(root: Path, head: indexfile.Head) -> None:
    (root / ".making").mkdir()
    DirectoryStore(root).put(".making/x", root / NAME, note=note_of(head))
    (item,) = KeptIndexes(root.parent).items([], ())
    assert (item.kind, item.name, item.what) == ("index", NAME, head.image)
    assert item.size == (root / NAME).stat().st_blocks * 512 > 0
    assert item.last_used == (root / NAME).stat().st_mtime
    assert (item.in_use, item.pinned) == (False, False)


def test_it_is_used_as_its_tree_is(root: Path, head: indexfile.Head) -> None:
    kept = KeptIndexes(root.parent)
    now = time.time()
    trees = [Item("tree", "0" * 64, 1, now + 5, in_use=True), Item("tree", head.hex, 1, now)]
    (item,) = kept.items(trees, ())
    assert (item.last_used, item.in_use) == (now, False)
    (item,) = kept.items([replace(trees[1], in_use=True)], ())
    assert item.in_use
    for pin in (head.digest, f"sha256:{head.hex}"):
        (item,) = kept.items([], {pin: ""})
        assert item.pinned


def test_a_file_that_is_open_or_was_replaced_stays(root: Path, head: indexfile.Head) -> None:
    kept = KeptIndexes(root.parent)
    (item,) = kept.items([], ())
    with open(root / NAME, "rb"):
        assert not kept.remove(item)
    DirectoryStore(root).put(NAME, root / "mine.clip", replace=True, note=note_of(head))
    assert not kept.remove(item)
    (item,) = kept.items([], ())
    assert kept.remove(item)
    assert not kept.remove(item)
    assert [path.name for path in root.rglob("*.clip")] == ["mine.clip"]


def test_it_keeps_the_time_of_its_tree_when_that_goes(root: Path, head: indexfile.Head) -> None:
    kept = KeptIndexes(root.parent)
    old = time.time() - 40 * 86400
    os.utime(root / NAME, (old, old))
    used = time.time() - 3600
    (item,) = kept.items([Item("tree", head.hex, 1, used)], ())
    kept.follow(item)
    (item,) = kept.items([], ())
    assert item.last_used == pytest.approx(used, abs=1)
    kept.follow(replace(item, last_used=item.last_used + 60))  # not at each start
    assert kept.items([], ())[0].last_used == item.last_used
    kept.follow(replace(item, name="gone"))


def test_a_file_that_was_copied_over_one_of_ours_stays(root: Path, head: indexfile.Head) -> None:
    """`cp` keeps the inode, and with it our note."""
    other = sample()
    other.config += b" "
    codec.write_index(root / "other", other)
    (root / NAME).write_bytes((root / "other").read_bytes())
    kept = KeptIndexes(root.parent)
    (item,) = kept.items([], ())
    assert not kept.remove(item)
    assert kept.items([], ()) == []
    assert codec.index_digest((root / NAME).read_bytes()) != f"sha256:{head.hex}"


def test_copies_of_urls_and_what_tags_meant(root: Path) -> None:
    """A Go clip file is no index, and a copy of it is ours all the same."""
    for name, note in ((".urls/a", note_of(None)), (".tags/b", None), (".tags/.b.tmp", None), (".urls/old", None)):
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).write_bytes(b"x")
        if note is not None:
            os.setxattr(root / name, *note)
    kept = KeptIndexes(root.parent)
    items = kept.items([], ())
    assert sorted((item.kind, item.name, item.what) for item in items) == [
        ("index", ".urls/a", ""),
        ("tag", ".tags/b", ""),
    ]
    assert all(kept.remove(item) for item in items)


def test_what_was_left_unfinished_goes_after_a_day(root: Path) -> None:
    for name in (".incoming-x", "r/app/.incoming-y", "r/app/.mine", ".tags/.z", ".tags/z"):
        for age in ("new", "old"):
            path = root / (name + age)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(b"")
            if age == "old":
                os.utime(path, (0, 0))
    KeptIndexes(root.parent).sweep()
    left = sorted(path.name for path in root.rglob("*") if path.is_file() and path.name.endswith("old"))
    assert left == [".mineold", "zold"]
    assert len([path for path in root.rglob("*new") if path.is_file()]) == 5
