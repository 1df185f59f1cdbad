"""Locks that fence servers: one process owns a directory, and a dead one does not, whatever it still holds.

A killed process whose thread hangs in the kernel keeps its descriptors, and with them its flock(2), until that thread
ends. It executes nothing of ours any more, so its lock is passed over: the lock file is replaced, and what the dead one
holds is a file without a name. Standard library only.
"""

from __future__ import annotations

import fcntl
import os
from pathlib import Path

_TRIES = 5


def own(path: Path) -> int:
    """A descriptor that holds the exclusive lock of the file at `path`, made if it is not there.

    Raises BlockingIOError: a living process has it. OSError. Two servers that find the same corpse at the same time
    could pass each other by; a supervisor starts one.
    """
    for _ in range(_TRIES):
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        inode = os.fstat(fd).st_ino
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.stat(path).st_ino == inode:
                return fd
            os.close(fd)  # another has replaced it meanwhile
        except FileNotFoundError:
            os.close(fd)
        except OSError:
            os.close(fd)
            if not any(is_corpse(pid) for pid in _holders(inode)):
                raise
            path.unlink(missing_ok=True)
    raise BlockingIOError(f"{path} changes all the time")


def is_corpse(pid: int) -> bool:
    """Whether a process is dead but for threads that the kernel cannot end yet: its first thread is a zombie."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            return file.read().rpartition(b")")[2].split()[0] in (b"Z", b"X")
    except OSError:
        return False  # there is none


def _holders(inode: int) -> list[int]:
    """Processes that have a flock on a file with this inode number, proc_locks(5)."""
    found = []
    with open("/proc/locks", "rb") as file:
        for line in file:
            words = line.split()
            if words[1:2] == [b"FLOCK"] and words[5].rpartition(b":")[2] == str(inode).encode():
                found.append(int(words[4]))
    return found
