"""Kills the server at named points, while containers and readers hash everything that they read.

A plan is a file with one line for each server that will be started: a point of POINTS and the how-manieth time it is
passed there, or nothing. A `sitecustomize` on the servers' import path takes the next line and puts a SIGKILL there, so
the product has no part in it.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import re
import signal
import statistics
import subprocess
import sys
import threading
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from tests.support import bundle, expected, images
from tests.support.daemonclient import Client, descendants, log_lines
from tests.support.host import Host, wait_for

# point → (module, function, before or after it runs)
POINTS = {
    "open-read": ("shim.fuse.journal", "Journal.opened", "before"),  # of a mount or a reader: not recorded, no answer
    "open-recorded": ("shim.fuse.journal", "Journal.opened", "after"),
    "release-read": ("shim.fuse.journal", "Journal.closed", "before"),
    "release-recorded": ("shim.fuse.journal", "Journal.closed", "after"),
    "lookup-read": ("shim.fuse.server", "BlobServer._lookup", "before"),
    "read-parked": ("shim.fuse.server", "BlobServer.park", "after"),
    "blob-recorded": ("shim.fuse.journal", "Journal.add_node", "after"),
    "blob-forgotten": ("shim.fuse.journal", "Journal.remove_node", "before"),
    "compacting": ("shim.fuse.journal", "Journal._records", "after"),
    "mounting": ("shim.daemon.trees", "Trees._mount_erofs", "before"),
    "mounted": ("shim.daemon.trees", "Trees._mount_erofs", "after"),
    "unmounting": ("shim.daemon.trees", "Trees._clear", "before"),
    "unmounted": ("shim.daemon.trees", "Trees._clear", "after"),
    "taken": ("shim.daemon.handover", "take", "after"),
    "restored": ("shim.daemon.handover", "restore", "after"),
    "resending": ("shim.fuse.server", "BlobServer.resend", "before"),
    "resent": ("shim.fuse.server", "BlobServer.resend", "after"),
    "serving": ("shim.daemon.notify", "ready", "before"),
}
ONCE = ("compacting", "taken", "restored", "resending", "resent", "serving")  # passed once in a server's life

SITE = """
import os, sys
def _plan():
    if sys.orig_argv[1:4] != ["-m", "shim", "daemon"] or "--supervise" in sys.argv + sys.orig_argv:
        return
    import fcntl, functools, importlib, itertools, signal, time
    path = os.environ["CLIP_SHIM_TEST_PLAN"]
    with open(path, "r+") as plan:
        fcntl.flock(plan, fcntl.LOCK_EX)
        line, _, rest = plan.read().partition("\\n")
        plan.seek(0)
        plan.truncate()
        plan.write(rest)
    if not line:
        return
    module, name, when, count = line.split()
    owner = importlib.import_module(module)
    *parents, name = name.split(".")
    for parent in parents:
        owner = getattr(owner, parent)
    function = getattr(owner, name)
    passed = itertools.count(1)
    def die():
        with open(path + ".times", "a") as times:
            print(time.monotonic(), file=times)
        os.kill(os.getpid(), signal.SIGKILL)
    @functools.wraps(function)
    def killing(*args, **kwargs):
        if when == "before" and next(passed) == int(count):
            die()
        result = function(*args, **kwargs)
        if when == "after" and next(passed) == int(count):
            die()
        return result
    setattr(owner, name, killing)
    handlers = getattr(sys.modules.get("shim.fuse.server"), "_HANDLERS", {})
    for opcode, handler in handlers.items():
        if handler is function:
            handlers[opcode] = killing
_plan()
"""

_READER = """
import hashlib, json, os, sys
tree, digests, stop = sys.argv[1:4]
wanted = json.load(open(digests))
passes = 0
while passes == 0 or not os.path.exists(stop):
    for name, digest in wanted.items():
        path = os.path.join(tree, name)
        with open(path, "rb") as file:
            data = file.read()
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        assert hashlib.sha256(data).hexdigest() == digest, path
    passes += 1
print(passes, flush=True)
"""

# begin and end of reads of cached bytes that had to wait, directly from the blob file, kernel cache dropped
_PROBE = """
import os, sys, time
path, stop = sys.argv[1:3]
fd = os.open(path, os.O_RDONLY)
first = os.pread(fd, 4096, 0)
while not os.path.exists(stop):
    os.posix_fadvise(fd, 0, 1 << 20, os.POSIX_FADV_DONTNEED)
    begin = time.monotonic()
    assert os.pread(fd, 4096, 0) == first
    end = time.monotonic()
    if end - begin > 0.05:
        print(begin, end, flush=True)
    time.sleep(0.01)
"""
_DIGEST = re.compile(r"^\\?([0-9a-f]{64})  ", re.M)


@dataclass
class Report:
    """kills: how often by which point (or "moment"); passes: of the readers over all files; runs: containers that ran
    to their end; waits: seconds that a read of cached bytes took over one or more restarts; served: seconds to its end
    from the kill, the last if there were several."""

    kills: dict[str, int] = field(default_factory=dict)
    passes: int = 0
    runs: int = 0
    waits: list[float] = field(default_factory=list)
    served: list[float] = field(default_factory=list)

    def time(self, kills: list[float], reads: list[tuple[float, float]]) -> None:
        """Work out `waits` and `served`. kills: when; reads: begin and end of those that waited, in order."""
        before = 0.0
        for begin, end in reads:
            if mine := [kill for kill in kills if before < kill < end]:
                self.waits.append(end - begin)
                self.served.append(end - max(mine))
            before = end

    def __str__(self) -> str:
        waits, served = self.waits or [0.0], self.served or [0.0]
        return (
            f"{sum(self.kills.values())} kills {self.kills}, {self.passes} passes over all files, "
            f"{self.runs} containers; cached reads over restarts waited {statistics.median(waits):.2f} s (median), "
            f"at most {max(waits):.2f} s; from a kill to the first served read "
            f"{statistics.median(served):.2f} s (median), at most {max(served):.2f} s"
        )


def trial(address: str, seed: int, kills: int, *, readers: list[str], image: str) -> Report:
    """A host whose images are behind `address`; kills; a look at what is left. Prints what it saw."""
    with Host(settings={"CLIP_SHIM_TREE_LINGER": "0s"}) as host:
        host.trust_registry(address)
        indexes = {name: host.index(f"{address}/{name}:latest", name) for name in {*readers, image, "shared-b"}}
        chosen = prepare(host, seed, kills)
        child = host.start_daemon()
        trees = {}
        for name in readers:
            trees[name] = host.base / name
            trees[name].mkdir()
            host.clip("mount", indexes[name], trees[name])
        work = Work(host, trees, indexes[image], image, indexes["shared-b"], loops=2)
        report = survive(host, child.pid, seed, chosen, work, patience=1.5)
        print(report)
        assert not log_lines(host, "read failed")
        for tree in trees.values():
            host.clip("umount", tree)
        assert host.clip_overlays() == []
        child.terminate()
        assert child.wait(30) == 0
        assert host.mounts() == []
        assert sorted(path.name for path in Path(host.run_dir).glob("*.sock")) == []
    return report


def prepare(host: Host, seed: int, kills: int) -> list[str]:
    """Write the plan and let the host's servers follow it; returns the point of each ("moment": at any time)."""
    chance = random.Random(seed)
    points = list(POINTS)
    chance.shuffle(points)
    chosen = [points[n % len(points)] if n % 4 else "moment" for n in range(kills)]
    lines = []
    for point in chosen:
        count = 1 if point in ONCE else chance.choice((1, 1, 2, 3))
        lines.append("" if point == "moment" else f"{' '.join(POINTS[point])} {count}")
    site = host.base / "site"
    site.mkdir()
    (site / "sitecustomize.py").write_text(SITE)
    # the first two servers start as they are: one is there before any work is, one may be replaced by the test
    (host.base / "plan").write_text("\n".join(["", *lines]) + "\n")
    (host.base / "plan.times").touch()
    host.env["PYTHONPATH"] = str(site)
    host.env["CLIP_SHIM_TEST_PLAN"] = str(host.base / "plan")
    return chosen


def survive(host: Host, supervisor: int, seed: int, chosen: list[str], work: Work, *, patience: float) -> Report:
    """Kill the server once for each of `chosen` while `work` goes on. AssertionError when anything was not as ever."""
    chance = random.Random(seed)
    times = host.base / "plan.times"  # of kills at points
    report = Report()
    work.start()
    pid = server_pid(host)
    kills = [time.monotonic()]
    os.kill(pid, signal.SIGKILL)  # the first, which follows no plan
    for point in chosen:
        old, pid = pid, new_server(host, pid)
        assert old != pid
        if chance.random() < 0.3:
            Path("/proc/sys/vm/drop_caches").write_text("1")
        end = time.monotonic() + (chance.uniform(0, 1) if point == "moment" else patience)
        while alive(pid) and time.monotonic() < end:
            time.sleep(0.005)
            work.check()
        name = point
        if alive(pid):
            name = "moment"
            kills.append(time.monotonic())
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
        report.kills[name] = report.kills.get(name, 0) + 1
    new_server(host, pid)
    reads = work.finish(report)
    report.time(kills + [float(line) for line in times.read_text().split()], reads)
    assert not [child for child in descendants(supervisor) if state(child) == "Z"], "unreaped"
    return report


def new_server(host: Host, old: int) -> int:
    """The pid of the next server, as soon as it exists; it may die before it answers."""
    found: list[int] = []

    def look() -> bool:
        found[:] = [pid for pid in servers(host) if pid != old and alive(pid)]
        return bool(found)

    wait_for("another server", look)
    return found[0]


def servers(host: Host) -> list[int]:
    out = []
    for pid in host.processes():
        with suppress(OSError):
            words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
            if words[1:4] == [b"-m", b"shim", b"daemon"] and b"--supervise" not in words:
                out.append(pid)
    return out


def server_pid(host: Host) -> int:
    with Client(host) as client:
        return int(client.ask({"op": "ping"})["pid"])


def state(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return "X"


def alive(pid: int) -> bool:
    return state(pid) not in "ZX"


class Work:
    """Readers over a mounted tree; containers that start, hash their whole root and end, one after the other; a tree
    that comes and goes."""

    def __init__(
        self, host: Host, trees: dict[str, Path], containers: Path, image: str, churned: Path, *, loops: int
    ) -> None:
        """trees: image name → directory where its tree is mounted. containers: index of the image that is run. churned:
        index of the one that comes and goes."""
        self._host = host
        self._trees = trees
        self._index = containers
        self._loops = loops
        self._churn = threading.Thread(target=self._come_and_go, args=(churned,), daemon=True)
        self._stop = host.base / "stop"
        self._wanted = sorted(_digests(expected.tree(images.image(image))).values())
        self._readers: list[subprocess.Popen[str]] = []
        self._containers: list[subprocess.Popen[str]] = []

    def start(self) -> None:
        for name, directory in self._trees.items():
            facts = self._host.base / f"{name}.json"
            facts.write_text(json.dumps(_digests(expected.tree(images.image(name)))))
            self._readers.append(self._python(_READER, directory, facts, self._stop))
        self._churn.start()
        blob = next((self._host.run_dir / "blobs").iterdir())
        self._probe = self._python(_PROBE, blob, self._stop)
        for number in range(self._loops):
            made = bundle.make(
                self._host.base / f"bundle{number}",
                ["sh", "-c", "find / -xdev -type f -exec sha256sum {} +"],
                index=self._index,
            )
            oci = " ".join(map(str, self._host.oci))
            loop = f"while ! [ -e {self._stop} ]; do {oci} run --bundle {made} c{number} || exit 1; echo ran; done"
            log = self._host.base / f"loop{number}"
            with log.open("wb") as out:
                self._containers.append(
                    subprocess.Popen(["sh", "-c", loop], stdout=out, stderr=out, env=self._host.env, text=True)
                )

    def _come_and_go(self, index: Path) -> None:
        while not self._stop.exists():
            with suppress(OSError, AssertionError), Client(self._host) as client:  # what is killed does not answer
                answer = client.acquire(index)
                assert os.listdir(answer["tree"])

    def _python(self, script: str, *arguments: Path) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-c", script, *map(str, arguments)],
            env={k: v for k, v in self._host.env.items() if k != "PYTHONPATH"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def check(self) -> None:
        """Nobody has given up."""
        for child in (*self._readers, self._probe, *self._containers):
            if child.poll() is not None:
                self._stop.touch()
                raise AssertionError(f"a reader ended\n{self._said(child)}\n{self._host.logs(30)}")

    def _said(self, child: subprocess.Popen[str]) -> str:
        if child in self._containers:
            return (self._host.base / f"loop{self._containers.index(child)}").read_text(errors="replace")[-3000:]
        return "".join(child.communicate())[-3000:]

    def finish(self, report: Report) -> list[tuple[float, float]]:
        """Let all come to its end; returns begin and end of the reads of cached bytes that waited."""
        self._stop.touch()
        self._churn.join(60)
        for child in self._readers:
            out, errors = child.communicate(timeout=60)
            assert child.returncode == 0, errors
            report.passes += int(out)
        out, errors = self._probe.communicate(timeout=60)
        assert self._probe.returncode == 0, errors
        words = [line.split() for line in out.splitlines()]
        for number, child in enumerate(self._containers):
            assert child.wait(60) == 0, self._said(child)
            runs = (self._host.base / f"loop{number}").read_text(errors="replace").split("ran\n")[:-1]
            for said in runs:
                assert sorted(_DIGEST.findall(said)) == self._wanted, said[-3000:]
            report.runs += len(runs)
        return [(float(begin), float(end)) for begin, end in words]


def _digests(tree: Path) -> dict[str, str]:
    """Path of each regular file, below `tree` → SHA-256."""
    found = {}
    for directory, _, names in os.walk(os.fsencode(tree)):
        for name in names:
            path = os.path.join(directory, name)
            if os.path.isfile(path) and not os.path.islink(path):
                with open(path, "rb") as file:
                    key = os.fsdecode(os.path.relpath(path, os.fsencode(tree)))
                    found[key] = hashlib.file_digest(file, "sha256").hexdigest()
    return found
