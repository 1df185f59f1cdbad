"""The comparison tool sees every kind of difference: each case changes one thing in a copy of a tree."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.compare import compare, main


def make(root: Path) -> Path:
    root.mkdir()
    (root / "dir").mkdir()
    (root / "dir/file").write_bytes(b"contents")
    (root / "dir/other").write_bytes(b"contents")
    os.link(root / "dir/file", root / "dir/linked")
    os.link(root / "dir/other", root / "dir/twin")
    (root / "link").symlink_to("dir")
    os.mkfifo(root / "fifo")
    for path in (root / "dir/file", root / "dir/other", root / "fifo", root / "link", root / "dir", root):
        os.utime(path, ns=(10**18, 10**18 + 7), follow_symlinks=False)
    return root


def keep_times(path: Path, change: Callable[[Path], object]) -> None:
    parent = path.parent.stat().st_mtime_ns
    change(path)
    for touched, ns in ((path, 10**18 + 7), (path.parent, parent)):
        if touched.is_symlink() or touched.exists():
            os.utime(touched, ns=(ns, ns), follow_symlinks=False)


def _relink(path: Path, target: str) -> None:
    path.unlink()
    path.symlink_to(target)


def _retype(path: Path) -> None:
    path.unlink()
    path.write_bytes(b"")


def _regroup(root: Path) -> None:
    """The same counts, sizes and contents, but other names share the inodes."""
    for name, other in (("linked", "other"), ("twin", "file")):
        (root / "dir" / name).unlink()
        os.link(root / "dir" / other, root / "dir" / name)
    os.utime(root / "dir", ns=(10**18, 10**18 + 7))


CASES: dict[str, tuple[str, Callable[[Path], object]]] = {
    "missing": ("fifo", lambda root: keep_times(root / "fifo", lambda p: p.unlink())),
    "unexpected": ("new", lambda root: keep_times(root / "new", lambda p: p.write_bytes(b""))),
    "type": ("fifo", lambda root: keep_times(root / "fifo", _retype)),
    "mode": ("dir/file", lambda root: (root / "dir/file").chmod(0o4755)),
    "mtime": ("dir/file", lambda root: os.utime(root / "dir/file", ns=(0, 10**18 + 8))),
    "size": ("dir/file", lambda root: keep_times(root / "dir/file", lambda p: p.write_bytes(b"content"))),
    "content": ("dir/file", lambda root: keep_times(root / "dir/file", lambda p: p.write_bytes(b"Contents"))),
    "target": ("link", lambda root: keep_times(root / "link", lambda p: _relink(p, "rid"))),
    "links": ("dir/file", lambda root: keep_times(root / "dir/extra", lambda p: os.link(root / "dir/file", p))),
    "same inode as": ("dir/linked", _regroup),
}


def test_equal_trees(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert compare(make(tmp_path / "a"), make(tmp_path / "b")) == []
    assert main([str(tmp_path / "a"), str(tmp_path / "b")]) == 0
    assert "equal" in capsys.readouterr().out


@pytest.mark.parametrize("what", CASES)
def test_difference_is_seen(what: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, change = CASES[what]
    expected, actual = make(tmp_path / "a"), make(tmp_path / "b")
    change(actual)
    found = compare(expected, actual)
    assert (path, what) in [(os.fsdecode(d.path), d.what) for d in found]
    assert main([str(expected), str(actual)]) == 1
    assert f"/{path}: {what}:" in capsys.readouterr().out


def test_unset_mtime_is_left_out(tmp_path: Path) -> None:
    expected, actual = make(tmp_path / "a"), make(tmp_path / "b")
    os.utime(actual / "dir", ns=(0, 5))
    assert [d.what for d in compare(expected, actual)] == ["mtime"]
    assert compare(expected, actual, unset=[b"dir"]) == []


def test_names_that_break_terminals_are_escaped(tmp_path: Path) -> None:
    expected, actual = make(tmp_path / "a"), make(tmp_path / "b")
    keep_times(actual / "new\nline", lambda p: p.write_bytes(b""))
    (found,) = compare(expected, actual)
    assert str(found) == "/new\\nline: unexpected: expected None, found '-'"
