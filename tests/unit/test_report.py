"""Which files a start's reads were for, and the trace they come from."""

from __future__ import annotations

import json
import re
from pathlib import Path

from shim.cli.report import page, resolve
from shim.daemon.trace import MAX_EVENTS, Trace, WatchedBlob
from shim.errors import DaemonError, ShimError
from shim.fuse.blob import Buffer, Done
from shim.index import codec
from shim.index.model import Tree
from tests.support import indexes


class Fake:
    """A blob: even offsets are cached in the file, odd ones in memory or not at all."""

    node_id, name, size, data_fd, epoch = 2, b"layer", 1 << 20, -1, 7

    def __init__(self) -> None:
        self.pending: list[Done] = []

    def stamp(self, offset: int, _size: int) -> int:
        return self.epoch if offset % 2 == 0 else -1

    def read_cached(self, offset: int, size: int) -> Buffer | None:
        return b"x" * size if offset == 1 else None

    def read_missing(self, _offset: int, _size: int, done: Done) -> None:
        self.pending.append(done)

    def trouble(self) -> str:
        return "trouble"


def test_every_way_of_a_read_is_told_once() -> None:
    told: list[tuple[str, int, int, bool]] = []
    fake = Fake()
    blob = WatchedBlob(fake)

    def listen(name: str, offset: int, size: int, _asked: float, waited: float) -> None:
        told.append((name, offset, size, waited > 0))

    assert blob.stamp(0, 5) == 7  # nobody listens yet
    blob.watchers += (listen,)
    assert blob.stamp(4, 5) == 7
    assert blob.stamp(1, 5) == -1
    assert blob.read_cached(1, 5) == b"xxxxx"
    assert blob.read_cached(3, 5) is None
    answers: list[Buffer | ShimError] = []
    blob.read_missing(3, 5, answers.append)
    assert [row[1] for row in told] == [4, 1]
    fake.pending.pop()(DaemonError("no"))
    assert isinstance(answers[0], DaemonError)
    assert told == [("layer", 4, 5, False), ("layer", 1, 5, False), ("layer", 3, 5, True)]
    assert (blob.trouble(), blob.epoch, blob.data_fd) == ("trouble", 7, -1)


def test_a_trace_is_bounded_and_counts_each_byte_once() -> None:
    trace = Trace(["a", "b"], 100.0, 10.0)
    trace.add("a", 0, 10, 100.0, 0.0)
    trace.add("a", 10, 10, 100.001, 0.0)  # joins
    trace.add("a", 5, 20, 101.0, 0.5)
    trace.add("b", 5, 20, 102.0, 0.25)
    trace.add("c", 0, 1, 102.0, 0.0)  # not ours
    trace.add("a", 0, 1, 99.0, 0.0)  # before
    trace.add("a", 0, 1, 111.0, 0.0)  # behind
    assert trace.events() == [[0, 0, 20, 0.0, 0.0], [0, 5, 20, 1000.0, 500.0], [1, 5, 20, 2000.0, 250.0]]
    assert trace.summary() == {"reads": 4, "waited": 2, "needed_bytes": 45, "slowest_ms": 500.0}
    for number in range(MAX_EVENTS):
        trace.add("a", number * 1000, 1, 103.0, 0.0)
    assert len(trace.events()) == MAX_EVENTS
    assert trace.lost == 3
    assert trace.reads == MAX_EVENTS + 4


def test_files_of_reads(tmp_path: Path) -> None:
    index = indexes.sample()
    index.tree = Tree(indexes.directory())
    indexes.put(index.tree, "a", indexes.file(100, 0, 512))
    indexes.put(index.tree, b"b\xff", indexes.file(1000, 0, 1024))
    indexes.put(index.tree, "c", indexes.file(100, 1, 512))
    path = tmp_path / "index.clip"
    path.write_bytes(codec.encode(index))
    events = [[0, 0, 512, 0, 0], [0, 1024, 50, 0, 0], [0, 600, 1000, 0, 0], [1, 0, 4096, 0, 0], [0, 1030, 5, 0, 0]]
    found = resolve(path, [[float(n) for n in row] for row in events], 2)
    names = [found["files"][n][0] if n >= 0 else None for n in found["file_of"]]
    assert names == [None, "/b\\xff", "/a", "/c", "/b\\xff"]
    assert found["layer_sizes"] == [layer.uncompressed_size for layer in index.layers]
    assert resolve(tmp_path / "gone", [[0.0, 0, 1, 0, 0]], 3)["file_of"] == [-1]


def test_no_name_ends_the_script() -> None:
    evil = "</script><b>\u2028&"
    text = page({"image": evil})
    assert text.count("</script>") == 1
    record = re.search(r"^const record = (.*);$", text, re.MULTILINE)
    assert record is not None
    assert json.loads(record[1])["image"] == "</script><b>\u2028&"
