"""The mountinfo parser, with lines as kernels print them."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shim.mount import mountinfo
from shim.mount.mountinfo import MountEntry, split_lowerdirs, split_options


def escape(name: bytes, more: bytes = b"") -> bytes:
    """As fs/seq_file.c mangle_path() prints a name."""
    return b"".join(b"\\%03o" % byte if byte in b" \t\n\\" + more else bytes((byte,)) for byte in name)


def test_a_line_of_the_manual_page() -> None:
    entry = MountEntry(
        b"36 35 98:0 /mnt1 /mnt\\0402 rw,noatime master:1 propagate_from:2 - ext3 /dev/root rw,errors=continue"
    )
    assert (entry.id, entry.parent, entry.dev, entry.root, entry.mount_point) == (36, 35, b"98:0", b"/mnt1", b"/mnt 2")
    assert (entry.options, entry.fields) == (b"rw,noatime", (b"master:1", b"propagate_from:2"))
    assert (entry.fs_type, entry.source, entry.super_options) == (b"ext3", b"/dev/root", b"rw,errors=continue")


def test_no_optional_fields_a_dash_for_a_name_and_an_empty_source() -> None:
    entry = MountEntry(b"1 0 0:5 / - rw - tmpfs  rw")
    assert (entry.mount_point, entry.fields, entry.fs_type, entry.source) == (b"-", (), b"tmpfs", b"")
    assert entry.super_options == b"rw"


@pytest.mark.parametrize(
    "line", [b"", b"x", b"1 2 0:5 / /a rw ext4 a rw", b"1 2 0:5 / /a rw - ext4 a", b"x 2 0:5 / /a rw - e a rw"]
)
def test_what_is_no_line_is_refused(line: bytes) -> None:
    with pytest.raises(ValueError, match=r"."):
        MountEntry(line)


@given(st.binary(max_size=40))
def test_escapes_are_undone(name: bytes) -> None:
    name = name.replace(b"\0", b"")
    assert mountinfo.unescape(escape(name)) == name
    assert mountinfo.unescape(escape(name, b"#,:")) == name


def test_what_looks_like_an_escape_and_is_none_stays() -> None:
    for text in (b"\\", b"\\1", b"\\12", b"\\189", b"\\777", b"a\\b"):
        assert mountinfo.unescape(text) == text


SELINUX = (
    b'rw,context="system_u:object_r:container_file_t:s0:c1,c2",lowerdir=/a:/b,upperdir=/u\\054x,workdir=/w,volatile'
)


def test_options_with_quotes_commas_and_repeats() -> None:
    assert split_options(SELINUX) == [
        (b"rw", None),
        (b"context", b"system_u:object_r:container_file_t:s0:c1,c2"),
        (b"lowerdir", b"/a:/b"),
        (b"upperdir", b"/u,x"),
        (b"workdir", b"/w"),
        (b"volatile", None),
    ]
    assert split_options(b"rw,lowerdir+=/a,lowerdir+=/b") == [
        (b"rw", None),
        (b"lowerdir+", b"/a"),
        (b"lowerdir+", b"/b"),
    ]
    assert split_options(b'upperdir=/a"b,workdir=/c"d') == [(b"upperdir", b'/a"b'), (b"workdir", b'/c"d')]
    assert split_options(b'context="broken,rw') == [(b"context", b'"broken'), (b"rw", None)]
    assert split_options(b"") == []
    assert split_options(b"a=b=c,d=") == [(b"a", b"b=c"), (b"d", b"")]


@pytest.mark.parametrize(
    ("printed", "lowers"),
    [
        (SELINUX, [b"/a", b"/b"]),
        (b"rw,lowerdir=71/fs:70/fs", [b"71/fs", b"70/fs"]),
        (b"rw,lowerdir+=/a,lowerdir+=/b\\134:c\\054d,upperdir=/u", [b"/a", b"/b\\:c,d"]),
        (b"lowerdir=/co\\134:lon:/x\\040y", [b"/co:lon", b"/x y"]),
        (b"lowerdir=/co\\072lon:/x", [b"/co:lon", b"/x"]),
        (b"lowerdir=/back\\134\\134slash:/x", [b"/back\\slash", b"/x"]),
        (b"lowerdir=/ends\\134\\134:/x", [b"/ends\\", b"/x"]),
        (b"lowerdir=/com\\134\\054ma:/x", [b"/com,ma", b"/x"]),
        (b"lowerdir=/a::/data", [b"/a", b"/data"]),
        (b"lowerdir=/a\\134:", [b"/a:"]),
        (b"lowerdir=", []),
        (b"rw,size=5k", []),
    ],
)
def test_lower_directories(printed: bytes, lowers: list[bytes]) -> None:
    assert split_lowerdirs(printed) == lowers


def test_overlay_escapes_of_single_paths() -> None:
    assert mountinfo.unescape_path(b"/a\\:b\\,c\\\\d") == b"/a:b,c\\d"
    assert mountinfo.unescape_path(b"/plain") == b"/plain"
    assert mountinfo.unescape_path(b"/end\\") == b"/end\\"


def lines(*rows: tuple[int, int, bytes]) -> bytes:
    return b"".join(b"%d %d 0:%d / %s rw - tmpfs s%d rw\n" % (i, p, i, escape(path), i) for i, p, path in rows)


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        (b"/a", 12),  # the cover has the smaller id and comes first, as it does since Linux 6.8
        (b"/a/b", 13),  # 15 lies under the second /a
        (b"/a/bc", None),
        (b"/x y", 16),
        (b"/", 2),
        ("/x y", 16),
    ],
)
def test_the_topmost_mount_is_found(path: bytes | str, expected: int | None) -> None:
    data = lines((2, 1, b"/"), (12, 20, b"/a"), (13, 12, b"/a/b"), (15, 20, b"/a/b"), (16, 2, b"/x y"), (20, 2, b"/a"))
    entry = mountinfo.at(path, data)
    assert (entry.id if entry else None) == expected


def test_a_name_with_a_hash_is_found_however_it_is_printed() -> None:
    assert mountinfo.at(b"/a#b", lines((5, 1, b"/a#b"))) is not None
    assert mountinfo.at(b"/a#b", b"5 1 0:5 / /a\\043b rw - tmpfs s rw\n") is not None


def test_a_path_in_another_field_is_not_taken_for_a_mount_point() -> None:
    assert mountinfo.at(b"/dev", b"5 1 0:5 /dev /a rw - tmpfs /dev rw\n") is None


def test_a_circle_of_parents_ends() -> None:
    assert mountinfo.at(b"/a", lines((5, 6, b"/a"), (6, 5, b"/a"))) is not None


def test_this_machine() -> None:
    entries = mountinfo.read()
    root = mountinfo.at("/")
    assert root is not None
    assert root.id in {entry.id for entry in entries}
    info = os.stat("/proc")
    proc = mountinfo.at("/proc/")
    assert proc is not None
    assert proc.fs_type == b"proc"
    assert proc.dev == b"%d:%d" % (os.major(info.st_dev), os.minor(info.st_dev))


def test_few_imports() -> None:
    """The wrapper pays for each module at every container start."""
    modules = "shim.mount.mountinfo, shim.mount.syscalls"
    code = f"import sys; sys.path[:0] = {sys.path!r}; import {modules}; print(*sys.modules)"
    found = subprocess.run([sys.executable, "-ISc", code], stdout=subprocess.PIPE, check=True)
    loaded = set(found.stdout.decode().split())
    assert "shim.mount.syscalls" in loaded
    assert not loaded & {"re", "typing", "collections", "enum", "dataclasses", "functools", "pathlib", "subprocess"}
