"""A mounted tree against the same tree unpacked on the disk's own file system."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path

from tests.bench.common import Row, drop_caches, pairs, run, timed
from tests.support.host import Host


def _find(directory: Path) -> Callable[[], float]:
    return lambda: _cold(lambda: run(["find", directory, "-size", "+2000G"]))


def _read(directory: Path) -> Callable[[], float]:
    command = 'find "$0" -type f -print0 | xargs -0 cat | wc -c'
    return lambda: _cold(lambda: subprocess.run(["sh", "-c", command, str(directory)], check=True, stdout=-3))


def _cold(work: Callable[[], object]) -> float:
    drop_caches()
    return timed(work)


def measure(host: Host, name: str, index: Path, unpacked: Path, rounds: int = 7) -> list[Row]:
    """find with a stat of every entry, and every file read; all layers cached before, page cache dropped each time."""
    mounted = host.base / "mounted"
    mounted.mkdir()
    host.clip("mount", index, mounted)
    try:
        lazy, plain = _read(mounted), _read(unpacked)
        lazy()  # fills the layer cache
        find = pairs(rounds, _find(mounted), _find(unpacked))
        read = pairs(rounds, lazy, plain)
    finally:
        host.clip("umount", mounted)
        mounted.rmdir()
    return [
        Row(f"`find -size` over `{name}`, page cache dropped, against ext4",
            f"{find[0]:.2f} s / {find[1]:.2f} s = {find[2]:.2f} ×", "≤ 1.0 ×", find[2] <= 1.0),
        Row(f"read every file of `{name}`, layers cached, page cache dropped, against ext4",
            f"{read[0]:.2f} s / {read[1]:.2f} s = {read[2]:.2f} ×", "≤ 1.3 ×", read[2] <= 1.3),
    ]  # fmt: skip
