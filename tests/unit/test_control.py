"""The control socket: what a client may send, and what it is told when it sends something else."""

from __future__ import annotations

import json
import os
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from shim.daemon.control import ControlServer, Session
from shim.errors import TrustError


@pytest.fixture
def released() -> threading.Event:
    return threading.Event()


@pytest.fixture
def path(tmp_path: Path, released: threading.Event) -> Iterator[Path]:
    def take(session: Session, _request: dict[str, Any], fds: list[int]) -> dict[str, Any]:
        session.on_close.append(released.set)
        return {"read": [os.pread(fd, 100, 0).decode() for fd in fds]}

    def refuse(_session: Session, _request: dict[str, Any], _fds: list[int]) -> dict[str, Any]:
        raise TrustError("not there", hint="look elsewhere")

    def broken(_session: Session, _request: dict[str, Any], _fds: list[int]) -> dict[str, Any]:
        raise KeyError("oops")

    server = ControlServer(tmp_path / "control.sock", {"take": take, "refuse": refuse, "broken": broken})
    thread = threading.Thread(target=server.serve, daemon=True)
    thread.start()
    yield tmp_path / "control.sock"
    server.close()
    thread.join(10)
    assert not thread.is_alive()
    assert not (tmp_path / "control.sock").exists()


def connect(path: Path) -> socket.socket:
    client = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    client.settimeout(10)
    client.connect(str(path))
    return client


def ask(client: socket.socket, data: bytes) -> dict[str, Any]:
    client.sendall(data)
    with client.makefile("rb") as lines:
        answer = json.loads(lines.readline())
    assert isinstance(answer, dict)
    return answer


def request(op: str) -> bytes:
    return json.dumps({"v": 1, "op": op}).encode() + b"\n"


def test_descriptor_and_lease(path: Path, tmp_path: Path, released: threading.Event) -> None:
    file = tmp_path / "index.clip"
    file.write_text("hello")
    before = len(os.listdir("/proc/self/fd"))
    with connect(path) as client, open(file) as sent:
        socket.send_fds(client, [request("take")], [sent.fileno()])
        with client.makefile("rb") as lines:
            assert json.loads(lines.readline()) == {"ok": True, "read": ["hello"]}
        assert not released.is_set()  # held as long as the connection is open
    assert released.wait(10)
    assert len(os.listdir("/proc/self/fd")) == before


def test_only_root_reaches_it(path: Path) -> None:
    assert path.stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize(
    ("data", "kind", "error"),
    [
        (request("refuse"), "TrustError", "not there"),
        (request("broken"), "DaemonError", "internal error: KeyError"),
        (request("no-such"), "DaemonError", "unknown operation 'no-such'"),
        (b"\n", "DaemonError", "the request is not valid"),
        (b"\xff\xfe{\n", "DaemonError", "the request is not valid"),
        (b"[]\n", "DaemonError", "not of protocol version 1"),
        (b'{"v": 2, "op": "take"}\n', "DaemonError", "not of protocol version 1"),
        (b"[" * 60000 + b"\n", "DaemonError", "the request is not valid"),
        (b"x" * 70000, "DaemonError", "the request is too long"),
    ],
)
def test_bad_requests_get_an_answer_and_change_nothing(path: Path, data: bytes, kind: str, error: str) -> None:
    with connect(path) as client:
        answer = ask(client, data)
        assert answer["ok"] is False
        assert answer["kind"] == kind
        assert error in answer["error"]
    with connect(path) as client:
        assert ask(client, request("take"))["ok"] is True


def test_several_requests_on_one_connection(path: Path) -> None:
    with connect(path) as client:
        assert ask(client, request("refuse"))["hint"] == "look elsewhere"
        assert ask(client, request("take"))["ok"] is True
