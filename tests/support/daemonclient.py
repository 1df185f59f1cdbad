"""The control socket as a test speaks it: raw requests, descriptors, connections that are held or dropped."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

from tests.support.host import Host

Answer = dict[str, Any]


class Client:
    """One connection; leases that were acquired on it end with `close`."""

    def __init__(self, host: Host, timeout: float = 60.0) -> None:
        self._data = b""
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._socket.settimeout(timeout)
        self._socket.connect(str(host.run_dir / "control.sock"))

    def __enter__(self) -> Client:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        self._socket.close()

    def send(self, request: Answer, fds: Iterable[int] = ()) -> None:
        socket.send_fds(self._socket, [json.dumps({"v": 1, **request}).encode() + b"\n"], list(fds))

    def ask(self, request: Answer, fds: Iterable[int] = ()) -> Answer:
        self.send(request, fds)
        return self.receive()

    def receive(self) -> Answer:
        """The next line of the daemon."""
        while b"\n" not in self._data:
            piece = self._socket.recv(1 << 16)
            assert piece, "the daemon closed the connection"
            self._data += piece
        line, _, self._data = self._data.partition(b"\n")
        answer = json.loads(line)
        assert isinstance(answer, dict)
        return answer

    def acquire(self, index: Path | int, **more: Any) -> Answer:
        """Acquire the tree of an index file, given by path or as an open descriptor."""
        fd = os.open(index, os.O_RDONLY | os.O_NONBLOCK) if isinstance(index, Path) else index
        try:
            return self.ask({"op": "acquire", "source": "mount", "value": str(index), **more}, [fd])
        finally:
            if isinstance(index, Path):
                os.close(fd)

    def start_acquire(self, index: Path) -> None:
        """Ask, and do not wait."""
        fd = os.open(index, os.O_RDONLY)
        try:
            self.send({"op": "acquire", "source": "mount", "value": str(index)}, [fd])
        finally:
            os.close(fd)


def acquire(host: Host, index: Path | int, **more: Any) -> Answer:
    """Acquire on a connection of its own, closed at once."""
    with Client(host) as client:
        return client.acquire(index, **more)


def trees(host: Host) -> list[str]:
    """Mount points of trees."""
    return [point for _, point, _ in host.mounts() if point.startswith(f"{host.run_dir}/trees/")]


def log_lines(host: Host, event: str, log: str = "daemon") -> list[Answer]:
    """The daemon's log lines of one event."""
    found = []
    for line in (host.base / "log" / log).read_text().splitlines():
        with suppress(ValueError):
            item = json.loads(line)
            if item.get("event") == event:
                found.append(item)
    return found


def server_pid(host: Host) -> int:
    """The serving process, as it says itself."""
    with Client(host) as client:
        return int(client.ask({"op": "ping"})["pid"])


def descendants(pid: int) -> list[int]:
    """Processes below `pid`, however deep."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        with suppress(OSError, ValueError, IndexError):
            parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            children.setdefault(parent, []).append(int(entry.name))
    found, todo = [], [pid]
    while todo:
        below = children.get(todo.pop(), [])
        found += below
        todo += below
    return found


def is_running(pid: int) -> bool:
    """Whether a process runs; a zombie does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False
