"""The native index file: round trips, golden files, and what the file functions promise."""

from __future__ import annotations

import hashlib
import json
import mmap
import os
import stat
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shim.errors import IndexFormatError
from shim.index import codec, container
from shim.index.model import Extent, Index, Node, Tree
from shim.index.sparse import SparseWindows, pack_window, split_record, unpack_window
from tests.support import indexes, indexfiles
from tests.support.indexes import NS, directory, dump, file, put, sample, symlink

GOOD = indexes.ASSETS / "good"
SUMS: dict[str, Any] = json.loads((GOOD / "sums.json").read_text())


def test_round_trip_is_exact_and_deterministic() -> None:
    data = codec.encode(sample())
    back = codec.decode(data)
    assert dump(back) == dump(sample())
    assert codec.encode(back) == data == codec.encode(sample())
    assert back.tree.root.children is not None
    assert back.tree.root.children[b"usr"].nlink == 5


@pytest.mark.parametrize("name", sorted(SUMS))
def test_golden_file_still_means_the_same(name: str) -> None:
    data = (GOOD / f"{name}.clip").read_bytes()
    assert hashlib.sha256(data).hexdigest() == SUMS[name]["sha256"]
    index = codec.decode(data)
    assert dump(index) == json.loads((GOOD / f"{name}.json").read_text())
    raw = {tag.decode(): hashlib.sha256(part).hexdigest() for tag, part in codec.raw_sections(index).items()}
    assert raw == SUMS[name]["raw_sections"]


def test_writer_still_makes_the_golden_sections() -> None:
    """Compressed bytes may change with liblzma; the sections before that may not."""
    for name, (index, _) in indexes.good_files().items():
        raw = {tag.decode(): hashlib.sha256(part).hexdigest() for tag, part in codec.raw_sections(index).items()}
        assert raw == SUMS[name]["raw_sections"], name


def test_parts_alone() -> None:
    data = codec.encode(sample())
    layers = codec.decode(data, tree=False)
    assert layers.tree.root.children == {}
    assert dump(layers)["layers"] == dump(sample())["layers"]
    tree = codec.decode(data, spans=False)
    assert dump(tree)["tree"] == dump(sample())["tree"]
    assert all(layer.spans.count == 0 for layer in tree.layers)
    assert [path for path, _ in codec.decode_tree(data).walk()] == [path for path, _ in sample().tree.walk()]


def test_a_part_alone_does_not_read_the_others() -> None:
    """A damaged tree is found by who reads it, and by nobody else."""
    broken = indexfiles.tree_column("names", lambda column: column[:-1])
    assert codec.decode(broken, tree=False).image == sample().image
    assert codec.summary(broken)["layers"] == 4
    with pytest.raises(IndexFormatError, match="tree is damaged"):
        codec.decode(broken, spans=False)


def test_summary() -> None:
    data = codec.encode(sample())
    assert codec.summary(data) == {
        "image": "registry.example:5000/team/app_x/small:v1.0",
        "digest": indexes.digest("manifest"),
        "platform": "linux/arm64/v8",
        "layers": 4,
        "entries": len(dump(sample())["tree"]),
        "image_bytes": 3_000_000 + 20480 + 50_000 + 29,
        "index_bytes": len(data),
        "seek_points": 8,
    }


def test_any_buffer_is_read_and_let_go(tmp_path: Path) -> None:
    path = tmp_path / "x.clip"
    codec.write_index(path, sample())
    expected = dump(sample())
    data = bytearray(path.read_bytes())
    assert dump(codec.decode(data)) == dump(codec.decode(memoryview(data))) == expected
    data.append(0)  # BufferError if a view of it were still held
    with open(path, "rb") as handle, mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
        assert dump(codec.decode(mapped)) == expected


def test_index_digest_is_the_files_own(tmp_path: Path) -> None:
    path = tmp_path / "x.clip"
    digest = codec.write_index(path, sample())
    assert digest == "sha256:" + hashlib.sha256(path.read_bytes()).hexdigest() == codec.index_digest(path.read_bytes())


def test_write_is_complete_or_nothing(tmp_path: Path) -> None:
    path = tmp_path / "x.clip"
    path.write_bytes(b"old")
    before = os.umask(0o077)
    try:
        codec.write_index(path, sample())
    finally:
        os.umask(before)
    assert stat.S_IMODE(path.stat().st_mode) == 0o644
    old = path.read_bytes()
    bad = sample()
    bad.digest = "nonsense"
    with pytest.raises(IndexFormatError, match="manifest digest"):
        codec.write_index(path, bad)
    assert path.read_bytes() == old
    (tmp_path / "dir").mkdir()
    with pytest.raises(IsADirectoryError):
        codec.write_index(tmp_path / "dir", sample())
    assert sorted(os.listdir(tmp_path)) == ["dir", "x.clip"]


def test_read_takes_regular_files_only(tmp_path: Path) -> None:
    path = tmp_path / "x.clip"
    codec.write_index(path, sample())
    assert dump(codec.read_index(path)) == dump(sample())
    handle = os.open(path, os.O_RDONLY)
    try:
        os.lseek(handle, 100, os.SEEK_SET)
        assert dump(codec.read_index(handle)) == dump(sample())
        assert os.lseek(handle, 0, os.SEEK_CUR) == 100
    finally:
        os.close(handle)
    link = tmp_path / "link"
    link.symlink_to(path)
    with pytest.raises(OSError, match="symbolic link"):
        codec.read_index(link)
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    with pytest.raises(IndexFormatError, match="not a regular file"):
        codec.read_index(fifo)  # and does not wait for a writer
    with pytest.raises(IndexFormatError, match="not a regular file"):
        codec.read_index(tmp_path)
    with pytest.raises(FileNotFoundError):
        codec.read_index(tmp_path / "none")
    huge = tmp_path / "huge"
    with open(huge, "wb") as out:
        out.truncate((512 << 20) + 1)
    with pytest.raises(IndexFormatError, match="at most 536870912"):
        codec.read_index(huge)


def test_large_tree_is_coded_without_recursion_and_small() -> None:
    """100,000 entries, some 2,000 deep, in tar order: the offsets cost next to nothing."""
    index = sample()
    here = index.tree.root
    for _ in range(2000):
        assert here.children is not None
        here = here.children.setdefault(b"d", directory())
    offset = 512 * 3000
    sizes = []
    for number in range(98_000):
        size = 1 + number * 7919 % 30_000
        put(index.tree, f"usr/lib/m{number // 100:05}/f{number % 100:02}.py", file(size, 0, offset + 512))
        offset += 512 + (size + 511) // 512 * 512 + 512 * (number % 100 == 99)
        sizes.append(size)
    index.layers[0].uncompressed_size = index.layers[0].spans.ustarts[-1] = offset + 1024
    index.layers[0].spans = indexes.spans(
        3_000_000,
        offset + 1024,
        [(at, 0, 0, 1 if at == 0 else 0, b"") for at in range(0, offset, 1 << 25)],  # type: ignore[misc]
    )
    index.tree.count_links()
    data = codec.encode(index)
    assert dump(codec.decode(data))["tree"] == dump(index)["tree"]
    row = container.parse(memoryview(data), frozenset(codec.LIMITS)).sections[codec.TREE]
    assert row.length < 3 * 100_000  # two bytes of random size an entry, and a little


def test_pax_headers_do_not_cost_offsets() -> None:
    """A tar whose every entry has a PAX record has its data 1,536 bytes apart: predicted as well as 512."""

    def encoded(header: int) -> int:
        index = sample()
        offset = 0
        for number in range(3000):
            put(index.tree, f"x/{number:04}", file(700, 0, offset + header))
            offset += header + 1024
        data = codec.encode(index)
        return container.parse(memoryview(data), frozenset(codec.LIMITS)).sections[codec.TREE].length

    assert abs(encoded(512) - encoded(1536)) < 64


@pytest.mark.parametrize("seed", range(4))
def test_windows_survive(seed: int) -> None:
    windows = [b"", bytes(32768), indexes.window(seed, 100), b"\1" * 32768, bytes(32767) + b"x", b"x\0" * 16384]
    for window in windows:
        assert unpack_window(pack_window(window)) == window
    kept = SparseWindows(windows)
    assert kept == windows
    assert windows == kept
    assert kept[2:4] == windows[2:4]
    assert sum(map(len, SparseWindows([indexes.window(seed, 257)]).records)) < 4096


@pytest.mark.parametrize(
    ("runs", "window"),
    [
        ([], bytes(32768)),
        ([(0, 1)], b"x" + bytes(32767)),
        ([(1, 3), (32767, 1)], b"\0x\0y" + bytes(32763) + b"z"),
        ([(2, 2), (6, 32761)], b"\0\0xy\0\0" + b"z" * 32761 + b"\0"),
    ],
)
def test_a_windows_runs_are_joined_over_one_zero(runs: list[tuple[int, int]], window: bytes) -> None:
    numbers, at = split_record(record := pack_window(window))
    assert [*zip(numbers[::2], numbers[1::2], strict=True)] == runs
    assert record[at:] == b"".join(window[start : start + length] for start, length in runs)


NAMES = st.binary(min_size=1, max_size=12).filter(lambda name: name not in (b".", b"..") and not set(name) & {0, 47})
IDS = st.integers(0, (1 << 32) - 2)
TIMES = st.integers(-(1 << 63) * NS, (1 << 63) * NS - 1) | st.integers(-3, 3)
XATTRS = st.dictionaries(
    st.sampled_from([b"user.a", b"security.capability", b"trusted.t", b"system.posix_acl_default", b"user.\xff"]),
    st.binary(max_size=9),
).map(lambda found: tuple(sorted(found.items())))
USIZES = [9_000_000, 20480, 1_000_000, 0]


@st.composite
def files(draw: st.DrawFn) -> Node:
    node = Node(stat.S_IFREG)
    extents: list[Extent] = []
    logical = 0
    for gap, length in draw(
        st.lists(st.tuples(st.integers(0, 9) | st.just(1 << 40), st.integers(1, 9999)), max_size=3)
    ):
        layer = draw(st.integers(0, 2))
        offset = draw(st.integers(0, USIZES[layer] - length))
        extents.append(Extent(logical + gap, layer, offset, length))
        logical += gap + length
    node.extents = tuple(extents)
    node.size = logical + draw(st.sampled_from([0, 0, 1, 1 << 62]))
    return node


@st.composite
def nodes(draw: st.DrawFn) -> Node:
    kind = draw(st.integers(0, 5))
    if kind < 2:
        node = draw(files())
    elif kind == 2:
        node = directory()
    elif kind == 3:
        node = symlink(draw(st.binary(min_size=1, max_size=20).filter(lambda target: b"\0" not in target)))
    elif kind == 4:
        node = Node(stat.S_IFBLK, rdev=(draw(st.integers(0, 4095)), draw(st.integers(0, 1048575))))
    else:
        node = Node(draw(st.sampled_from([stat.S_IFIFO, stat.S_IFSOCK])))
    node.mode = stat.S_IFMT(node.mode) | draw(st.integers(0, 0o7777))
    node.uid, node.gid, node.mtime, node.xattrs = draw(IDS), draw(IDS), draw(TIMES), draw(XATTRS)
    return node


@st.composite
def trees(draw: st.DrawFn) -> Tree:
    tree = Tree(directory())
    directories = [tree.root]
    leaves: list[Node] = []
    for node in draw(st.lists(nodes(), max_size=25)):
        children = draw(st.sampled_from(directories)).children
        assert children is not None
        name = draw(NAMES)
        if name in children:
            continue
        if leaves and draw(st.integers(0, 4)) == 0:
            children[name] = draw(st.sampled_from(leaves))
            continue
        children[name] = node
        (leaves if node.children is None else directories).append(node)
    tree.count_links()
    return tree


@settings(max_examples=100, deadline=None)
@given(trees())
def test_any_tree_survives(tree: Tree) -> None:
    index = sample()
    index.tree = tree
    data = codec.encode(index)
    assert dump(codec.decode(data)) == dump(index)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 1 << 22), st.integers(0, 1 << 40), st.integers(0, 7), st.integers(0, 2),
                          st.binary(max_size=40)), min_size=1, max_size=12))  # fmt: skip
def test_any_span_table_survives(rows: list[tuple[int, int, int, int, bytes]]) -> None:
    points = []
    ustart = cstart = 0
    for number, (length, step, bits, drawn, start) in enumerate(rows):
        kind = drawn if number else 1
        window = start.ljust(32768, b"\0") if kind == 2 and start else b""
        points.append((ustart, cstart, bits if kind == 2 else 0, kind, window))
        ustart, cstart = ustart + length, cstart + step
    index = sample()
    index.tree = Tree(directory(nlink=2))
    layer = index.layers[0]
    layer.size, layer.uncompressed_size = cstart, ustart
    layer.spans = indexes.spans(cstart, ustart, points)  # type: ignore[arg-type]
    back = codec.decode(codec.encode(index))
    assert dump(back) == dump(index)
    assert back.layers[0].spans.table_digest() == layer.spans.table_digest()


def test_layers_given_one_by_one_make_the_same_file() -> None:
    """Windows are cut where layers end: layers of none, of too little for a piece, and of more than one."""
    index = sample()
    model = index.layers[0]
    index.layers = []
    for count in (1, 3, 20, 1, 100):
        points = [(0, 0, 0, 1, b"")] + [(n << 20, n << 16, n % 8, 2, indexes.window(n, 60)) for n in range(1, count)]
        spans = indexes.spans(max(count, 1) << 16, max(count, 1) << 20, points)  # type: ignore[arg-type]
        index.layers.append(replace(model, size=spans.cstarts[-1], uncompressed_size=spans.ustarts[-1], spans=spans))
    index.tree = Tree(directory(nlink=2))
    whole = codec.encode(index)
    for known in range(len(index.layers) + 1):
        with codec.Encoder() as encoder:
            for layer in index.layers[:known]:
                encoder.layer(layer)
            assert encoder.finish(index) == whole
    assert dump(codec.decode(whole)) == dump(index)


def test_foreign_bytes_before_the_index_are_ignored() -> None:
    data = codec.encode(sample())
    assert dump(codec.decode(container.GO_MAGIC + bytes(5000) + data)) == dump(sample())


def test_index_of_no_layers() -> None:
    index: Index = indexes.smallest()
    assert dump(codec.decode(codec.encode(index))) == dump(index)
