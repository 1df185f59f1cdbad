"""Archives without a mount: Go's layout in detail, what must not be in one, damage, and reading by pieces."""

from __future__ import annotations

import os
import random
import stat
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path

import pytest
from fastcrc import crc64
from hypothesis import given, settings
from hypothesis import strategies as st

from shim import api
from shim.archive.convert import convert
from shim.archive.source import ArchiveBytes
from shim.errors import IndexFormatError, IntegrityError, UsageError
from shim.goclip import files
from shim.index import archived, codec
from shim.index.model import Archive
from shim.settings import load
from tests.support.ocitar import DIR, Entry, gzip_bytes, tar
from tests.support.registry import Registry
from tests.support.smallimage import noise

GO = Path(__file__).parents[1] / "assets" / "goclip"


def parse(data: bytes) -> files.GoClip:
    return files.read(lambda at, length: data[at : at + length], len(data))


class Memory:
    place = "memory"

    def __init__(self, data: bytes) -> None:
        self.data = data

    @contextmanager
    def stream(self, start: int, end: int) -> Iterator[Iterable[bytes]]:
        yield (self.data[at : min(at + 7, end)] for at in range(start, min(end, len(self.data)), 7))


@pytest.fixture
def rootfs(tmp_path: Path) -> Path:
    root = tmp_path / "rootfs"
    (root / "usr/bin").mkdir(parents=True)
    (root / "usr/bin/tool").write_bytes(noise(1, 3_000_001))
    (root / "usr/bin/tool").chmod(0o750)
    os.link(root / "usr/bin/tool", root / "usr/bin/same")
    (root / "bin").symlink_to("usr/bin")
    (root / "empty").touch()
    with open(root / "sparse", "wb") as out:
        out.truncate(5_000_000)
        out.seek(1_000_000)
        out.write(b"x" * 5000)
    with open(root / "hole", "wb") as out:
        out.truncate(100_000)
    for number in range(50):
        (root / f"f{number}").write_bytes(noise(number, number * 37))
    return root


def test_go_layout(rootfs: Path, tmp_path: Path) -> None:
    """Every block: type byte, data where the node says, CRC-64 as Go writes it, SHA-256 in the node."""
    file = tmp_path / "a.clip"
    info = api.create_archive(file, rootfs=rootfs)
    data = file.read_bytes()
    clip = parse(data)
    assert clip.place is None
    assert info.entries == len(clip.nodes) == 1 + sum(1 for _ in rootfs.rglob("*"))
    for node in clip.nodes:
        path = rootfs / os.fsdecode(node.path[1:])
        if node.kind == "file":
            body = path.read_bytes()
            assert node.size == len(body)
            if body:
                assert node.data % 512 == 0
                assert data[node.data - 1] == 0
                assert data[node.data : node.data + node.size] == body
                assert data[node.data + node.size :][:8] == crc64.go_iso(body).to_bytes(8, "big")
                assert node.content_hash == sha256(body).hexdigest()
        elif node.kind == "symlink":
            assert node.target == os.fsencode(path.readlink())
    index = codec.read_index(file)
    sparse = (index.tree.root.children or {})[b"sparse"]
    assert sum(extent.length for extent in sparse.extents) < 100_000
    assert (index.tree.root.children or {})[b"hole"].extents == ()


def test_extract_gives_it_back(rootfs: Path, tmp_path: Path) -> None:
    file, out = tmp_path / "a.clip", tmp_path / "out"
    api.create_archive(file, rootfs=rootfs)
    assert api.extract_archive(file, out) == 1 + sum(1 for _ in rootfs.rglob("*"))
    for path in rootfs.rglob("*"):
        other = out / path.relative_to(rootfs)
        one, two = path.lstat(), other.lstat()
        assert (one.st_mode, one.st_nlink if not path.is_dir() else 0, one.st_mtime_ns) == (
            two.st_mode,
            two.st_nlink if not path.is_dir() else 0,
            two.st_mtime_ns,
        )
        if stat.S_ISREG(one.st_mode):
            assert path.read_bytes() == other.read_bytes()
    assert (out / "sparse").stat().st_blocks < 1000
    with pytest.raises(UsageError, match="not empty"):
        api.extract_archive(file, out)


def test_what_a_higher_layer_removed_is_not_in_it(tmp_path: Path) -> None:
    """Layers are streamed once, lowest first, so its bytes were written: they are gone again at the end."""
    secret, kept = b"hunter2-" * 20_000, noise(5, 2_000_000)
    lower = [
        Entry(b"d", DIR, 0o755),
        Entry(b"d/secret", data=secret),
        Entry(b"kept", data=kept),
        Entry(b"old", data=secret),
    ]
    upper = [Entry(b"d/.wh.secret"), Entry(b"old", data=b"new")]
    with Registry() as registry:
        registry.push_image("app", "1", [gzip_bytes(tar(lower)), gzip_bytes(tar(upper))])
        env = {"CLIP_SHIM_STATE_DIR": str(tmp_path)}
        info = api.create_archive(tmp_path / "a.clip", registry.ref("app", "1"), settings=load(env=env))
    data = (tmp_path / "a.clip").read_bytes()
    assert b"hunter2" not in data
    assert info.entries == 4
    index = codec.read_index(tmp_path / "a.clip")
    assert index.archive is not None
    layer = ArchiveBytes(Memory(data), archived.flat(index.archive))
    table = index.layers[0].spans
    for i in range(table.count):
        assert sha256(layer.read(table.ustart(i), table.ustart(i + 1))).digest() == table.digest(i)


def test_verify_says_what_is_wrong(rootfs: Path, tmp_path: Path) -> None:
    file = tmp_path / "a.clip"
    api.create_archive(file, rootfs=rootfs)
    assert api.verify_archive(file) == []
    data = bytearray(file.read_bytes())
    data[1_500_000] ^= 1
    file.write_bytes(data)
    [line] = api.verify_archive(file) or []
    assert line.startswith("the data at 1048576 to 2097152")


@pytest.mark.parametrize("arguments", [{}, {"image_ref": "docker.io/library/a:1", "rootfs": "/"}])
def test_one_source(tmp_path: Path, arguments: dict[str, str]) -> None:
    with pytest.raises(UsageError, match="of an image or of a directory"):
        api.create_archive(tmp_path / "a.clip", **arguments)
    assert not list(tmp_path.iterdir())


# A foreign archive


def foreign(data: bytes) -> None:
    convert(lambda at, length: data[at : at + length], len(data), Memory(data), "")


def test_foreign_archive_as_a_layer() -> None:
    data = (GO / "v1-local.clip").read_bytes()
    taken = bytearray()
    index = convert(lambda at, length: data[at : at + length], len(data), Memory(data), "", on_data=taken.extend)
    codec.decode(codec.encode(index))
    assert index.archive is not None
    layer = ArchiveBytes(Memory(data), archived.flat(index.archive))
    assert layer.read(0, index.layers[0].size) == taken
    etc = (index.tree.root.children or {})[b"etc"]
    extent = (etc.children or {})[b"motd"].extents[0]
    assert extent.offset % 512 == 0
    assert taken[extent.offset :][: extent.length] == b"hello from layer two\n"


def test_foreign_damage_is_found() -> None:
    data = bytearray((GO / "v1-local.clip").read_bytes())
    data[0x40] ^= 1
    with pytest.raises(IntegrityError, match="CRC-64"):
        foreign(bytes(data))


def test_foreign_mutations() -> None:
    data = (GO / "v1-local.clip").read_bytes()
    chance = random.Random(7)
    for _ in range(400):
        bad = bytearray(data)
        for _ in range(chance.randint(1, 3)):
            bad[chance.randrange(0x85, len(bad))] = chance.randrange(256)
        try:
            foreign(bytes(bad))
        except (IndexFormatError, IntegrityError):
            pass


# Section DATA


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 600), st.integers(0, 600), st.integers(1, 3000)), max_size=12), st.data())
def test_reading_by_pieces(gaps: list[tuple[int, int, int]], draw: st.DataObject) -> None:
    pieces, layer, at = [], bytearray(), 0
    source = random.Random(1).randbytes(sum(sum(gap) for gap in gaps) + 1)
    for gap, jump, length in gaps:
        at += jump
        layer += bytes(gap)
        pieces.append((len(layer), at, length))
        layer += source[at : at + length]
        at += length
    archive = Archive("s3://b/k", pieces)
    assert archived.decode_archive(archived.encode_archive(archive)) == archive
    read = ArchiveBytes(Memory(source), archived.flat(archive)).read
    start = draw.draw(st.integers(0, len(layer)))
    end = draw.draw(st.integers(start, len(layer)))
    assert read(start, end) == layer[start:end]


def test_an_archive_that_became_shorter() -> None:
    with pytest.raises(IntegrityError, match="shorter"):
        ArchiveBytes(Memory(b"x" * 100), [0, 50, 100]).read(0, 100)


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=100))
def test_any_bytes_as_the_section(raw: bytes) -> None:
    try:
        archived.decode_archive(raw)
    except IndexFormatError:
        pass


@pytest.mark.parametrize("location", ["file:///etc/shadow", "http://x/y", "s3://b/k\n", "s3://" + "b" * 3000])
def test_locations_that_are_refused(location: str, rootfs: Path, tmp_path: Path) -> None:
    api.create_archive(tmp_path / "a.clip", rootfs=rootfs / "usr")
    index = codec.read_index(tmp_path / "a.clip")
    assert index.archive is not None
    index.archive.location = location
    with pytest.raises(IndexFormatError):
        codec.encode(index)
