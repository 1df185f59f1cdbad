"""Runs a credential helper: bounded in time and output, from a fixed PATH, its answer never logged.

Protocol: github.com/docker/docker-credential-helpers, `get`. Standard library only.
"""

from __future__ import annotations

import json
import os
import re
import select
import signal
import time
from collections.abc import Mapping

PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
TIMEOUT = 15.0  # seconds; a helper may ask a cloud's metadata service
MAX_OUTPUT = 64 << 10
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}\Z")


def run_helper(
    name: str, server: str, env: Mapping[str, str], *, path: str = PATH, timeout: float = TIMEOUT
) -> tuple[str, str, str]:
    """(user, secret, problem). No credentials for `server` is ("", "", ""); `problem` is one line without secrets."""
    if not _NAME.match(name):
        return "", "", "its name is not valid"
    program = next((p for d in path.split(":") if os.access(p := f"{d}/docker-credential-{name}", os.X_OK)), None)
    if program is None:
        return "", "", f"it is not installed in {path}"
    try:
        code, output = _run(program, server, {**env, "PATH": path, "HOME": env.get("HOME") or "/root"}, timeout)
    except OSError as error:
        return "", "", f"it cannot be run: {error.strerror}"
    if code is None:
        return "", "", f"it did not answer within {timeout:g} s, or its answer was too long"
    if code != 0:
        # the protocol's only fixed message; others are not repeated: they may hold anything
        missing = b"credentials not found" in output.lower()
        return "", "", "" if missing else f"it failed with exit code {code}"
    try:
        data = json.loads(output)
        username, secret = data["Username"], data["Secret"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return "", "", "its answer is not what the protocol says"
    if not isinstance(username, str) or not isinstance(secret, str):
        return "", "", "its answer is not what the protocol says"
    return username, secret, ""


def _run(program: str, server: str, env: Mapping[str, str], timeout: float) -> tuple[int | None, bytes]:
    """(exit code, output), the code None when time or room ran out. Its whole session's group is killed then."""
    import subprocess

    with subprocess.Popen(
        [program, "get"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env=dict(env),
        cwd="/",
        bufsize=0,
        start_new_session=True,
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            process.stdin.write(server.encode())  # far less than a pipe holds
            process.stdin.close()
        except BrokenPipeError:
            pass  # it does not read: its exit code says what it thinks
        output = _read(process.stdout.fileno(), process.pid, time.monotonic() + timeout)
        if output is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    return (None, b"") if output is None else (process.returncode, output)


def _read(fd: int, pid: int, deadline: float) -> bytes | None:
    """What comes from `fd` until `pid` has ended (a child it leaves behind may hold the pipe open), or None."""
    pidfd = os.pidfd_open(pid)
    try:
        os.set_blocking(fd, False)
        poll = select.poll()
        poll.register(fd, select.POLLIN)
        poll.register(pidfd, select.POLLIN)
        output = b""
        while (left := deadline - time.monotonic()) > 0:
            ready = {ready for ready, _ in poll.poll(left * 1000)}
            while fd in ready or pidfd in ready:
                try:
                    data = os.read(fd, 8192)
                except BlockingIOError:
                    break
                output += data
                if len(output) > MAX_OUTPUT:
                    return None
                if not data:
                    if fd in ready:
                        poll.unregister(fd)
                    break
            if pidfd in ready:
                return output
        return None
    finally:
        os.close(pidfd)
