"""Locks of directories: a living owner is respected, a dead one that still holds its descriptors is not."""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
from pathlib import Path

import pytest

from shim.cache.ownership import is_corpse, own

# the first thread ends, another lives on and keeps the lock: so does a killed process that hangs in the kernel
_CORPSE = """
import ctypes, fcntl, os, sys, threading
fd = os.open(sys.argv[1], os.O_RDWR | os.O_CREAT)
fcntl.flock(fd, fcntl.LOCK_EX)
threading.Thread(target=sys.stdin.read).start()
os.write(1, b"locked\\n")
if sys.argv[2] == "dead":
    ctypes.CDLL(None).pthread_exit(None)
"""


@pytest.mark.parametrize("state", ["alive", "dead"])
def test_an_owner(tmp_path: Path, state: str) -> None:
    path = tmp_path / "lock"
    child = subprocess.Popen(
        [sys.executable, "-c", _CORPSE, path, state], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert child.stdout is not None
    assert child.stdin is not None
    assert child.stdout.readline() == b"locked\n"
    if state == "dead":
        while not is_corpse(child.pid):
            assert child.poll() is None
        fd = own(path)
        with pytest.raises(BlockingIOError):
            own(path)
        os.close(fd)
    else:
        assert not is_corpse(child.pid)
        with pytest.raises(BlockingIOError):
            own(path)
    child.stdin.close()
    child.wait(20)
    os.close(own(path))


def test_a_lock_is_free_again(tmp_path: Path) -> None:
    first = own(tmp_path / "lock")
    assert fcntl.fcntl(first, fcntl.F_GETFD) & fcntl.FD_CLOEXEC
    os.close(first)
    os.close(own(tmp_path / "lock"))
