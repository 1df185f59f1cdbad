"""Tries a thing in a child process with a mount namespace of its own: nobody sees what it mounts, and it goes with it.

The child is killed when its time is over, so a kernel that hangs does not hang the doctor.
"""

from __future__ import annotations

import ctypes
import json
import os
import select
import shutil
import signal
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from shim.errors import MountError, ShimError
from shim.mount import syscalls

_CLONE_NEWNS = 0x00020000  # sched.h
_ANSWER_MAX = 1 << 20


def attempt(function: Callable[[Path], Any], base: Path, seconds: float = 20) -> Any:
    """`function(work)` in such a child; its result, a JSON value. work: a new directory below `base`, removed after.

    Raises MountError: what the function raised (ShimError, OSError), or that it took too long or died.
    """
    try:
        work = Path(tempfile.mkdtemp(prefix=".clip-doctor-", dir=base))
    except OSError as error:
        raise MountError(f"nothing can be written in {base}: {error.strerror}") from error
    try:
        reader, writer = os.pipe2(os.O_CLOEXEC)
        pid = os.fork()
        if pid == 0:
            os.close(reader)
            _child(function, work, writer)
        os.close(writer)
        try:
            said = _read(reader, time.monotonic() + seconds)
        finally:
            os.close(reader)
            _end(pid)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    if said is None:
        raise MountError(f"it took longer than {seconds:g} s", hint="the kernel or the disk hangs: see dmesg")
    try:
        answer = json.loads(said)
    except ValueError:
        raise MountError("the trial died without an answer") from None
    if "error" in answer:
        raise MountError(answer["error"], hint=answer["hint"])
    return answer["value"]


def _child(function: Callable[[Path], Any], work: Path, writer: int) -> None:
    answer: dict[str, Any]
    try:
        os.setsid()
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.unshare(_CLONE_NEWNS):
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()) + " (a mount namespace of its own)")
        syscalls.mount(None, "/", None, syscalls.MS_REC | syscalls.MS_PRIVATE)
        answer = {"value": function(work)}
    except ShimError as error:
        answer = {"error": str(error), "hint": error.hint}
    except OSError as error:
        answer = {"error": error.strerror or str(error), "hint": ""}
    except BaseException as error:  # noqa: BLE001  nothing of the parent's code may run on in the child
        answer = {"error": f"{type(error).__name__}: {error}", "hint": ""}
    try:
        os.write(writer, json.dumps(answer).encode()[:_ANSWER_MAX])
    finally:
        os.kill(0, signal.SIGKILL)  # with all that the function started: it leads a session of its own
        os._exit(0)


def _read(fd: int, end: float) -> bytes | None:
    data = b""
    while len(data) < _ANSWER_MAX:
        left = end - time.monotonic()
        if left <= 0 or not select.select([fd], [], [], left)[0]:
            return None
        part = os.read(fd, 65536)
        if not part:
            break
        data += part
    return data


def _end(pid: int) -> None:
    """Kill the child and all of its session. One that hangs in the kernel cannot be waited for."""
    try:
        os.killpg(pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    until = time.monotonic() + 2
    while os.waitpid(pid, os.WNOHANG)[0] == 0 and time.monotonic() < until:
        time.sleep(0.005)
