"""`make bench`: measure everything that is promised, print the table, and renew tests/bench/README.md.

    python -m tests.bench [--only index,trees,starts,far,memory,load,wrapper] [--rounds N] [--big-gib N]

Run on a machine that does nothing else. With --only nothing is written.
"""

from __future__ import annotations

import argparse
import datetime
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from tests.bench import indexing, load, memory, starts, trees
from tests.bench.common import Row, run, table
from tests.support import expected, images
from tests.support.host import Host
from tests.support.registry import Registry

README = Path(__file__).with_name("README.md")
PARTS = ("index", "trees", "starts", "far", "memory", "load", "wrapper")


class Bench:
    """One registry with the two images; each part gets a new host."""

    def __init__(self, registry: Registry, rounds: int, big_gib: int) -> None:
        self.registry = registry
        self.rounds = rounds
        self.big_gib = big_gib
        self.debian = images.image("debian")
        self.science = images.image("science")
        self.references = {image.name: images.push(image, registry.host) for image in (self.debian, self.science)}

    def part(self, name: str) -> list[Row]:
        with Host() as host:
            host.trust_registry(self.registry.host)
            work: Callable[[Host], list[Row]] = getattr(self, name)
            return work(host)

    def index(self, host: Host) -> list[Row]:
        rows = indexing.measure(host, self.debian, self.references["debian"], self.rounds)
        rows += indexing.measure(host, self.science, self.references["science"], 1)
        if self.big_gib:
            ran = run([sys.executable, "-m", "tests.bench.scan", "--zeros", str(self.big_gib)])
            peak = ran.peak_kib / 1024
            rows.append(
                Row(
                    f"peak memory of scanning a layer of {self.big_gib} GiB", f"{peak:.0f} MiB", "≤ 300 MB", peak <= 286
                )
            )
        return rows

    def trees(self, host: Host) -> list[Row]:
        index = host.index(self.references["debian"])
        return trees.measure(host, "debian", index, expected.tree(self.debian), 2 * self.rounds + 1)

    def starts(self, host: Host) -> list[Row]:
        index = host.index(self.references["science"])
        return starts.measure(host, self.science, self.registry, index, self.rounds)

    def far(self, host: Host) -> list[Row]:
        return starts.far_away(host, self.science, self.registry)

    def memory(self, host: Host) -> list[Row]:
        return memory.measure(host, self.registry)

    def load(self, _host: Host) -> list[Row]:
        return load.measure(self.registry)  # on hosts of its own

    def wrapper(self, _host: Host) -> list[Row]:
        command = [sys.executable, "-m", "tests.bench.wrapper"]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True)  # its own directories
        rows = []
        for line in done.stdout.splitlines()[2:]:
            what, ours, base, more, bar, met = (cell.strip() for cell in line.strip("|").split("|"))
            rows.append(Row(what, f"{ours} ms against {base} ms: {more} ms", f"≤ {bar} ms more", met == "yes"))
        assert rows, "the wrapper's benchmark printed no table"
        return rows


def write_readme(rows: list[Row]) -> None:
    """The kept table, with the machine and the date."""
    memory_gib = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / (1 << 30)
    README.write_text(
        "# Measured\n\n"
        f"`make bench` on {datetime.date.today():%Y-%m-%d}: Linux {os.uname().release}, {os.cpu_count()} CPUs, "
        f"{memory_gib:.0f} GiB, ext4. Medians; ratios are taken pair by pair within one run.\n\n"
        f"{table(rows)}\n\n"
        "How: `indexing.py`, `trees.py`, `starts.py`, `memory.py`, `load.py`, `wrapper.py`. `debian` is a Debian with "
        "Python in one layer,\n`science` adds numpy, pandas, scikit-learn and matplotlib, 700 MB in all "
        "(tests/support/recipes.py); the registry is Debian's docker-registry on\nloopback, the far one behind a proxy "
        "of 30 ms and 100 MB/s a connection. "
        "Cold: a new daemon with an empty cache, page\ncache dropped; warm: the same container again. `needed` is "
        "found by mincore(2) over the tree after the run.\n"
    )


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.bench", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", default=",".join(PARTS), help="parts to measure, comma between")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--big-gib", type=int, default=10, help="size of the big layer that is scanned, 0 for none")
    args = parser.parse_args()
    parts = args.only.split(",")
    rows: list[Row] = []
    with Registry() as registry:
        bench = Bench(registry, args.rounds, args.big_gib)
        for name in parts:
            found = bench.part(name)
            print(table(found), flush=True)
            rows += found
    if parts == list(PARTS):
        write_readme(rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
