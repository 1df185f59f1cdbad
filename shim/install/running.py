"""Engines that run: found by their processes, since each has its own idea of where sockets and configurations lie."""

from __future__ import annotations

import http.client
import json
import os
import socket
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

from shim.errors import InstallError

_MAX_ANSWER = 32 << 20
_SECONDS = 10.0


@dataclass(frozen=True, slots=True)
class Process:
    """A running program. executable: its file, in its own root; words: its command line; started: seconds since the
    epoch."""

    pid: int
    executable: str
    words: list[str]
    started: float

    def options(self, *names: str) -> list[str]:
        """The values of a flag, in order: `--flag value`, `--flag=value`; one dash or two."""
        found = []
        for number, word in enumerate(self.words):
            name, equals, value = word.partition("=")
            if name.lstrip("-") in names and name.startswith("-"):
                if equals:
                    found.append(value)
                elif number + 1 < len(self.words):
                    found.append(self.words[number + 1])
        return found

    def option(self, default: str, *names: str) -> str:
        return next(reversed(self.options(*names)), default)

    @property
    def root(self) -> Path:
        """Its root directory, as seen from here: an engine may run in a mount namespace of its own."""
        if mount_namespace(self.pid) == mount_namespace(os.getpid()):
            return Path("/")
        return Path(f"/proc/{self.pid}/root")

    def path(self, path: str) -> Path:
        """A path of the process, from here."""
        return self.root / path.lstrip("/")


def mount_namespace(pid: int) -> str:
    """Its name, "" if the process is gone or not ours to look at."""
    try:
        return os.readlink(f"/proc/{pid}/ns/mnt")
    except OSError:
        return ""


def find(program: str) -> list[Process]:
    """Root's processes (and our own user's) that execute `program` (a file name), oldest first. Not their threads and
    forks. Anybody may call a program of theirs dockerd, with flags and sockets as they like."""
    found = []
    owners = {0, os.geteuid()}
    for name in os.listdir("/proc"):
        if not name.isdigit():
            continue
        try:
            executable = os.readlink(f"/proc/{name}/exe").removesuffix(" (deleted)")
            if os.path.basename(executable) != program or not _users(int(name)) <= owners:
                continue
            data = Path(f"/proc/{name}/cmdline").read_bytes()
            words = [os.fsdecode(word) for word in data.rstrip(b"\0").split(b"\0")]
            found.append(Process(int(name), executable, words, started(int(name))))
        except (OSError, ValueError, IndexError):
            continue  # it ended, or is not ours to look at
    return sorted(found, key=lambda process: process.pid)


def _users(pid: int) -> set[int]:
    """Whose a process is: the real, effective and saved user ids, as our user namespace has them. OSError."""
    text = Path(f"/proc/{pid}/status").read_bytes().split(b"\nUid:", 1)[1]
    return {int(number) for number in text.split(b"\n", 1)[0].split()}


def started(pid: int) -> float:
    """When a process was started, in seconds since the epoch, to some hundredths (proc_pid_stat(5), field 22). OSError,
    ValueError."""
    ticks = int(Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()[19])
    up = float(Path("/proc/uptime").read_text().split()[0])  # not btime of /proc/stat, which has whole seconds
    return time.time() - up + ticks / os.sysconf("SC_CLK_TCK")


def output(command: list[str], seconds: float) -> str | None:
    """What a program prints; None if it fails, is not there or takes longer."""
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, errors="replace", timeout=seconds, check=False,
            stdin=subprocess.DEVNULL,
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode == 0 else None


class _UnixConnection(http.client.HTTPConnection):
    def __init__(self, path: Path) -> None:
        super().__init__("localhost", timeout=_SECONDS)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(_SECONDS)
        directory = os.open(self._path.parent, os.O_PATH | os.O_DIRECTORY)
        try:
            self.sock.connect(f"/proc/self/fd/{directory}/{self._path.name}")  # a name may have 107 bytes only
        finally:
            os.close(directory)


def get(path: Path, url: str) -> bytes:
    """GET over a unix socket, the body of a 200. Raises InstallError."""
    connection = _UnixConnection(path)
    try:
        connection.request("GET", url)
        response = connection.getresponse()
        body = response.read(_MAX_ANSWER)
    except (OSError, http.client.HTTPException) as error:
        raise InstallError(f"{path} does not answer: {error}") from error
    finally:
        connection.close()
    if response.status != 200:
        raise InstallError(f"{path} answers {response.status} to {url}")
    return body


def get_json(path: Path, *parts: str, query: str = "") -> Any:
    """GET of a JSON document. Raises InstallError."""
    url = "/" + "/".join(quote(part, safe="") for part in parts) + query
    try:
        return json.loads(get(path, url))
    except (ValueError, RecursionError) as error:
        raise InstallError(f"{path} answers no JSON to {url}") from error
