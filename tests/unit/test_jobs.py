"""Jobs: results and errors come back whole, a job past its deadline is stopped, one that dies is told."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from shim.daemon import jobs
from shim.errors import DaemonError, IntegrityError
from tests.support.daemonclient import is_running


def answer(value: int) -> int:
    return value + os.getppid() * 0


def fail_with_hint() -> None:
    raise IntegrityError("wrong bytes", hint="look there")


def missing_file() -> None:
    open("/nonexistent/file").close()


def wait_for_ever() -> None:
    signal.pause()


def die() -> None:
    os._exit(7)


def test_result_and_error_come_back() -> None:
    assert jobs.run(20, answer, 41 + 1) == 42
    with pytest.raises(IntegrityError, match="wrong bytes") as caught:
        jobs.run(20, fail_with_hint)
    assert caught.value.hint == "look there"
    with pytest.raises(DaemonError, match=r"missing file: /nonexistent/file: No such file"):
        jobs.run(20, missing_file)


def test_a_job_past_its_deadline_is_stopped() -> None:
    started = time.monotonic()
    with pytest.raises(DaemonError, match=r"wait for ever took longer than 0\.3 s"):
        jobs.run(0.3, wait_for_ever)
    assert time.monotonic() - started < 10


def oom_score() -> int:
    return int(Path("/proc/self/oom_score_adj").read_text())


@pytest.mark.parametrize(("ours", "its"), [(-900, 0), (300, 300)])
def test_a_job_goes_before_its_server_and_containers(ours: int, its: int) -> None:
    place = Path("/proc/self/oom_score_adj")
    before = place.read_text()
    code = (
        "from shim.daemon import jobs\nfrom tests.unit.test_jobs import oom_score\n"
        f"open('{place}', 'w').write('{ours}')\nprint(jobs.run(20, oom_score))"
    )
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert said == f"{its}\n"
    assert place.read_text() == before


def test_a_job_that_dies_is_told() -> None:
    with pytest.raises(DaemonError, match=r"die died unexpectedly \(exit status 7\)"):
        jobs.run(20, die)


_SERVER = """
import os, sys, time
from shim.daemon import jobs
def job(path):
    with open(path, "w") as file:
        file.write(f"{os.getpid()} {os.getppid()}")
    time.sleep(60)
if __name__ == "__main__":
    jobs.run(60, job, sys.argv[1])
"""


def test_a_job_ends_with_its_server(tmp_path: Path) -> None:
    """However that ends, and so do the helpers between them."""
    (tmp_path / "server.py").write_text(_SERVER)
    server = subprocess.Popen([sys.executable, tmp_path / "server.py", tmp_path / "pids"])
    end = time.monotonic() + 20
    while len((text := _read(tmp_path / "pids")).split()) < 2:
        assert time.monotonic() < end, "no job began"
    pids = [int(word) for word in text.split()]
    server.kill()
    server.wait()
    end = time.monotonic() + 10
    while left := [pid for pid in pids if is_running(pid)]:
        if time.monotonic() > end:
            for pid in left:
                os.kill(pid, signal.SIGKILL)
            raise AssertionError("a job outlived its server")


def _read(path: Path) -> str:
    return path.read_text() if path.exists() else ""
