"""The control socket: what a client may send, and what it is told when it sends something else."""

from __future__ import annotations

import json
import os
import resource
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from shim.daemon.control import ControlServer, Session
from shim.errors import DaemonError, TrustError
from shim.runtime import client
from tests.support.descriptors import descriptors


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
    before = descriptors()
    with connect(path) as client, open(file) as sent:
        socket.send_fds(client, [request("take")], [sent.fileno()])
        with client.makefile("rb") as lines:
            assert json.loads(lines.readline()) == {"ok": True, "read": ["hello"]}
        assert not released.is_set()  # held as long as the connection is open
    assert released.wait(10)
    assert descriptors() <= before


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


def test_a_path_may_be_longer_than_a_socket_address(tmp_path: Path) -> None:
    deep = tmp_path / ("d" * 100) / ("e" * 100)
    deep.mkdir(parents=True)
    server = ControlServer(deep / "control.sock", {})
    threading.Thread(target=server.serve, daemon=True).start()
    directory = os.open(deep, os.O_PATH)
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as client:
            client.settimeout(10)
            client.connect(f"/proc/self/fd/{directory}/control.sock")
            assert "unknown operation" in ask(client, request("x"))["error"]
        assert (deep / "control.sock").stat().st_mode & 0o777 == 0o600
    finally:
        os.close(directory)
        server.close()


def test_a_shortage_of_descriptors_passes(path: Path) -> None:
    """accept(2) fails while there are none: the server waits, and serves again."""
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    clients = [socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) for _ in range(3)]
    highest = max(int(name) for name in os.listdir("/proc/self/fd"))
    held = [os.open("/dev/null", os.O_RDONLY) for _ in range(highest)]  # no gap below the limit
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(held) + 1, limits[1]))
        for client in clients:
            client.settimeout(0.5)
            client.connect(str(path))
            client.sendall(request("take"))
        with pytest.raises(TimeoutError):  # the first was let in: an accept that waits has its descriptor already
            clients[1].recv(10)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
        for fd in held:
            os.close(fd)
    for client in clients:
        client.settimeout(10)
        assert b'"ok": true' in client.recv(1000)
        client.close()


def test_root_of_another_user_namespace_is_refused(path: Path) -> None:
    """Also where its uid 0 is ours."""
    code = (
        "import socket, sys; c = socket.socket(socket.AF_UNIX); c.settimeout(10); c.connect(sys.argv[1]);"
        "print(c.recv(1000).decode())"
    )
    command = ["unshare", "-U", "-r", sys.executable, "-c", code, str(path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    assert "only root may talk to the daemon" in done.stdout, done.stderr


def test_who_comes_when_the_queue_is_full_waits_for_room(tmp_path: Path) -> None:
    """All containers of a node may start while the daemon is replaced: nobody takes connections then."""
    with socket.socket(socket.AF_UNIX) as listener, ExitStack() as stack:
        listener.bind(str(tmp_path / "control.sock"))
        listener.listen(1)
        while True:
            waiting = stack.enter_context(socket.socket(socket.AF_UNIX))
            waiting.setblocking(False)
            try:
                waiting.connect(str(tmp_path / "control.sock"))
            except BlockingIOError:
                break
        started = time.monotonic()
        with pytest.raises(DaemonError, match="cannot be reached"):
            client.try_connect(str(tmp_path), started + 0.3)
        assert time.monotonic() - started >= 0.3
        successor = threading.Timer(0.1, lambda: stack.enter_context(listener.accept()[0]))
        successor.start()
        connection = client.try_connect(str(tmp_path), time.monotonic() + 30)
        assert connection is not None
        connection.close()
        successor.join()
