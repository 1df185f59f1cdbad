"""Short commands without the `subprocess` module: the wrapper needs one only when something is not as usual."""

from __future__ import annotations

import os
import select
import time
from _signal import SIGKILL  # type: ignore[import-not-found]  # not in typeshed

from shim.errors import ShimError


def run(command: list[str], environ: dict[str, str], seconds: float, limit: int) -> tuple[int, bytes, bytes]:
    """Run a command with no input to its end: (exit code or -signal, output, error output), each at most `limit` bytes.

    Raises ShimError when it cannot be started or takes longer than `seconds`; it is killed then.
    """
    out_read, out_write = os.pipe2(os.O_CLOEXEC)
    err_read, err_write = os.pipe2(os.O_CLOEXEC)
    null = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)
    high = [_above_stdio(fd) for fd in (null, out_write, err_write)]
    try:
        actions = [(os.POSIX_SPAWN_DUP2, fd, target) for target, fd in enumerate(high)]
        pid = os.posix_spawn(command[0], command, environ, file_actions=actions)
    except OSError as error:
        os.close(out_read)
        os.close(err_read)
        raise ShimError(f"{command[0]} cannot be started (errno {error.errno})") from error
    finally:
        for fd in {null, out_write, err_write, *high}:
            os.close(fd)
    parts: dict[int, list[bytes]] = {out_read: [], err_read: []}
    late = not _collect(parts, time.monotonic() + seconds, limit)
    for fd in parts:
        os.close(fd)
    if late:
        os.kill(pid, SIGKILL)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    if late:
        raise ShimError(f"{command[0]} did not end within {seconds:g} s")
    return code, b"".join(parts[out_read])[:limit], b"".join(parts[err_read])[:limit]


def _above_stdio(fd: int) -> int:
    """A copy of fd above 2: where 0 to 2 were closed, a new descriptor may have taken their place."""
    if fd > 2:
        return fd
    import fcntl

    return fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 3)


def _collect(parts: dict[int, list[bytes]], end: float, limit: int) -> bool:
    """Read all descriptors to their end; False if `end` (monotonic seconds) came first."""
    open_fds = set(parts)
    sizes = dict.fromkeys(parts, 0)
    while open_fds:
        left = end - time.monotonic()
        if left <= 0:
            return False
        ready, _, _ = select.select(list(open_fds), [], [], left)
        for fd in ready:
            part = os.read(fd, 65536)
            if not part:
                open_fds.discard(fd)
            elif sizes[fd] < limit:
                parts[fd].append(part)
                sizes[fd] += len(part)
    return True
