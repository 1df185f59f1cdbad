"""Runs a credential helper: bounded in time and output, from a fixed PATH, its answer never logged.

Protocol: github.com/docker/docker-credential-helpers, `get`. Standard library only.
"""

from __future__ import annotations

import json
import os
import re
import signal
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
    """(exit code, output), the code None when time or room ran out. The whole process group is killed then."""
    import subprocess
    import tempfile

    with tempfile.TemporaryFile() as out:
        # a file as output: a helper that leaves a child behind cannot hold a pipe open
        with subprocess.Popen(
            [program, "get"],
            stdin=subprocess.PIPE,
            stdout=out,
            stderr=subprocess.DEVNULL,
            env=dict(env),
            cwd="/",
            start_new_session=True,
        ) as process:
            try:
                process.communicate(server.encode(), timeout=timeout)
            except subprocess.TimeoutExpired:
                pass
            finally:
                if process.poll() is None:
                    os.killpg(process.pid, signal.SIGKILL)
                    process.wait()
                    process.returncode = -9
        size = out.seek(0, os.SEEK_END)
        out.seek(0)
        if process.returncode == -9 or size > MAX_OUTPUT:
            return None, b""
        return process.returncode, out.read(MAX_OUTPUT)
