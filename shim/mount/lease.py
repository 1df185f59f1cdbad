"""Who uses a tree: asked of the kernel, by a lease on its metadata image (fcntl(2), F_SETLEASE)."""

from __future__ import annotations

import errno
import fcntl
import os
import signal

from shim.errors import MountError


def in_use(path: str | os.PathLike[str]) -> bool:
    """Whether anybody has the file at `path` open: an EROFS mount, an overlay's clone of one, in any namespace.

    A write lease is granted only for a file that nobody else has open (EAGAIN otherwise); it is given back at once. The
    caller must not have the file open itself. False if there is no such file, MountError if the kernel cannot say.
    """
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    except FileNotFoundError:
        return False
    except OSError as error:
        raise MountError(f"cannot open {path}: {error.strerror}") from error
    try:
        # somebody who opens the file just then breaks the lease, and the signal for that, SIGIO, would kill us:
        # ask for one that is ignored by default
        fcntl.fcntl(fd, fcntl.F_SETSIG, signal.SIGURG)
        fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_WRLCK)
    except OSError as error:
        if error.errno == errno.EAGAIN:
            return True
        raise MountError(f"cannot ask whether {path} is in use: {error.strerror}") from error
    else:
        fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_UNLCK)
        return False
    finally:
        os.close(fd)
