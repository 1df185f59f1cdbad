"""The tar walker against GNU tar's and tarfile's archives."""

from __future__ import annotations

import io
import os
import random
import subprocess
import tarfile
from pathlib import Path

import pytest

from shim.layers.tar import DIRECTORY, REGULAR, TarEntry, TarWalker

MTIME = 1_234_567_890_123_456_789


def walk(archive: bytes, piece: int = 1 << 20) -> list[TarEntry]:
    walker = TarWalker()
    view = memoryview(archive)
    for at in range(0, len(archive), piece):
        walker.feed(view[at : at + piece])
    walker.finish()
    return walker.entries


def content(archive: bytes, entry: TarEntry) -> bytes:
    """A regular file's bytes, holes filled."""
    if entry.extents is None:
        return archive[entry.data_offset : entry.data_offset + entry.size]
    data = bytearray(entry.size)
    for logical, offset, length in entry.extents:
        data[logical : logical + length] = archive[offset : offset + length]
    assert len(data) == entry.size
    return bytes(data)


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tree with everything that needs no privileges."""
    root = tmp_path_factory.mktemp("tree")
    rnd = random.Random(1)
    for name in ("dir", "dir/sub", "sticky", "d" * 120 + "/" + "e" * 120):
        (root / name).mkdir(parents=True)
    (root / "sticky").chmod(0o1777)
    for i, size in enumerate((0, 1, 511, 512, 513, 70_000)):
        (root / f"dir/file{i}").write_bytes(rnd.randbytes(size))
    (root / "dir/setuid").write_bytes(b"#!")
    (root / "dir/setuid").chmod(0o4755)
    (root / "dir/sub/\udcff\udc80").write_bytes(b"not UTF-8")
    (root / "dir/new\nline \u00e9").write_bytes(b"odd")
    (root / ("dir/" + "n" * 99)).write_bytes(b"99")
    (root / ("dir/" + "n" * 200)).write_bytes(b"200")
    (root / ("d" * 120) / ("e" * 120) / ("f" * 120)).write_bytes(b"deep")
    os.link(root / "dir/file5", root / "dir/link")
    (root / "dir/symlink").symlink_to("../dir/file1")
    (root / "dir/longlink").symlink_to("t" * 150)
    os.mkfifo(root / "fifo")
    with (root / "sparse").open("wb") as file:
        for at in (0, 1 << 20, 3 << 20, (3 << 20) + 8192):
            file.seek(at)
            file.write(rnd.randbytes(4096))
        file.truncate(5 << 20)
    with (root / "many-holes").open("wb") as file:
        for at in range(0, 60 * 65536, 65536):
            file.seek(at)
            file.write(rnd.randbytes(4096))
    with (root / "all-hole").open("wb") as file:
        file.truncate(1 << 20)
    for i, path in enumerate(sorted(root.rglob("*"), reverse=True)):
        os.utime(path, ns=(0, MTIME + i), follow_symlinks=False)
    return root


def gnu_tar(tree: Path, *options: str) -> bytes:
    command = [
        "tar",
        "--sort=name",
        "--owner=user:70000",
        "--group=group:12",
        *options,
        "-cf",
        "-",
        "-C",
        str(tree),
        ".",
    ]
    return subprocess.run(command, capture_output=True, check=True).stdout


def compare_with_tarfile(archive: bytes) -> int:
    with tarfile.open(fileobj=io.BytesIO(archive), encoding="utf-8", errors="surrogateescape") as tar:
        members = tar.getmembers()
    entries = walk(archive)
    for entry, member in zip(entries, members, strict=True):
        assert entry.name.rstrip(b"/") == os.fsencode(member.name)
        kind = REGULAR if member.isreg() else member.type
        assert (entry.typeflag, entry.mode) == (kind, member.mode)
        assert (entry.uid, entry.gid, entry.mtime // 10**9) == (member.uid, member.gid, int(member.mtime))
        if member.islnk() or member.issym():
            assert entry.linkname == os.fsencode(member.linkname)
        assert (entry.devmajor, entry.devminor) == (member.devmajor, member.devminor)
        assert entry.size == (member.size if member.isreg() else 0)
        if member.isreg() and not member.issparse():
            assert (entry.data_offset, entry.extents) == (member.offset_data, None)
    return len(entries)


@pytest.mark.parametrize("form", ["gnu", "pax", "ustar", "v7", "oldgnu"])
def test_gnu_tar_formats(tree: Path, form: str) -> None:
    skip = ["--exclude=" + "d" * 120, "--exclude=" + "n" * 200, "--exclude=" + "n" * 99, "--exclude=longlink"]
    if form in ("gnu", "oldgnu", "pax"):
        skip = []
    if form == "v7":
        skip.append("--exclude=fifo")
    assert compare_with_tarfile(gnu_tar(tree, f"--format={form}", *skip)) > 15


def test_pax_keeps_nanoseconds_and_big_numbers(tree: Path) -> None:
    entries = {entry.name: entry for entry in walk(gnu_tar(tree, "--format=pax", "--owner=big:3000000000"))}
    for name in (b"./dir/file1", b"./dir/symlink", b"./fifo", b"./sticky/"):
        entry = entries[name]
        assert entry.mtime == os.stat(tree / os.fsdecode(name[2:]), follow_symlinks=False).st_mtime_ns
        assert (entry.uid, entry.gid) == (3_000_000_000, 12)


@pytest.mark.parametrize(
    "options",
    [
        ("--format=gnu",),
        ("--format=pax", "--sparse-version=0.0"),
        ("--format=pax", "--sparse-version=0.1"),
        ("--format=pax", "--sparse-version=1.0"),
    ],
    ids=["old-gnu", "pax-0.0", "pax-0.1", "pax-1.0"],
)
@pytest.mark.parametrize("piece", [1 << 20, 1, 700])
def test_sparse_files(tree: Path, options: tuple[str, ...], piece: int) -> None:
    if piece == 1:
        options += ("--exclude=dir", "--exclude=sparse")
    archive = gnu_tar(tree, "-S", *options)
    entries = {entry.name: entry for entry in walk(archive, piece)}
    for name in ("sparse", "many-holes", "all-hole"):
        entry = entries.get(b"./" + name.encode())
        if entry is None:
            assert piece == 1
            continue
        assert entry.typeflag == REGULAR
        assert entry.extents is not None
        assert content(archive, entry) == (tree / name).read_bytes()
    if piece != 1:
        assert content(archive, entries[b"./dir/file5"]) == (tree / "dir/file5").read_bytes()


def test_cuts_do_not_matter(tree: Path) -> None:
    archive = gnu_tar(tree, "--format=pax", "-S", "--exclude=many-holes")
    whole = walk(archive)
    for piece in (3, 100, 511, 512, 513, 10_007):
        assert walk(archive, piece) == whole


def made(member: tarfile.TarInfo, data: bytes = b"", form: int = tarfile.PAX_FORMAT) -> TarEntry:
    """The one entry of an archive that tarfile wrote."""
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=form, encoding="utf-8", errors="surrogateescape") as tar:
        tar.addfile(member, io.BytesIO(data))
    (entry,) = walk(stream.getvalue())
    if data:
        assert content(stream.getvalue(), entry) == data
    return entry


def test_devices_xattrs_and_odd_values() -> None:
    member = tarfile.TarInfo("dev/sda")
    member.type, member.devmajor, member.devminor, member.mode = tarfile.BLKTYPE, 8, 130_000, 0o660
    entry = made(member)
    assert (entry.typeflag, entry.devmajor, entry.devminor, entry.mode) == (b"4", 8, 130_000, 0o660)

    capability = b"\1\0\0\2\0\4\0\0\0\0\0\0\0\0\0\0\0\0\0\0"
    member = tarfile.TarInfo("bin/ping")
    member.size = 3
    member.mtime = -12.5
    member.pax_headers = {
        "SCHILY.xattr.security.capability": os.fsdecode(capability),
        "SCHILY.xattr.user.empty": "",
        "LIBARCHIVE.xattr.user.other": "Zm9v",
        "SCHILY.xattr.user.text": "a = b\n",
        "comment": "ignored",
    }
    entry = made(member, b"ELF")
    assert dict(entry.xattrs) == {b"security.capability": capability, b"user.text": b"a = b\n"}
    assert entry.mtime == -12_500_000_000

    member = tarfile.TarInfo("old")
    member.mtime, member.uid, member.size = -5, 2**31 + 5, 1
    entry = made(member, b"x", tarfile.GNU_FORMAT)
    assert (entry.mtime, entry.uid) == (-5_000_000_000, 2**31 + 5)


def test_names_are_bytes() -> None:
    member = tarfile.TarInfo("caf\u00e9/\udcff" + "x" * 200)
    for form in (tarfile.PAX_FORMAT, tarfile.GNU_FORMAT):
        assert made(member, b"", form).name == os.fsencode(member.name)


def test_empty_archives() -> None:
    assert walk(b"") == walk(bytes(512)) == walk(bytes(1024)) == walk(bytes(10240)) == []


def test_what_follows_the_end_is_ignored(tree: Path) -> None:
    archive = gnu_tar(tree, "--format=ustar", "--exclude=d*")
    assert walk(archive + b"rubbish" * 1000) == walk(archive)


def test_entries_can_go_to_a_callback(tree: Path) -> None:
    archive = gnu_tar(tree, "--format=pax")
    got: list[TarEntry] = []
    walker = TarWalker(got.append)
    walker.feed(archive)
    walker.finish()
    assert got == walk(archive)
    assert walker.entries == []
    assert got[0].typeflag == DIRECTORY
