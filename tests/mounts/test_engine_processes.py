"""Which processes are taken for engines: a name says nothing, whose it is and where it runs does."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from shim.install import containerd, running

NOBODY = 65534
# a copy of Python says "Python 3.x.y" to --version, which reads like a version of containerd
SLEEP = ["-c", "print(flush=True); import time; time.sleep(60)"]


@pytest.fixture
def program(tmp_path: Path) -> Path:
    """A program of somebody's, called like the engine."""
    tmp_path.chmod(0o755)
    for parent in tmp_path.parents:
        if not parent.stat().st_mode & 0o001:
            parent.chmod(0o755)
    return Path(shutil.copy("/usr/bin/python3", tmp_path / "containerd"))


@contextmanager
def run(*command: str | Path, user: int | None = None) -> Iterator[subprocess.Popen[bytes]]:
    with subprocess.Popen(command, user=user, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline()  # it runs
        try:
            yield process
        finally:
            process.kill()


def pids() -> list[int]:
    return [process.pid for process in running.find("containerd")]


def test_roots_process_is_found(program: Path) -> None:
    with run(program, *SLEEP) as process:
        [found] = [found for found in running.find("containerd") if found.pid == process.pid]
        assert found.executable == str(program)
        assert found.root == Path("/")


def test_a_users_process_is_no_engine(program: Path) -> None:
    """Neither is its word taken, nor its program run: we are root."""
    os.chown(program, NOBODY, NOBODY)
    before = containerd.installed_version()
    with run(program, *SLEEP, "--config-file", "/tmp/x", user=NOBODY) as process:
        assert process.pid not in pids()
        assert containerd.installed_version() == before


def test_the_program_of_a_process_in_another_mount_namespace_is_not_run(program: Path) -> None:
    """It may be a container's, whose root is root too."""
    before = containerd.installed_version()
    with run("unshare", "-m", program, *SLEEP) as process:
        assert process.pid in pids()
        assert containerd.installed_version() == before


def test_a_program_that_a_user_can_replace_is_not_run(program: Path) -> None:
    before = containerd.installed_version()
    os.chown(program, NOBODY, NOBODY)
    with run(program, *SLEEP) as process:
        assert process.pid in pids()
        assert containerd.installed_version() == before
