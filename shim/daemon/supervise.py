"""`clip-shim daemon --supervise`: a tiny parent that starts the server again when it dies.

Started by the wrapper it has no stderr: the log goes to RUN/daemon.log then. It forwards SIGTERM, and restarts at once
after a crash, then slower, so that a server that cannot start does not burn a core.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

_FIRST_DELAY = 0.05  # seconds before the second start; doubles up to _LAST_DELAY, resets after a good minute
_LAST_DELAY = 5.0
_GOOD_RUN = 60.0
_LOG_MAX = 8 << 20  # bytes; an older log is kept as daemon.log.1


def supervise(arguments: list[str], run_dir: Path) -> int:
    """Run `clip-shim daemon ARGUMENTS` until it ends by itself or we are told to stop; returns its exit code."""
    _keep_log(run_dir)
    command = [sys.executable, "-m", "shim", "daemon", *arguments]
    ready_fd = os.environ.get("CLIP_SHIM_READY_FD", "")
    passed = [int(ready_fd)] if ready_fd.isdigit() else []
    wanted = {signal.SIGTERM, signal.SIGINT, signal.SIGCHLD}
    signal.pthread_sigmask(signal.SIG_BLOCK, wanted)
    delay = _FIRST_DELAY
    while True:
        started = time.monotonic()
        child = subprocess.Popen(command, pass_fds=passed, preexec_fn=_unblock)  # noqa: PLW1509  one thread here
        for fd in passed:
            os.close(fd)
        passed = []
        os.environ.pop("CLIP_SHIM_READY_FD", None)
        stopping = False
        while child.poll() is None:
            if (number := signal.sigwait(wanted)) != signal.SIGCHLD:
                stopping = True
                child.send_signal(number)
        code = child.returncode
        if stopping or code in (0, 2):  # 2: the configuration is wrong; starting again does not mend it
            return max(code, 0)
        delay = _FIRST_DELAY if time.monotonic() - started > _GOOD_RUN else min(delay * 2, _LAST_DELAY)
        if signal.sigtimedwait({signal.SIGTERM, signal.SIGINT}, delay) is not None:
            return 0


def _keep_log(run_dir: Path) -> None:
    if not os.path.samestat(os.fstat(2), os.stat(os.devnull)):
        return
    run_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
    path = run_dir / "daemon.log"
    if path.exists() and path.stat().st_size > _LOG_MAX:
        path.rename(path.with_name("daemon.log.1"))
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
    os.dup2(fd, 2)
    os.close(fd)


def _unblock() -> None:
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM, signal.SIGINT, signal.SIGCHLD})
