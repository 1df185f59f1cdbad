"""What the measurements share: timing, medians, cold caches, and the rows of the table."""

from __future__ import annotations

import os
import statistics
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Row:
    """One line of the table. `measured`, `reach`: what a person reads; `met` is None where nothing was promised."""

    what: str
    measured: str
    reach: str
    met: bool | None


@dataclass(frozen=True)
class Ran:
    """A command that was run: wall seconds, user + system seconds, peak resident KiB of its largest process."""

    seconds: float
    cpu: float
    peak_kib: int
    output: str


def run(command: Sequence[str | Path], env: dict[str, str] | None = None) -> Ran:
    """Run to the end, with the kernel's own account of it. Raises CalledProcessError."""
    begin = time.perf_counter()
    child = subprocess.Popen([*map(str, command)], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, env=env)
    assert child.stdout is not None
    output = child.stdout.read()
    _, status, usage = os.wait4(child.pid, 0)
    seconds = time.perf_counter() - begin
    child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode:
        raise subprocess.CalledProcessError(child.returncode, command, output)
    return Ran(seconds, usage.ru_utime + usage.ru_stime, usage.ru_maxrss, output.decode(errors="replace"))


def timed(work: Callable[[], object]) -> float:
    begin = time.perf_counter()
    work()
    return time.perf_counter() - begin


def drop_caches() -> None:
    """Page, dentry and inode caches: written back first, so that nothing dirty stays behind."""
    os.sync()
    Path("/proc/sys/vm/drop_caches").write_text("3")


def pairs(count: int, ours: Callable[[], float], theirs: Callable[[], float]) -> tuple[float, float, float]:
    """Interleaved: (median of ours, median of theirs, median of the ratios pair by pair)."""
    got = [(ours(), theirs()) for _ in range(count)]
    return (
        statistics.median(mine for mine, _ in got),
        statistics.median(other for _, other in got),
        statistics.median(mine / other for mine, other in got),
    )


def table(rows: Sequence[Row]) -> str:
    """Markdown."""
    mark = {True: "yes", False: "**no**", None: ""}
    lines = ["| what | measured | to reach | reached |", "|---|---|---|---|"]
    lines += [f"| {row.what} | {row.measured} | {row.reach} | {mark[row.met]} |" for row in rows]
    return "\n".join(lines)


def mb(size: float) -> str:
    return f"{size / 1e6:.1f} MB"
