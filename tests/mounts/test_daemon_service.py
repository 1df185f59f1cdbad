"""What a service manager gives the daemon and asks of it: a socket that is there already, and signs of life."""

from __future__ import annotations

import signal
import socket
from collections.abc import Iterator

import pytest

from tests.support.daemonclient import Client
from tests.support.host import CLIP_SHIM, Host, wait_for


@pytest.fixture
def host() -> Iterator[Host]:
    with Host() as host:
        yield host


def test_a_socket_of_the_manager(host: Host) -> None:
    """systemd-socket-activate is systemd's own: the first connection starts the daemon, and is served by it."""
    path = host.run_dir / "control.sock"
    command = ["/usr/bin/systemd-socket-activate", "-l", path, "--fdname=control", "-E", "HOME=/root"]
    for name, value in host.clip_env.items():
        command += ["-E", f"{name}={value}"]
    child = host.start(*command, CLIP_SHIM, "daemon", log="daemon")
    wait_for("it listens", path.exists)
    inode = path.stat().st_ino
    with Client(host) as client:
        assert client.ask({"op": "ping"})["pid"] == child.pid
    assert host.status()["daemon"]["pid"] == child.pid
    child.send_signal(signal.SIGTERM)
    assert child.wait(30) == 0
    assert path.stat().st_ino == inode  # it is the manager's: who connects now waits for the next daemon


def test_signs_of_life(host: Host) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(host.base / "notify"))
        manager.settimeout(30)
        env = {"NOTIFY_SOCKET": str(host.base / "notify"), "WATCHDOG_USEC": "600000"}
        child = host.start(CLIP_SHIM, "daemon", log="daemon", env=env)
        said = [manager.recv(4096).decode()]
        while said.count("WATCHDOG=1") < 3:
            said.append(manager.recv(4096).decode())
        assert f"READY=1\nMAINPID={child.pid}" in said
        child.send_signal(signal.SIGTERM)
        assert child.wait(30) == 0
