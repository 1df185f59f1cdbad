"""What the wrapper costs: `python -m tests.bench.wrapper [--runs N]`, as root. Medians of interleaved runs.

Four pairs, each measured in turn so that whatever else the machine does hits both sides alike:

- a verb that is passed on, against a bare `python3 -IS` script that execs the same runtime (bar: 4 ms more);
- create of a container without a reference, against the bare script (bar: 6 ms more): on an overlay of 20 layers, where
  each is looked at for a marker;
- create of a container whose tree is mounted, against runc's own create (bar: 60 ms more), on an overlay, and beside.

For the first two the runtime is a program that does nothing, since runc's own time would only add noise.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from shim.mount import syscalls
from shim.runtime.launcher import write_launcher
from shim.settings import load
from tests.support.engines import find_runtime
from tests.support.wrapperbox import Box

LAYERS = 20
BARE = """#!/usr/bin/python3 -IS
import os, sys
os.execve({runtime!r}, [{runtime!r}, *sys.argv[1:]], os.environ)
"""


def spawn(line: list[str]) -> float:
    """Milliseconds from start to end of a command, which must succeed."""
    begin = time.perf_counter()
    pid = os.posix_spawn(line[0], line, os.environ)
    _, status = os.waitpid(pid, 0)
    took = (time.perf_counter() - begin) * 1e3
    if status:
        raise RuntimeError(f"{line} ended with status {status}")
    return took


def interleave(runs: int, *sides: Callable[[int], float]) -> list[list[float]]:
    """Times of each side, one run of each in turn, after a few that do not count."""
    times: list[list[float]] = [[] for _ in sides]
    for turn in range(runs + 3):
        for number, side in enumerate(sides):
            took = side(turn)
            if turn >= 3:
                times[number].append(took)
    return times


def report(name: str, base: str, times: list[list[float]], bar: float) -> bool:
    low, high = (statistics.median(side) for side in times)
    extra = high - low
    print(
        f"| {name} | {high:.1f} | {base} {low:.1f} | {extra:+.1f} | {bar:g} | {'yes' if extra <= bar else 'NO'} |",
        flush=True,
    )
    return extra <= bar


def passed_on(box: Box, runs: int) -> bool:
    """Both cheap pairs."""
    bare = box.directory / "bare"
    bare.write_text(BARE.format(runtime="/bin/true"))
    bare.chmod(0o755)
    flags = {"run_dir": str(box.run_dir), "runtimes": ["/bin/true"]}
    (box.directory / "cheap").mkdir()
    clip = str(write_launcher(box.directory / "cheap" / "clip", load(env={}, flags=flags), ["/bin/false"]))
    start = ["--root", str(box.root), "--log", "/l", "--log-format", "json", "start", "c"]
    times = interleave(runs, lambda _: spawn([str(bare), *start]), lambda _: spawn([clip, *start]))
    fine = report("`start`, passed on", "bare script", times, 4)

    place = box.bundle("ordinary", ":", annotations={"org.example": "x"})
    box.overlay(place, *(box.layer(f"layer{number}") for number in range(LAYERS)))
    create = [*start[:-2], "create", "--bundle", str(place), "--pid-file", "/p", "c"]
    times = interleave(runs, lambda _: spawn([str(bare), *create]), lambda _: spawn([clip, *create]))
    fine &= report(f"`create` without a reference, {LAYERS} layers", "bare script", times, 6)
    syscalls.umount2(place / "rootfs")
    return fine


def lazy(box: Box, runs: int, *, beside: bool) -> bool:
    """create with a mounted tree, against runc's create over the same tree as ordinary root."""
    thin = box.layer(f"thin-{beside}")
    ours, plain = (box.bundle(f"{name}-{beside}", ":") for name in ("ours", "plain"))
    runc = find_runtime("runc")

    def create(line: list[str], place: Path, container: str, lowers: list[Path]) -> float:
        if lowers:
            box.overlay(place, *lowers)
        box.configure(place, ["/bin/true"])
        took = spawn([*line, "create", "--bundle", str(place), container])
        subprocess.run([runc, "--root", str(box.root), "delete", "--force", container], check=True)
        if lowers:
            syscalls.umount2(place / "rootfs", syscalls.MNT_DETACH)
        return took

    globals_ = ["--root", str(box.root)]
    times = interleave(
        runs,
        lambda turn: create([runc, *globals_], plain, f"p{turn}", [thin, box.tree]),
        lambda turn: create([str(box.launcher), *globals_], ours, f"o{turn}", [] if beside else [thin]),
    )
    return report(f"`create`, tree mounted, {'no overlay' if beside else 'overlay in place'}", "runc", times, 60)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=200, help="measured runs of each side (default 200)")
    runs = parser.parse_args().runs
    print("| call | median ms | against, ms | more, ms | bar | met |\n|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory(prefix="clip-test-bench-") as directory:
        box = Box(Path(directory))
        try:
            fine = passed_on(box, runs)
            fine &= lazy(box, runs, beside=False)
            fine &= lazy(box, runs, beside=True)
        finally:
            box.close()
    return 0 if fine else 1


if __name__ == "__main__":
    sys.exit(main())
