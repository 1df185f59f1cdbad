"""Where the wrapper's errors go: the places in which each engine looks for runc's (RUNTIME: containerd reads --log,
CRI-O and podman read standard error, docker shows what containerd read)."""

from __future__ import annotations

import os
import posix
import time

from shim.runtime.jsontext import encode

TYPE_CHECKING = False
if TYPE_CHECKING:
    from shim.errors import ShimError
    from shim.runtime.argv import Invocation

_MAX = 4000  # one line of a log, one page of a pipe
# dockerd and podman map these texts to the exit codes 126 and 127 of a bad entrypoint (moby daemon/errors.go)
_MISREAD = (
    ("no such file or directory", "ENOENT"),
    ("permission denied", "EACCES"),
    ("not a directory", "ENOTDIR"),
    ("executable file not found", "no executable"),
    ("operation not permitted", "EPERM"),
)


def message_of(error: ShimError) -> str:
    """One line: what is wrong and the hint, without words that engines would read as something else."""
    text = " ".join(f"clip-shim: {error}; hint: {error.hint}".split())
    for words, name in _MISREAD:
        at = text.lower().find(words)
        while at >= 0:
            text = text[:at] + name + text[at + len(words) :]
            at = text.lower().find(words)
    return text if len(text) <= _MAX else text[: _MAX - 1] + "…"


def report(error: ShimError, invocation: Invocation) -> None:
    """Append to runc's --log as runc does, and say the same on standard error. Never raises."""
    text = message_of(error)
    now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    if invocation.log_format == "json":
        line = encode({"level": "error", "msg": text, "time": now})
    else:
        line = f'time="{now}" level=error msg={encode(text)}'
    path = invocation.log.removeprefix("file:")  # crun's way to say it; its journald: and syslog: have no file
    if path and not path.startswith(("journald:", "syslog:")):
        _append(path, line + "\n")
    _stderr(text + "\n")


def _append(path: str, line: str) -> None:
    try:
        fd = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NONBLOCK, 0o644)
    except OSError:
        return  # standard error still gets it
    try:
        os.write(fd, line.encode("utf-8", "replace"))
    except OSError:
        pass
    finally:
        os.close(fd)


def _stderr(line: str) -> None:
    try:
        if not posix.get_inheritable(2):  # closed when we were started: 2 is a descriptor of our own
            return
        posix.write(2, line.encode("utf-8", "replace"))
    except OSError:
        pass
