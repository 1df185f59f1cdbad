"""What the comparison tool sees and only root can make: owners, devices, file capabilities."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.compare import compare
from tests.support.smallimage import CAP_NET_RAW


def make(root: Path) -> Path:
    root.mkdir()
    (root / "file").write_bytes(b"x")
    os.mknod(root / "device", 0o600 | stat.S_IFCHR, os.makedev(1, 3))
    os.setxattr(root / "file", "security.capability", CAP_NET_RAW)
    for path in (root / "file", root / "device", root):
        os.utime(path, ns=(0, 1))
    return root


def _renumber(root: Path) -> None:
    (root / "device").unlink()
    os.mknod(root / "device", 0o600 | stat.S_IFCHR, os.makedev(1, 5))
    for path in (root / "device", root):
        os.utime(path, ns=(0, 1))


CASES: dict[str, tuple[str, Callable[[Path], object]]] = {
    "owner": ("device", lambda root: os.chown(root / "device", 1, 2)),
    "device": ("device", _renumber),
    "xattrs": ("file", lambda root: os.removexattr(root / "file", "security.capability")),
}


@pytest.mark.parametrize("what", CASES)
def test_difference_is_seen(what: str, disk_path: Path) -> None:
    path, change = CASES[what]
    expected, actual = make(disk_path / "a"), make(disk_path / "b")
    assert compare(expected, actual) == []
    change(actual)
    assert [(os.fsdecode(d.path), d.what) for d in compare(expected, actual)] == [(path, what)]
