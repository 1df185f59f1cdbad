"""`clip-shim daemon --supervise`: a tiny parent that starts the server again when it dies.

Started by the wrapper it has no stderr: the log goes to RUN/daemon.log then. It forwards SIGTERM, and restarts at once
after a crash, then slower, so that a server that cannot start does not burn a core.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

_FIRST_DELAY = 0.05  # seconds before the second start; doubles up to _LAST_DELAY, resets after a good minute
_LAST_DELAY = 5.0
_GOOD_RUN = 60.0
_LOG_MAX = 8 << 20  # bytes; an older log is kept as daemon.log.1
_LOG_SECONDS = 30.0
_ENDING = {signal.SIGTERM, signal.SIGINT, signal.SIGHUP}


def supervise(arguments: list[str], run_dir: Path) -> int:
    """Run `clip-shim daemon ARGUMENTS` until it ends by itself or we are told to stop; returns its exit code.

    A server whose first start fails (exit code 1 or 2) is not started again: it has said why, and trying for ever in
    the background would only be in the way of whoever mends that.
    """
    log = _keep_log(run_dir)
    command = [sys.executable, "-m", "shim", "daemon", *arguments]
    ready_fd = os.environ.pop("CLIP_SHIM_READY_FD", "")
    ready = int(ready_fd) if ready_fd.isdigit() else -1
    signal.pthread_sigmask(signal.SIG_BLOCK, _ENDING | {signal.SIGCHLD})
    delay, first = _FIRST_DELAY, True
    while True:
        started = time.monotonic()
        code, stopped = _run_once(command, ready, log)
        if stopped or code in (0, 2) or (first and code == 1):  # 2: a wrong configuration does not mend itself
            return code if code >= 0 else 128 - code
        ready, first = -1, False
        delay = _FIRST_DELAY if time.monotonic() - started > _GOOD_RUN else min(delay * 2, _LAST_DELAY)
        if signal.sigtimedwait(_ENDING, delay) is not None:
            return 0


def _run_once(command: list[str], ready: int, log: Path | None) -> tuple[int, bool]:
    """Start the server and wait for its end: (exit code, whether we were told to stop it). `ready` is closed."""
    passed = [ready] if ready >= 0 else []
    environ = {**os.environ, "CLIP_SHIM_READY_FD": str(ready)} if passed else None
    try:
        child = subprocess.Popen(command, pass_fds=passed, env=environ, preexec_fn=_unblock)  # noqa: PLW1509  one thread
    except OSError as error:  # no memory, or the installation is just being replaced
        print(f"clip-shim: cannot start the server: {error}", file=sys.stderr, flush=True)  # noqa: T201
        return -1, False
    finally:
        for fd in passed:
            os.close(fd)
    stopped = False
    while child.poll() is None:
        number = signal.sigtimedwait(_ENDING | {signal.SIGCHLD}, _LOG_SECONDS)
        if number is None:
            _trim(log)
        elif number.si_signo != signal.SIGCHLD:
            stopped = True
            child.send_signal(signal.SIGTERM)
    return child.returncode, stopped


def _keep_log(run_dir: Path) -> Path | None:
    """If stderr leads nowhere, let it lead to RUN/daemon.log; returns that file's path then."""
    if not os.path.samestat(os.fstat(2), os.stat(os.devnull)):
        return None
    run_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
    path = run_dir / "daemon.log"
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    os.dup2(fd, 2)
    os.close(fd)
    _trim(path)
    return path


def _trim(log: Path | None) -> None:
    """A log that is too long becomes daemon.log.1 and begins anew: RUN is memory. The server writes to the same open
    file, by O_APPEND, so it is copied and cut, not renamed; a line written between the two may be lost."""
    if log is None or os.fstat(2).st_size <= _LOG_MAX:
        return
    try:
        shutil.copyfile(log, log.with_name("daemon.log.1"), follow_symlinks=False)
    except OSError:
        pass  # no space for both: the old lines go
    os.ftruncate(2, 0)


def _unblock() -> None:
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _ENDING | {signal.SIGCHLD})
