"""What systemd hears when a daemon dies: of one with a thread that hangs in the kernel, from the process beside it."""

from __future__ import annotations

import os
import select
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from shim.cache.ownership import is_corpse
from tests.support.host import wait_for
from tests.support.silentmount import silent

_SERVER = """
import os, sys, threading
from shim.daemon import witness
kept = os.memfd_create("kept")
witness.leave()
if len(sys.argv) > 1:
    threading.Thread(target=os.stat, args=(sys.argv[1],), daemon=True).start()
print("left", flush=True)
sys.stdin.read()
"""


@pytest.mark.parametrize("failing", ["first fork", "second fork", "SIGCHLD ignored"])
def test_a_server_starts_without_a_watcher(tmp_path: Path, failing: str) -> None:
    """Processes ran out, or whoever started us ignores its children: a late notice is better than no daemon."""
    code = f"""
import errno, os, signal
real, calls = os.fork, []
def fork():
    calls.append(1)
    if {failing!r} == "first fork" or {failing!r} == "second fork" and os.getpid() != server:
        raise OSError(errno.EAGAIN, "no processes")
    return real()
server, os.fork = os.getpid(), fork
if {failing!r} == "SIGCHLD ignored":
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
from shim.daemon import witness
before = set(os.listdir("/proc/self/fd"))
witness.leave()
assert calls and set(os.listdir("/proc/self/fd")) == before
print("left")
"""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.bind(str(tmp_path / "notify"))
        environ = {name: value for name, value in os.environ.items() if name != "CLIP_SHIM_SUPERVISOR"}
        environ["NOTIFY_SOCKET"] = str(tmp_path / "notify")
        done = subprocess.run([sys.executable, "-c", code], env=environ, capture_output=True, text=True, timeout=20)
    assert done.stdout == "left\n", done.stderr


@pytest.fixture
def manager(tmp_path: Path) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.bind(str(tmp_path / "notify"))
        sock.settimeout(10)
        yield sock


def serve(manager: socket.socket, *arguments: Path) -> subprocess.Popen[str]:
    environ = {name: value for name, value in os.environ.items() if name != "CLIP_SHIM_SUPERVISOR"}
    child = subprocess.Popen(
        [sys.executable, "-c", _SERVER, *map(str, arguments)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**environ, "NOTIFY_SOCKET": manager.getsockname()},
        text=True,
    )
    assert child.stdout is not None
    assert child.stdout.readline() == "left\n"
    wait_for("its watcher runs", lambda: watchers(manager))
    return child


def watchers(manager: socket.socket) -> list[int]:
    found = []
    for place in Path("/proc").glob("[0-9]*"):
        try:
            ours = os.fsencode(f"NOTIFY_SOCKET={manager.getsockname()}\0") in (place / "environ").read_bytes()
            if ours and (place / "comm").read_text() == "clip-watcher\n":
                found.append(int(place.name))
        except OSError:
            continue  # it has ended
    return found


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGABRT])
def test_the_end_of_the_dead_is_told(manager: socket.socket, tmp_path: Path, how: signal.Signals) -> None:
    with silent(tmp_path / "silent"):
        child = serve(manager, tmp_path / "silent/file")
        (watcher,) = watchers(manager)
        child.send_signal(how)
        assert manager.recv(100).decode() == f"MAINPID={watcher}"
        assert is_corpse(child.pid)
        data, (barrier,), _, _ = socket.recv_fds(manager, 100, 1)
        assert data == b"BARRIER=1"
        assert watchers(manager) == [watcher]  # until it is known as the main process
        os.close(barrier)
        wait_for("it ends", lambda: not watchers(manager))
        assert child.poll() is None
    assert child.wait(10) == -how


def test_whose_end_can_be_seen_is_not_spoken_for(manager: socket.socket) -> None:
    child = serve(manager)
    (watcher,) = watchers(manager)
    links = [os.readlink(path) for path in Path(f"/proc/{watcher}/fd").iterdir()]
    assert not [link for link in links if "kept" in link]
    child.kill()
    child.wait(10)
    wait_for("it ends", lambda: not watchers(manager))
    assert not select.select([manager], [], [], 0)[0]
