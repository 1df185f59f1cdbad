"""`clip-shim daemon --supervise`: a tiny parent that keeps the server's descriptors and starts it again when it dies.

Towards the server it is what systemd is: sd_notify(3) with a file descriptor store (fdstore.py), and sd_listen_fds(3).
Started by the wrapper it has no stderr: the log goes to RUN/daemon.log then.
"""

from __future__ import annotations

import os
import select
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

from shim.cache.ownership import is_corpse
from shim.daemon import notify
from shim.daemon.fdstore import FdStore, remove_socket

_READY_DELAYS = (0.01, 0.25)  # seconds before a server that did serve is started again: the second time, and at most
_DELAYS = (0.05, 5.0)  # the same for one that never served, and said why
_GOOD_RUN = 1.0  # seconds after which a crash is the first again: the successor is started at once
_LOOK_SECONDS = 1.0
_SETTLE_SECONDS = 0.02  # a dead server is reaped by then, or hangs
_WATCHDOG_SECONDS = 60.0
_LOG_MAX = 8 << 20  # bytes; an older log is kept as daemon.log.1
_LOG_NAME = "daemon.log"
_ENDING = {signal.SIGTERM, signal.SIGINT, signal.SIGHUP}
_RENEW = signal.SIGUSR2
_TRY_SECONDS = 20.0
_TRIAL = """
import pathlib, sys
import shim.daemon.supervise, shim.daemon.server, shim.settings
shim.settings.load(*map(pathlib.Path, sys.argv[1:]))
"""


def supervise(arguments: list[str], run_dir: Path) -> int:
    """Run `clip-shim daemon ARGUMENTS` until we are told to stop; returns its exit code. OSError: no `run_dir`.

    A server that ends, however, is started again, with the descriptors it left here. Not so one whose first start fails
    (exit code 1), or whose configuration is wrong (2) while nothing is mounted: it has said why, and trying for ever in
    the background would only be in the way of whoever mends that.
    """
    run_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
    return Supervisor(arguments, run_dir).run()


class Supervisor:
    """One thread. Signals: SIGTERM, SIGINT and SIGHUP end the server and us; SIGUSR2 ends the server and makes us start
    anew, from the program that is installed now: an upgrade, in which reads wait a moment.

    The successor of a killed server is started without waiting until that is reaped: a thread of it may hang in the
    kernel until somebody answers, and that is the successor. So whoever is dead but for that counts as ended
    (`is_corpse`); `witness.leave` is how we hear of it at once. Orphans of servers, jobs that die with them,
    become our children and are reaped here.
    """

    def __init__(self, arguments: list[str], run_dir: Path) -> None:
        self._arguments = arguments
        self._run_dir = run_dir
        self._log = _keep_log(run_dir)
        ready_fd = os.environ.pop("CLIP_SHIM_READY_FD", "")
        self._ready_fd = int(ready_fd) if ready_fd.isdigit() else -1
        if self._ready_fd >= 0:
            os.set_inheritable(self._ready_fd, False)
        self._again = os.environ.pop("CLIP_SHIM_RENEWED", "") == "1"
        self._store = FdStore(run_dir, notify.inherited())
        self._ending = False
        self._renewing = False
        self._wake, writer = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
        for number in (*_ENDING, _RENEW, signal.SIGCHLD):
            signal.signal(number, lambda *_: None)
        _adopt_orphans()

    def run(self) -> int:
        """See `supervise`."""
        first, delay = not self._again, 0.0
        while True:
            started = time.monotonic()
            try:
                pid = self._start()
            except OSError as error:  # no memory, or too many processes
                print(f"clip-shim: cannot start the server: {error}", file=sys.stderr, flush=True)  # noqa: T201
                code: int | None = None
            else:
                self._close_ready()
                code = self._wait(pid)
            self._close_ready()
            if self._renewing and not self._ending:
                self._renew()
            wrong = code == 2 and "blobs" not in self._store.fds  # else reads wait until somebody mends it
            if self._ending or wrong or (first and code == 1):
                return self._end(code)
            first = first and code is None and not self._store.ready  # it may have failed: the next one says
            killed = "blobs" in self._store.fds and (code is None or code < 0)  # while it took over: reads wait
            low, high = _READY_DELAYS if self._store.ready or killed else _DELAYS
            good = code == 0 or (self._store.ready and time.monotonic() - started > _GOOD_RUN)
            delay = 0.0 if good else min(max(delay * 2, low), high)
            if delay and self._pause(delay):
                return self._end(0)

    def _start(self) -> int:
        self._store.started()
        environ = {
            **os.environ,
            "NOTIFY_SOCKET": self._store.address,
            notify.SUPERVISOR: str(os.getpid()),
            "FDSTORE": "16",  # as systemd says it since version 254
            "WATCHDOG_USEC": str(int(_WATCHDOG_SECONDS * 1e6)),
        }
        pid = os.fork()
        if pid == 0:
            try:
                self._become_server(environ)
            except OSError as error:
                print(f"clip-shim: cannot start the server: {error}", file=sys.stderr, flush=True)  # noqa: T201
            finally:
                os._exit(127)
        return pid

    def _become_server(self, environ: dict[str, str]) -> None:
        for number in (*_ENDING, _RENEW, signal.SIGCHLD):
            signal.signal(number, signal.SIG_DFL)
        ready = self._ready_fd
        if ready >= 0:
            import fcntl

            ready = fcntl.fcntl(ready, fcntl.F_DUPFD, 64)  # out of the way of what is handed over; inheritable
            environ["CLIP_SHIM_READY_FD"] = str(ready)
        self._store.hand_over(environ)
        environ["WATCHDOG_PID"] = str(os.getpid())
        os.execve(sys.executable, [sys.executable, "-m", "shim", "daemon", *self._arguments], environ)  # noqa: S606

    def _wait(self, pid: int) -> int | None:
        """Wait for the server's end: its exit code (or -signal), None if it is dead but cannot be reaped yet."""
        poll = select.poll()
        poll.register(self._wake, select.POLLIN)
        poll.register(self._store.socket, select.POLLIN)
        told = killed = False
        witness, look = -1, _LOOK_SECONDS
        while True:
            events = poll.poll(look * 1000)
            if look < _LOOK_SECONDS:
                look = min(look * 2, _LOOK_SECONDS)
            if any(fd == witness for fd, _ in events):
                poll.unregister(witness)  # it stays readable
                look = _SETTLE_SECONDS
            self._read_signals()
            if (self._ending or self._renewing) and not told:
                told = True
                os.kill(pid, signal.SIGTERM)
            self._store.receive(pid)
            if witness < 0 and self._store.witness >= 0:
                witness = self._store.witness
                poll.register(witness, select.POLLIN)
            code = _reap(pid)
            if code is not None:
                self._store.receive(pid)
                return code
            if not events:
                self._trim()
                if is_corpse(pid):
                    self._store.receive(pid)
                    return None
                if not killed and time.monotonic() - self._store.last_ping > _WATCHDOG_SECONDS:
                    killed = True
                    print("clip-shim: the server hangs: killing it", file=sys.stderr, flush=True)  # noqa: T201
                    os.kill(pid, signal.SIGKILL)

    def _close_ready(self) -> None:
        """Whoever waits on the pipe hears its end when the server has said its word, or is dead: it is the server's."""
        if self._ready_fd >= 0:
            os.close(self._ready_fd)
            self._ready_fd = -1

    def _read_signals(self) -> None:
        try:
            numbers = os.read(self._wake, 256)
        except BlockingIOError:
            return
        self._ending |= any(number in numbers for number in _ENDING)
        self._renewing |= _RENEW in numbers and _can_start(self._arguments)

    def _pause(self, seconds: float) -> bool:
        """Wait; True if we are told to end meanwhile."""
        end = time.monotonic() + seconds
        while not self._ending and (left := end - time.monotonic()) > 0:
            select.select([self._wake], [], [], left)
            self._read_signals()
        return self._ending

    def _renew(self) -> None:
        """Become what is installed now."""
        self._renewing = False
        environ = {**os.environ, "CLIP_SHIM_RENEWED": "1"}
        self._store.close()
        self._store.hand_over(environ)
        command = [sys.executable, "-m", "shim", "daemon", "--supervise", *self._arguments]
        os.execve(sys.executable, command, environ)  # noqa: S606

    def _end(self, code: int | None) -> int:
        if "blobs" in self._store.fds:
            text = "containers still use layers: their uncached reads fail from now on"
            print(f"clip-shim: {text}", file=sys.stderr, flush=True)  # noqa: T201
        if "listener" in self._store.fds:
            remove_socket(self._run_dir / "control.sock")
        self._store.close()
        return 0 if code is None else code if code >= 0 else 128 - code

    def _trim(self) -> None:
        _trim(self._log)


def _can_start(arguments: list[str]) -> bool:
    """Whether what is installed now can be loaded, and the configuration be read. An upgrade may be half done, or want
    other settings, and with us go the descriptors."""
    command = [sys.executable, "-P", "-c", _TRIAL, *arguments[1:]]
    try:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, timeout=_TRY_SECONDS, check=False, text=True
        )
        said = (done.stderr.strip().rpartition("\n")[2] or f"it ends with {done.returncode}") if done.returncode else ""
    except (OSError, subprocess.TimeoutExpired) as error:
        said = str(error)
    if said:
        print(f"clip-shim: what is installed does not start, so this goes on: {said}", file=sys.stderr, flush=True)  # noqa: T201
    return not said


def _reap(server: int) -> int | None:
    """Reap every child that has ended; the server's exit code (or -signal) if it is among them."""
    found = None
    while True:
        try:
            pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return found
        if pid == 0:
            return found
        if pid == server:
            found = os.waitstatus_to_exitcode(status)


def _adopt_orphans() -> None:
    """prctl(2), PR_SET_CHILD_SUBREAPER: the jobs of a dead server are reaped here, whatever PID 1 is."""
    import ctypes

    ctypes.CDLL(None).prctl(36, 1, 0, 0, 0)


def _keep_log(run_dir: Path) -> Path | None:
    """If stderr leads nowhere, or to RUN/daemon.log already, let it lead there; returns that file's path then."""
    path = run_dir / _LOG_NAME
    there = os.fstat(2)
    try:
        if os.path.samestat(there, os.lstat(path)):
            return path
    except FileNotFoundError:
        pass
    if not os.path.samestat(there, os.stat(os.devnull)):
        return None
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
        shutil.copyfile(log, log.with_name(f"{_LOG_NAME}.1"), follow_symlinks=False)
    except OSError:
        pass  # no space for both: the old lines go
    os.ftruncate(2, 0)
