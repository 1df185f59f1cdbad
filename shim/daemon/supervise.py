"""`clip-shim daemon --supervise`: a tiny parent that starts the server again when it dies.

It is what systemd is elsewhere: it gives the server NOTIFY_SOCKET, forwards SIGTERM, and restarts at once after a crash,
then slower, so that a server that cannot start does not burn a core.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

_FIRST_DELAY = 0.05  # seconds before the second start; doubles up to _LAST_DELAY, resets after a good minute
_LAST_DELAY = 5.0
_GOOD_RUN = 60.0


def supervise(arguments: list[str]) -> int:
    """Run `clip-shim daemon ARGUMENTS` until it ends by itself (exit 0) or we are told to stop; returns the exit code."""
    command = [sys.executable, "-m", "shim", "daemon", *arguments]
    ready_fd = os.environ.get("CLIP_SHIM_READY_FD", "")
    passed = [int(ready_fd)] if ready_fd.isdigit() else []
    stopping = False
    child: subprocess.Popen[bytes] | None = None

    def stop(signum: int, _frame: object) -> None:
        nonlocal stopping
        stopping = True
        if child is not None:
            child.send_signal(signum)

    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, stop)
    delay = _FIRST_DELAY
    while True:
        started = time.monotonic()
        child = subprocess.Popen(command, pass_fds=passed)
        for fd in passed:
            os.close(fd)
        passed = []
        os.environ.pop("CLIP_SHIM_READY_FD", None)
        code = child.wait()
        if stopping or code == 0 or code == 2:  # 2: the configuration is wrong; starting again does not mend it
            return max(code, 0)
        delay = _FIRST_DELAY if time.monotonic() - started > _GOOD_RUN else min(delay * 2, _LAST_DELAY)
        time.sleep(delay)
