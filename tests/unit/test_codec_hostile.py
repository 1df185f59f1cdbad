"""Damaged and hostile index files: one typed error, or a valid index; never a crash, a hang or a balloon."""

from __future__ import annotations

import json
import random
import re
import resource
import struct
import subprocess
import sys
import textwrap
import tracemalloc
from pathlib import Path

import pytest

from shim.errors import IndexFormatError
from shim.index import codec, columns, container, treecodec, treereader
from shim.index.flat import flatten
from shim.index.model import Index
from shim.index.validate import validate_tree
from tests.support import indexes, indexfiles
from tests.support.indexes import dump, sample

BAD = indexes.ASSETS / "bad"
ERRORS: dict[str, str] = json.loads((BAD / "errors.json").read_text())


@pytest.mark.parametrize("name", sorted(ERRORS))
def test_stored_bad_file_is_refused(name: str) -> None:
    with pytest.raises(IndexFormatError) as caught:
        codec.decode((BAD / f"{name}.clip").read_bytes())
    assert re.search(ERRORS[name], str(caught.value)), caught.value


def test_corpus_is_what_the_script_makes() -> None:
    made = indexfiles.bad_files()
    assert sorted(made) == sorted(ERRORS) == sorted(path.stem for path in BAD.glob("*.clip"))
    for name, (data, message) in made.items():
        with pytest.raises(IndexFormatError, match=message):
            codec.decode(data)
        assert ERRORS[name] == message


def _accepts(data: bytes) -> bool:
    """Decode: False for an IndexFormatError. What is accepted must be valid, and survive being written again."""
    index, message = None, ""
    try:
        index = codec.decode(data)
    except IndexFormatError as error:
        message = str(error)
    if index is None:
        assert 0 < len(message) < 1000
        return False
    assert dump(codec.decode(codec.encode(index))) == dump(index)
    return True


def _mutate(data: bytes, rng: random.Random) -> bytes:
    out = bytearray(data)
    for _ in range(rng.choice([1, 1, 1, 2, 5])):
        at = rng.randrange(len(out)) if out else 0
        action = rng.randrange(6)
        if action == 0:
            del out[at:]
        elif action == 1 and out:
            out[at] ^= 1 << rng.randrange(8)
        elif action == 2:
            out[at : at + 1] = rng.randbytes(rng.randrange(9))
        elif action == 3:
            del out[at : at + rng.randrange(1, 40)]
        elif action == 4:
            width = rng.choice([1, 2, 4, 8])
            out[at : at + width] = rng.choice([0, 1, (1 << 8 * width) - 1, 1 << 8 * width - 1]).to_bytes(
                width, "little"
            )
        else:
            out[at:at] = out[rng.randrange(len(out) + 1) :][: rng.randrange(60)]
    return bytes(out)


def test_mutated_files() -> None:
    """Bytes changed anywhere: the hashes find it (a change in the zero field or minor version apart)."""
    rng = random.Random(1)
    data = codec.encode(sample())
    prefixed = container.GO_MAGIC + data
    accepted = sum(_accepts(_mutate(rng.choice([data, prefixed]), rng)) for _ in range(1000))
    assert accepted < 50


@pytest.mark.parametrize("tag", [tag for tag in codec.LIMITS if tag != codec.ARCHIVE])
def test_mutated_sections_with_right_hashes(tag: bytes) -> None:
    """The same inside a section, hashes made right: the code behind them is reached, and holds."""
    rng = random.Random(tag)
    sections = codec.raw_sections(indexes.profiled())
    accepted = sum(_accepts(indexes.pack({**sections, tag: _mutate(sections[tag], rng)})) for _ in range(150))
    assert accepted < 150 or tag == codec.CONFIG


def test_mutated_columns() -> None:
    """One column changed and the column table made right: deeper still."""
    rng = random.Random(3)
    sections = codec.raw_sections(sample())
    counts = {codec.TREE: len(treecodec.COLUMNS), codec.SPANS: 5, codec.WINDOWS: 4}
    accepted = 0
    for round_ in range(900):
        tag = [codec.TREE, codec.TREE, codec.SPANS, codec.WINDOWS][round_ % 4]
        parts = columns.split(sections[tag], counts[tag], "")
        at = rng.randrange(len(parts))
        parts[at] = _mutate(parts[at], rng)
        accepted += _accepts(indexes.pack({**sections, tag: columns.join(parts)}))
    assert 0 < accepted < 600  # a changed time or window byte is an index too


def test_every_truncation() -> None:
    data = codec.encode(sample())
    for length in range(0, len(data), 7):
        with pytest.raises(IndexFormatError):
            codec.decode(data[:length])


def test_every_truncation_behind_a_go_file_names_it() -> None:
    data = container.GO_MAGIC + bytes(40) + codec.encode(sample())
    with pytest.raises(IndexFormatError, match="Go clip file"):
        codec.decode(data[:-20])


def _most_entries(entries: int) -> bytes:
    """The cheapest tree of so many entries: what makes the most of each stored byte."""
    names = b"\0" + b"".join(b"%x\0" % number for number in range(1 << 24, (1 << 24) + entries - 1))
    column = dict.fromkeys(treecodec.COLUMNS, b"")
    column |= {"names": names, "children": columns.pack([entries - 1]), "inodes": b"\1" + b"\2" * (entries - 1)}
    column |= {"classes": columns.pack([0o40755, 0, 0, 0, 0o100644, 0, 0, 0]), "header_blocks": b"\1" * 4}
    column |= {"mtimes": b"\0" + b"\1" * (entries - 1), "mtime_seconds": b"\0", "mtime_ns": b"\0"}
    column |= {"size_low": bytes(entries - 1), "size_high": bytes(entries - 1)}
    sections = codec.raw_sections(sample())
    meta = {**json.loads(sections[codec.META]), "entries": entries}
    tree = columns.join([column[name] for name in treecodec.COLUMNS])
    return indexes.pack({**sections, codec.META: json.dumps(meta).encode(), codec.TREE: tree})


def _decode_in_child(path: Path, limit: int) -> tuple[str, int]:
    """(what came out, peak memory in bytes above what the modules take) of a child with that much address space."""
    code = textwrap.dedent(
        """
        import sys
        from shim.errors import IndexFormatError
        from shim.index import codec

        def peak():  # not ru_maxrss, which begins with the parent's
            with open("/proc/self/status") as status:
                return next(int(line.split()[1]) << 10 for line in status if line.startswith("VmHWM"))

        before = peak()
        try:
            print("entries", codec.count_entries(codec.read_index(sys.argv[1]).tree))
        except IndexFormatError as error:
            print(error)
        print(peak() - before)
        """
    )
    run = subprocess.run(
        [sys.executable, "-c", code, str(path)],
        capture_output=True,
        text=True,
        timeout=60,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (limit, limit)),
    )
    assert run.returncode == 0, run.stderr
    said, peak = run.stdout.strip().rsplit("\n", 1)
    return said, int(peak)


@pytest.mark.parametrize("name", ["bomb", "huge-claim", "meta-deep", "tree-deep", "tree-too-many", "span-count"])
def test_hostile_file_takes_no_memory(name: str) -> None:
    said, peak = _decode_in_child(BAD / f"{name}.clip", 512 << 20)
    assert re.search(ERRORS[name], said)
    assert peak < 32 << 20


def test_memory_stays_in_proportion(tmp_path: Path) -> None:
    """FORMAT.md's bound: 32 MiB and 48 bytes for each raw byte, with raw <= 64 KiB + 64 x the file."""
    data = _most_entries(300_000)
    (tmp_path / "many.clip").write_bytes(data)
    row = container.parse(memoryview(data), frozenset(codec.LIMITS)).sections[codec.TREE]
    assert row.raw_length <= (64 << 10) + 64 * len(data)
    said, peak = _decode_in_child(tmp_path / "many.clip", 1 << 30)
    assert said == "entries 300000"
    assert peak < (32 << 20) + 48 * row.raw_length


def test_too_many_entries(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = _most_entries(3000)
    assert codec.count_entries(codec.decode_tree(data)) == 3000
    monkeypatch.setattr(treereader, "MAX_ENTRIES", 2999)
    with pytest.raises(IndexFormatError, match="more than 2999 entries"):
        codec.decode(data)


def test_a_tree_that_is_read_is_valid() -> None:
    """The reader checks columns, `validate_tree` Nodes: whatever the bytes, the one lets nothing pass that the other
    would not; and what it lets pass comes back the same when it is written."""
    index = sample()
    sizes = [layer.uncompressed_size for layer in index.layers]
    raw = treecodec.encode_tree(index.tree, len(sizes))
    rng = random.Random(5)
    passed = 0
    for _ in range(20_000):
        damaged = bytearray(raw)
        for _ in range(rng.randrange(1, 4)):
            damaged[rng.randrange(4 * len(treecodec.COLUMNS), len(raw))] = rng.choice((0, 1, 2, 3, rng.randrange(256)))
        try:
            tree = treereader.decode_tree(bytes(damaged), sizes)
        except IndexFormatError:
            continue
        passed += 1
        nodes = tree.nodes()
        validate_tree(nodes, sizes)
        assert treereader.decode_tree(treecodec.encode_tree(nodes, len(sizes)), sizes).nodes() == nodes
        assert flatten(nodes).nodes() == nodes
    assert passed > 1000


@pytest.mark.parametrize("column", ["names", "targets"])
def test_names_are_counted_before_they_are_made(column: str) -> None:
    raw = dict(zip(treecodec.COLUMNS, columns.split(_tree(sample()), len(treecodec.COLUMNS), "TREE"), strict=True))
    raw[column] = b"ab\0" * 3_000_000
    section = columns.join([raw[name] for name in treecodec.COLUMNS])
    tracemalloc.start()
    try:
        with pytest.raises(IndexFormatError):
            treereader.decode_tree(section, [layer.uncompressed_size for layer in sample().layers])
        assert tracemalloc.get_traced_memory()[1] < 3 * len(section)
    finally:
        tracemalloc.stop()


def _tree(index: Index) -> bytes:
    return treecodec.encode_tree(index.tree, len(index.layers))


def test_length_lies_in_the_column_table() -> None:
    sections = codec.raw_sections(sample())
    for tag in (codec.TREE, codec.SPANS, codec.WINDOWS):
        for value in (0xFFFFFFFF, 0x80000000, 0):
            raw = struct.pack("<I", value) + sections[tag][4:]
            with pytest.raises(IndexFormatError, match="damaged"):
                codec.decode(indexes.pack({**sections, tag: raw}))
