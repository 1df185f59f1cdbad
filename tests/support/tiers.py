"""`make test`: the test tiers in order, then a summary and a look at what was left behind.

    python -m tests.support.tiers [--tier NAME]… [pytest arguments]

A lower tier that fails is usually the cause of a higher one's failure, but all are run, so that one run tells all. A
tier that cannot run here fails, unless the reason is an `excuse` (described in tests/README.md); it is printed in
any case.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import subprocess
import sys
import time
import uuid
from pathlib import Path

from tests.support import leaks

ROOT = Path(__file__).resolve().parents[2]
TIERS = ("unit", "mounts", "engines", "faults")
NEED_ROOT = TIERS[1:]
_TOOLS = (
    "runc",
    "docker",
    "dockerd",
    "containerd",
    "ctr",
    "podman",
    "conmon",
    "docker-registry",
    "umoci",
    "mmdebstrap",
)
# Two processes share a tier's files: half of the time is waiting. One file's tests stay together, with their fixtures.
_WORKERS = ("-n", "2", "--dist", "loadfile")
_NOTHING_COLLECTED = 5  # pytest's exit code


def excuse(tier: str) -> str | None:
    """A documented reason of this machine for which `tier` does not run."""
    if tier in NEED_ROOT and os.geteuid() != 0:
        return "needs root: mounts cannot be made without it (run `sudo make test`)"
    return None


def obstacle(tier: str) -> str | None:
    """A reason for which `tier` cannot run and which is a failure."""
    if not list((ROOT / "tests" / tier).glob("test_*.py")):
        return "holds no test file"
    if tier in NEED_ROOT and not Path("/dev/fuse").exists():
        return "there is no /dev/fuse (modprobe fuse)"
    missing = [tool for tool in _TOOLS if shutil.which(tool) is None]
    if tier == "engines" and missing:
        return "missing programs, see packaging/install-deps.sh: " + ", ".join(missing)
    return None


def run_tier(tier: str, arguments: list[str]) -> tuple[str, bool]:
    """(what to print in the summary, whether it passed)."""
    reason = excuse(tier)
    if reason:
        print(f"\n*** tier {tier} NOT RUN: {reason}", flush=True)
        return f"not run: {reason}", True
    reason = obstacle(tier)
    if reason:
        print(f"\n*** tier {tier} FAILED: {reason}", flush=True)
        return f"FAILED: {reason}", False
    print(f"\n=== {tier}", flush=True)
    command = [sys.executable, "-m", "pytest", "-q", *_WORKERS, f"tests/{tier}", *arguments]
    code = subprocess.run(command, cwd=ROOT).returncode
    if code == _NOTHING_COLLECTED and arguments:
        return "no test selected", True
    return ("passed", True) if code == 0 else (f"FAILED (pytest exit code {code})", False)


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description="run the test tiers")
    parser.add_argument("--tier", action="append", choices=TIERS)
    args, arguments = parser.parse_known_args(argv)
    os.environ[leaks.MARK] = uuid.uuid4().hex[:6]
    os.environ["PATH"] = f"{os.environ.get('PATH', '')}:/usr/local/sbin:/usr/sbin:/sbin"
    before = leaks.snapshot()
    summary, good = [], True
    interrupted: list[int] = []  # pytest gets a terminal's Ctrl-C too and cleans up; killing it would leave mounts
    signal.signal(signal.SIGINT, lambda number, _: interrupted.append(number))
    for tier in args.tier or TIERS:
        if interrupted:
            summary.append(f"{tier:<8}           not run: interrupted")
            good = False
            continue
        start = time.monotonic()
        line, passed = run_tier(tier, arguments)
        summary.append(f"{tier:<8} {time.monotonic() - start:6.1f} s  {line}")
        good &= passed
    left = leaks.leaked(before, ours=True)
    summary.append("leaks             " + (f"FAILED: {len(left)} left behind" if left else "none"))
    print("\n=== summary")
    print("\n".join(summary + [f"  left behind: {line}" for line in left]), flush=True)
    return 0 if good and not left else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
