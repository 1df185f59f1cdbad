"""What a server takes over from a predecessor, and when it begins anew instead."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from shim.daemon import handover
from shim.daemon.fdstore import FdStore
from shim.errors import DaemonError
from shim.fuse import proto
from shim.fuse.journal import Journal

RESEND = proto.InitState(7, 40, proto.HAS_RESEND | proto.INIT_EXT, 131072)
OLD = proto.InitState(7, 38, 0, 131072)


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FdStore]:
    made = FdStore(tmp_path, {})
    monkeypatch.setenv("NOTIFY_SOCKET", made.address)
    made.fds["blobs"] = os.open("/dev/null", os.O_RDONLY)
    yield made
    made.close()


def journal(run: Path, init: proto.InitState | None) -> None:
    made = Journal(run / handover.JOURNAL, fresh=True)
    if init is not None:
        made.record_init(init)
    made.add_node(16, b"blob", 512)
    made.close()


def test_a_predecessors_blobs(tmp_path: Path, store: FdStore) -> None:
    journal(tmp_path, RESEND)
    reader, writer = os.pipe()
    taken = handover.take({"blobs": [reader]}, tmp_path)
    assert taken is not None
    assert taken[0] == reader
    assert taken[1].init == RESEND
    assert taken[1].nodes == {16: (b"blob", 512)}
    taken[1].close()
    store.receive(os.getpid())
    assert "blobs" in store.fds
    for fd in (reader, writer):
        os.close(fd)


@pytest.mark.parametrize(
    "what", ["unmounted", "old kernel", "no INIT", "no journal", "damaged journal", "newer journal"]
)
def test_what_cannot_be_taken_over_is_let_go(tmp_path: Path, store: FdStore, what: str) -> None:
    """Here and in the store: only then do those who wait hear that nobody will answer."""
    if what != "no journal":
        journal(tmp_path, {"old kernel": OLD, "no INIT": None}.get(what, RESEND))
    if what == "damaged journal":
        (tmp_path / handover.JOURNAL).write_text('{"v": 1, "next": 16}\n{"open": "x", "node": 16}\n')
    if what == "newer journal":
        (tmp_path / handover.JOURNAL).write_text('{"v": 99, "next": 16}\n')
    reader, writer = os.pipe()
    if what == "unmounted":
        os.close(writer)  # POLLHUP, as a connection that was aborted has POLLERR
    assert handover.take({"blobs": [reader]}, tmp_path) is None
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(reader)
    store.receive(os.getpid())
    assert store.fds == {}
    if what != "unmounted":
        os.close(writer)


def test_a_journal_that_is_cut_anywhere(tmp_path: Path) -> None:
    """It is what it was some lines before, or damaged when not even the first is whole."""
    path = tmp_path / "journal"
    made = Journal(path, fresh=True)
    made.record_init(RESEND)
    made.add_node(16, b"bl\xffob", 512)
    made.opened(1, 16)
    made.closed(1)
    made.close()
    whole = path.read_bytes()
    for cut in range(len(whole)):
        path.write_bytes(whole[:cut])
        if b"\n" not in whole[:cut]:
            with pytest.raises(DaemonError, match="is damaged"):
                Journal(path, fresh=False)
            continue
        found = Journal(path, fresh=False)
        found.close()
        lines = whole[:cut].count(b"\n")
        assert (found.init is not None, len(found.nodes), len(found.opens)) == (lines > 1, lines > 2, lines == 4)


@pytest.mark.parametrize("text", ['{"v": 1, "next": 1e400}', "[" * 100_000, '{"v": 1, "next": NaN}', "5", "\xff"])
def test_a_journal_of_nonsense_is_damaged(tmp_path: Path, text: str) -> None:
    (tmp_path / "journal").write_text(f"{text}\n", "latin-1")
    with pytest.raises(DaemonError, match="is damaged"):
        Journal(tmp_path / "journal", fresh=False)


def test_nothing_to_take_over(tmp_path: Path) -> None:
    assert handover.take({}, tmp_path) is None
