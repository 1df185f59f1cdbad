"""Starts the daemon when none answers: by systemd where that runs this node, else as `clip-shim daemon --supervise`.

The daemon must outlive the container, the engine and us, and hold nothing of theirs: a pipe kept open would make
containerd wait for ever, a place in the engine's cgroup would end it with the engine. Only the mount namespace stays
the engine's, since its mounts have to be seen there.
"""

from __future__ import annotations

import fcntl
import os
import posix
import select
import time
from _signal import (  # type: ignore[import-not-found]  # not in typeshed
    ITIMER_REAL,
    SIG_DFL,
    SIG_IGN,
    SIG_SETMASK,
    SIGALRM,
    getsignal,
    pthread_sigmask,
    setitimer,
    signal,
)

from shim.errors import DaemonError, ShimError
from shim.runtime.client import Connection, try_connect
from shim.runtime.process import run

TYPE_CHECKING = False
if TYPE_CHECKING:
    from shim.runtime.config import Config

UNIT = "clip-shim.service"
_UNIT_DIRS = ("/etc/systemd/system", "/run/systemd/system", "/usr/lib/systemd/system", "/lib/systemd/system")
_READY_FD = 3
_SIGNALS = 64
_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
_DROPPED = (b"NOTIFY_SOCKET", b"LISTEN_", b"_OCI_", b"WATCHDOG_", b"INVOCATION_ID", b"JOURNAL_STREAM")
_LINE_MAX = 4096


def start(config: Config, environ: dict[bytes, bytes], end: float) -> Connection:
    """Start a daemon and connect to it before `end` (monotonic seconds). Raises DaemonError.

    Of several wrappers one starts it; the others wait for its lock and find it running.
    """
    _make_private(config.run_dir)
    lock = os.open(
        os.path.join(config.run_dir, "start.lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600
    )
    try:
        _lock(lock, end)
        connection = try_connect(config.run_dir, end)
        if connection is None:
            if _has_unit(environ):
                _start_unit(end)
            else:
                _start_embedded(config, environ, end)
            connection = try_connect(config.run_dir, end)
    finally:
        os.close(lock)
    if connection is None:
        raise DaemonError(
            f"the daemon was started, but does not listen at {config.run_dir}/control.sock",
            hint="its `run_dir` may be another one: see `clip-shim config show`",
        )
    return connection


def _make_private(path: str) -> None:
    try:
        os.makedirs(path, 0o700, exist_ok=True)
    except OSError as error:
        raise DaemonError(f"{path} cannot be made (errno {error.errno})") from error


def _lock(fd: int, end: float) -> None:
    """flock(2) with a deadline: an alarm breaks the wait."""

    def late(*_: object) -> None:
        raise DaemonError("another wrapper is starting the daemon and did not finish in time")

    old = signal(SIGALRM, late)
    try:
        setitimer(ITIMER_REAL, max(end - time.monotonic(), 0.001))
        fcntl.flock(fd, fcntl.LOCK_EX)
    finally:
        setitimer(ITIMER_REAL, 0)
        signal(SIGALRM, old if old is not None else SIG_DFL)


def _has_unit(environ: dict[bytes, bytes]) -> bool:
    """Whether systemd should start it: it is PID 1, has the unit, and its mount namespace is ours."""
    if any(name in environ for name in (b"CLIP_SHIM_RUN_DIR", b"CLIP_SHIM_STATE_DIR", b"CLIP_SHIM_CONFIG")):
        return False  # the unit would not know of it
    if not os.path.isdir("/run/systemd/system"):
        return False
    if not any(os.path.exists(os.path.join(directory, UNIT)) for directory in _UNIT_DIRS):
        return False
    try:
        return os.readlink("/proc/1/ns/mnt") == os.readlink("/proc/self/ns/mnt")
    except OSError:
        return False


def _start_unit(end: float) -> None:
    systemctl = next((path for path in ("/usr/bin/systemctl", "/bin/systemctl") if os.path.exists(path)), "systemctl")
    hint = f"see `systemctl status {UNIT}` and `journalctl -u {UNIT}`"
    try:
        code, _, errors = run([systemctl, "start", UNIT], {"PATH": _PATH}, max(end - time.monotonic(), 0.1), 65536)
    except ShimError as error:
        raise DaemonError(f"the daemon did not start: {error}", hint=hint) from error
    if code:
        raise DaemonError(f"systemd could not start {UNIT}: {errors.decode('utf-8', 'replace').strip()}", hint=hint)


def _start_embedded(config: Config, environ: dict[bytes, bytes], end: float) -> None:
    read_end, write_end = os.pipe2(os.O_CLOEXEC)
    child = posix.fork()
    if child == 0:
        try:
            posix.setsid()
            if posix.fork() == 0:
                _become_daemon(config, environ, write_end)
        finally:
            posix._exit(0)
    os.close(write_end)
    os.waitpid(child, 0)
    try:
        text = _read_line(read_end, end)
    finally:
        os.close(read_end)
    if text != "READY":
        reason = text.removeprefix("ERROR").strip() if text else "it ended without a word"
        raise DaemonError(f"the daemon did not start: {reason}", hint="run `clip-shim daemon` by hand to see why")


def _read_line(fd: int, end: float) -> str:
    data = b""
    while b"\n" not in data and len(data) < _LINE_MAX:
        left = end - time.monotonic()
        if left <= 0 or not select.select([fd], [], [], left)[0]:
            raise DaemonError("the daemon did not become ready in time", hint="raise `mount_deadline`")
        part = os.read(fd, _LINE_MAX)
        if not part:
            break
        data += part
    return data.split(b"\n")[0].decode("utf-8", "replace")


def _become_daemon(config: Config, environ: dict[bytes, bytes], ready: int) -> None:
    """In the grandchild: shed all that is the engine's, then execve. Never returns."""
    command = [*config.daemon, "daemon", "--supervise"]
    try:
        _leave_cgroup()
        _set_oom_score()
        for number in range(1, _SIGNALS + 1):
            try:
                if getsignal(number) in (SIG_IGN, None):
                    signal(number, SIG_DFL)
            except (OSError, ValueError):
                continue  # SIGKILL, SIGSTOP and what libc keeps for itself
        pthread_sigmask(SIG_SETMASK, ())
        os.chdir("/")
        os.umask(0o022)
        ready = fcntl.fcntl(ready, fcntl.F_DUPFD_CLOEXEC, _READY_FD + 1)  # out of the way of 0 to 3
        null = fcntl.fcntl(os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC), fcntl.F_DUPFD_CLOEXEC, _READY_FD + 1)
        for number in range(3):
            os.dup2(null, number)
        os.dup2(ready, _READY_FD)
        os.closerange(_READY_FD + 1, 1 << 30)
        posix.execve(command[0], command, daemon_environ(config, environ))
    except OSError as error:
        text = f"ERROR {command[0]} cannot be executed (errno {error.errno})\n"
        for number in (_READY_FD, ready):
            try:
                os.write(number, text.encode("utf-8", "replace"))
                break
            except OSError:
                continue
    finally:
        posix._exit(1)


def daemon_environ(config: Config, environ: dict[bytes, bytes]) -> dict[bytes, bytes]:
    """The environment of a daemon that is started from here: the engine's (it has the proxies), without what belongs to
    the engine's own service."""
    clean = {name: value for name, value in environ.items() if not name.startswith(_DROPPED)}
    clean.setdefault(b"PATH", _PATH.encode())
    clean.setdefault(b"HOME", b"/root")
    clean |= {name.encode(): value.encode("utf-8", "surrogateescape") for name, value in config.environ.items()}
    clean[b"CLIP_SHIM_READY_FD"] = str(_READY_FD).encode()
    return clean


def _set_oom_score() -> None:
    """What the engine set for its containers is not the daemon's."""
    try:
        with open("/proc/self/oom_score_adj", "wb", buffering=0) as file:
            file.write(b"0")
    except OSError:
        pass


def _leave_cgroup() -> None:
    """Go where PID 1 is, in every hierarchy (cgroups(7)); what does not work here is left as it is."""
    try:
        with open("/proc/1/cgroup", "rb") as file:
            lines = file.read().decode("utf-8", "surrogateescape").splitlines()
    except OSError:
        return
    for line in lines:
        number, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if number == "0" and not controllers:
            places = ["/sys/fs/cgroup", "/sys/fs/cgroup/unified"]
        else:
            places = [f"/sys/fs/cgroup/{controllers.removeprefix('name=')}"]
        for place in places:
            try:
                with open(f"{place}{path.rstrip('/')}/cgroup.procs", "wb", buffering=0) as file:
                    file.write(str(os.getpid()).encode())
            except OSError:
                continue
