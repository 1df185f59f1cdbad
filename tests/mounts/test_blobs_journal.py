"""The journal on a tmpfs that fills up, as RUN is one: what it says stays readable, whatever had no room."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from shim.fuse import journal as journals
from shim.fuse.journal import Journal
from shim.mount import syscalls

PAGE = 4096


@pytest.fixture
def small(tmp_path: Path) -> Iterator[Path]:
    """A file system of three pages."""
    place = tmp_path / "run"
    place.mkdir()
    syscalls.mount("tmpfs", place, "tmpfs", 0, f"size={3 * PAGE}")
    yield place
    syscalls.umount2(place, syscalls.MNT_DETACH)  # a test that failed has it open


def fill(journal: Journal, handle: int) -> int:
    """Open files until one cannot be recorded; its handle."""
    while True:
        try:
            journal.opened(handle, 16)
        except OSError:
            return handle
        handle += 1


def same(journal: Journal) -> bool:
    """Whether a successor reads what the journal has in memory."""
    copy = Path(shutil.copy(journal.path, journal.path.parent.with_name("copy")))
    again = Journal(copy, fresh=False)
    again.close()
    return (again.nodes, again.opens) == (journal.nodes, journal.opens)


def test_a_line_that_fits_in_part_is_taken_back(small: Path) -> None:
    made = Journal(small / "journal", fresh=True)
    made.add_node(16, b"blob", 512)
    (small / "other").write_bytes(bytes(2 * PAGE))
    refused = fill(made, 1000)
    assert (small / "journal").stat().st_size % PAGE != 0  # a page takes no whole number of lines
    assert same(made)
    (small / "other").unlink()  # there is room again
    made.opened(refused, 16)
    made.closed(1000)
    assert same(made)
    made.close()


def test_a_journal_that_cannot_be_made_shorter_goes_on(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(journals, "_COMPACT_LINES", 20)
    made = Journal(small / "journal", fresh=True)
    made.add_node(16, b"blob", 512)
    (small / "other").write_bytes(bytes(2 * PAGE))  # the journal has a page, the shorter one would need another
    for handle in range(60):
        made.opened(handle, 16)
        made.closed(handle)
    assert same(made)
    assert sorted(path.name for path in small.iterdir()) == ["journal", "other"]
    made.close()
