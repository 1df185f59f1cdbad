"""What a run leaves behind: mounts, processes, loop devices. Standard library only: it runs before there is a venv.

    python3 tests/support/leaks.py snapshot FILE     keep what is there now
    python3 tests/support/leaks.py check FILE        exit 1 and say what is new since then

`check` waits a little for processes that are just ending. `--ours` looks only at what bears this run's mark (the
value of `CLIP_SHIM_TEST`, in a process's environment or a directory's name), for a machine on which other work goes on.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path

MARK = "CLIP_SHIM_TEST"  # in the environment of everything the tests start; its value names the run: RUN or RUN.WORKER
PREFIX = "clip-test-"  # of every directory they make; the run's name follows
_FILESYSTEMS = ("fuse", "erofs", "overlay")
_PROGRAMS = (
    *("clip-shim", "shim.", "dockerd", "containerd", "conmon", "docker-registry"),
    *("runc", "crun", "podman", "docker-proxy", "tests.support"),
)
_CLONE_NEWNS, _MS_REC, _MS_PRIVATE = 0x20000, 0x4000, 1 << 18  # sched.h, sys/mount.h
SETTLE = 15.0  # seconds that ending processes are given


def mounts() -> set[str]:
    """Mounts of the kinds we make, and anything mounted below a test directory: "fstype mountpoint id"."""
    found = set()
    for line in Path("/proc/self/mountinfo").read_text(errors="surrogateescape").splitlines():
        left, _, right = line.partition(" - ")
        fstype = right.split(" ", 1)[0]
        words = left.split(" ")
        if fstype.split(".")[0] in _FILESYSTEMS or PREFIX in words[4]:
            found.add(f"{fstype} {words[4]} #{words[0]}")
    return found


def processes() -> set[str]:
    """Engines, registries, runtimes, daemons and whatever bears our mark: "pid start-time command line"."""
    found = set()
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit() or int(entry.name) == os.getpid():
            continue
        try:
            line = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
            stat = (entry / "stat").read_text(errors="replace")
            environ = (entry / "environ").read_bytes()
        except OSError:
            continue  # it ended while we looked
        fields = stat.rpartition(")")[2].split()
        if not line or fields[0] == "Z" or "multiprocessing." in line:  # Python's helpers end with their parent
            continue
        run = run_of(environ.split(b"\0"), line)
        if run or any(word in " ".join(line.split()[:4]) for word in _PROGRAMS):
            found.add(f"{entry.name} @{fields[19]} {f'({run}) ' if run else ''}{line[:160]}")
    return found


def run_of(environ: list[bytes], command: str) -> str:
    """The mark of the test run that a process belongs to, "" if none."""
    for item in environ:
        if item.startswith(f"{MARK}=".encode()):
            return item.partition(b"=")[2].decode(errors="replace")
    return command.partition(PREFIX)[2].partition("-")[0]


def loops() -> set[str]:
    """Loop devices in use: "loopN backing file"."""
    found = set()
    for backing in Path("/sys/block").glob("loop*/loop/backing_file"):
        try:
            found.add(f"{backing.parent.parent.name} {backing.read_text().strip()}")
        except OSError:
            continue
    return found


KINDS: dict[str, Callable[[], set[str]]] = {"mounts": mounts, "processes": processes, "loops": loops}


def snapshot() -> dict[str, list[str]]:
    return {kind: sorted(look()) for kind, look in KINDS.items()}


def leaked(before: dict[str, list[str]], *, ours: bool = False, settle: float = SETTLE) -> list[str]:
    """Lines that say what is there now and was not before; [] if nothing. Ancestors of this process do not count."""
    own = _ancestors()
    run = re.escape(os.environ.get(MARK, "")) + r"(\.\w+)?"  # and its workers'
    signs = {"processes": rf"\({run}\) ", "mounts": f"{PREFIX}{run}-", "loops": f"{PREFIX}{run}-"}
    end = time.monotonic() + settle
    while True:
        lines = []
        for kind, look in KINDS.items():
            for item in sorted(look() - set(before.get(kind, ()))):
                if kind == "processes" and item.split(" ")[0] in own:
                    continue
                if ours and not re.search(signs[kind], item):
                    continue
                lines.append(f"{kind}: {item}")
        if not lines or time.monotonic() > end:
            return lines
        time.sleep(0.2)  # looked at again until the deadline


def own_mounts() -> None:
    """A mount namespace of this thread's own, for it and what it starts. In a common one, a namespace that another
    worker makes would hold copies of our mounts, and a daemon would see the other's containers."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(_CLONE_NEWNS) or libc.mount(None, b"/", None, _MS_REC | _MS_PRIVATE, None):
        raise OSError(ctypes.get_errno(), "no mount namespace of our own")


def _ancestors() -> set[str]:
    found, pid = set(), os.getpid()
    while pid > 1:
        found.add(str(pid))
        try:
            pid = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
        except OSError:
            break
    return found


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description="what a run leaves behind")
    parser.add_argument("verb", choices=("snapshot", "check"))
    parser.add_argument("file", type=Path)
    parser.add_argument("--ours", action="store_true", help="look only at what bears this run's mark")
    args = parser.parse_args(argv)
    if args.verb == "snapshot":
        args.file.write_text(json.dumps(snapshot()))
        return 0
    lines = leaked(json.loads(args.file.read_text()), ours=args.ours)
    for line in lines:
        print(f"left behind: {line}", file=sys.stderr)
    print("leak check: " + (f"{len(lines)} left behind" if lines else "nothing left mounted or running"))
    return 1 if lines else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
