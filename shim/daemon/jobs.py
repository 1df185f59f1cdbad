"""Work that the serving process must not do itself, run in short-lived processes with a deadline.

Two reasons. (1) CPU-bound Python (index decode, EROFS build) would take the GIL from the threads that answer reads.
(2) A thread inside mount(2) or stat(2) of a path that this very server answers for cannot be killed until somebody
answers: a process that dies with such a thread stays unreaped. A job that passes its deadline is killed and left to the
fork server.

Jobs are forked by multiprocessing's fork server, which has the needed modules imported: about 15 ms a job. The fork
server ends when the server does, also by SIGKILL, but not before its jobs. So a thread in each job watches the server:
no job of a dead daemon goes on beside those of its successor.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable
from contextlib import suppress
from multiprocessing import forkserver  # type: ignore[attr-defined,unused-ignore]
from multiprocessing.connection import Connection
from typing import Any, Generic, ParamSpec, TypeVar

from shim.errors import DaemonError, ShimError

P = ParamSpec("P")
R = TypeVar("R")

_context = multiprocessing.get_context("forkserver")


def start() -> None:
    """Start the fork server now (it imports the job modules in the background)."""
    _context.set_forkserver_preload(["shim.daemon.prepare", "shim.daemon.mounter", "shim.daemon.naming"])
    forkserver.ensure_running()


def run(deadline: float, func: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
    """Call `func` (a module-level function) in a process of its own; give its result or raise its ShimError.

    Raises DaemonError when it passes `deadline` (seconds; it is killed) or dies without an answer.
    """
    ours, theirs = _context.Pipe(duplex=False)
    name = func.__name__.replace("_", " ")
    process = _context.Process(target=_child, args=(theirs, func, args, kwargs), daemon=True)
    try:
        process.start()
    except (OSError, EOFError) as error:
        ours.close()
        raise DaemonError(f"{name} cannot be started: {error}", hint="memory, processes or files ran out") from error
    finally:
        theirs.close()
    try:
        if not ours.poll(deadline):
            raise DaemonError(f"{name} took longer than {deadline:.3g} s and was stopped", hint=SLOW)
        kind, value = ours.recv()
    except (EOFError, OSError):
        process.join(1)
        raise DaemonError(f"{name} died unexpectedly (exit status {process.exitcode})") from None
    finally:
        ours.close()
        if process.is_alive():
            process.join(0.2)
            process.kill()
        process.join(1)
        if not process.is_alive():
            process.close()  # its descriptors, whoever keeps this frame in a traceback
    if kind == "error":
        raise value
    result: R = value
    return result


class Beside(Generic[R]):
    """A call in a thread of its own while the caller does something else, `result` or `wait` at the end."""

    def __init__(self, func: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> None:
        self._answer: list[R] = []
        self._error: list[BaseException] = []

        def work() -> None:
            try:
                self._answer.append(func(*args, **kwargs))
            except BaseException as error:  # noqa: BLE001  raised by `result`
                self._error.append(error)

        self._thread = threading.Thread(target=work, name="beside", daemon=True)
        self._thread.start()

    def wait(self) -> None:
        self._thread.join()

    def result(self) -> R:
        """What the call gave, or its error raised."""
        self.wait()
        if self._error:
            raise self._error[0]
        return self._answer[0]


SLOW = "the registry or the disk is slow: see `clip-shim status --waiting`, or raise `mount_deadline`"


def _end_with_server() -> None:
    server = multiprocessing.parent_process()
    if server is not None:
        server.join()
    os._exit(1)


def _be_ended_first() -> None:
    """When memory runs out, the kernel is to end a job rather than a container: the service manager protects the daemon
    (OOMScoreAdjust=), not what it computes."""
    with suppress(OSError), open("/proc/self/oom_score_adj", "r+") as file:
        if int(file.read()) < 0:
            file.seek(0)
            file.write("0")


def _child(answer: Connection, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    threading.Thread(target=_end_with_server, name="watch", daemon=True).start()
    _be_ended_first()
    gc.disable()  # short-lived, and a tree of 100,000 nodes is no garbage: a sixth of the time
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    try:
        result: tuple[str, Any] = ("ok", func(*args, **kwargs))
    except ShimError as error:
        result = ("error", error)
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        result = ("error", DaemonError(f"{func.__name__.replace('_', ' ')}: {where}{error.strerror or error}"))
    except Exception as error:  # noqa: BLE001  the process ends here: its last word is the error
        import traceback

        trace = "".join(traceback.format_exception(error)[-3:])
        result = ("error", DaemonError(f"{func.__name__.replace('_', ' ')} failed: {error!r}", hint=trace))
    answer.send(result)
    answer.close()
    os._exit(0)  # nobody has to wait until a tree of 100,000 nodes is taken apart
