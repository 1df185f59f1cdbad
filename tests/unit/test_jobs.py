"""Jobs: results and errors come back whole, a job past its deadline is stopped, one that dies is told."""

from __future__ import annotations

import os
import signal
import time

import pytest

from shim.daemon import jobs
from shim.errors import DaemonError, IntegrityError


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


def test_a_job_that_dies_is_told() -> None:
    with pytest.raises(DaemonError, match=r"die died unexpectedly \(exit status 7\)"):
        jobs.run(20, die)
