"""Deleting what a container wrote, whatever it made of it."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

from shim.runtime.cleanup import empty


def make_deep(top: Path, depth: int, name: str) -> None:
    """Directories in one another, a file and a symlink in each. No path to the last is short enough for the kernel."""
    here = os.open(top, os.O_RDONLY | os.O_DIRECTORY)
    for _ in range(depth):
        os.mkdir(name, dir_fd=here)
        below = os.open(name, os.O_RDONLY | os.O_DIRECTORY, dir_fd=here)
        os.close(os.open("file", os.O_CREAT | os.O_WRONLY, dir_fd=below))
        os.symlink("/etc", "link", dir_fd=below)
        os.close(here)
        here = below
    os.close(here)


def test_depth_does_not_matter(tmp_path: Path) -> None:
    trash = tmp_path / "trash"
    (trash / "upper").mkdir(parents=True)
    make_deep(trash / "upper", 2500, "d" * 200)
    empty(str(trash))
    assert list(tmp_path.iterdir()) == []


def test_nothing_outside_is_touched(tmp_path: Path) -> None:
    outside, trash = tmp_path / "outside", tmp_path / "trash"
    (outside / "kept").mkdir(parents=True)
    (trash / "work/work").mkdir(parents=True, mode=0)
    (trash / "upper").mkdir()
    (trash / "upper/to-directory").symlink_to(outside)
    os.mkfifo(trash / "upper/fifo")
    empty(str(trash))
    assert [path.name for path in tmp_path.iterdir()] == ["outside"]
    assert (outside / "kept").is_dir()
    (tmp_path / "link").symlink_to(outside)
    empty(str(tmp_path / "link"))
    empty(str(tmp_path / "absent"))
    empty(None)
    assert (outside / "kept").is_dir()


def test_what_cannot_be_deleted_keeps_nothing_else(tmp_path: Path) -> None:
    trash = tmp_path / "trash"
    for name in ("a", "b/held", "c"):
        (trash / "upper" / name).mkdir(parents=True)
        (trash / "upper" / name / "file").write_text("x")
    held = trash / "upper/b/held/file"
    subprocess.run(["chattr", "+i", held], check=True)
    moved = None
    try:
        empty(str(trash))
        [moved] = trash.rglob("file")
    finally:
        subprocess.run(["chattr", "-i", moved or held], check=True)
    assert len(list(trash.rglob("*"))) <= 3
    empty(str(trash))  # the sweep comes again
    assert not trash.exists()
