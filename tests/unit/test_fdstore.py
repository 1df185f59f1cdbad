"""The supervisor's descriptor store: what a server sends, who may send, and what the next one is given."""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from shim.daemon import notify
from shim.daemon.fdstore import MAX_FDS, FdStore
from tests.support.descriptors import descriptors


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FdStore]:
    made = FdStore(tmp_path, {})
    monkeypatch.setenv("NOTIFY_SOCKET", made.address)
    monkeypatch.delenv("FDSTORE", raising=False)
    yield made
    for fd in made.fds.values():
        os.close(fd)
    made.close()


def pipe_holding(text: bytes) -> int:
    reader, writer = os.pipe()
    os.write(writer, text)
    os.close(writer)
    return reader


def test_store_replace_and_remove(store: FdStore) -> None:
    for text in (b"old", b"new"):
        fd = pipe_holding(text)
        assert notify.store("blobs", fd)
        os.close(fd)
    store.receive(os.getpid())
    assert os.read(store.fds["blobs"], 10) == b"new"
    assert not os.get_inheritable(store.fds["blobs"])
    notify.unstore("other")
    notify.unstore("blobs")
    store.receive(os.getpid())
    assert store.fds == {}


def test_ready_and_pings(store: FdStore) -> None:
    store.started()
    assert not store.ready
    notify.ready()
    store.receive(os.getpid())
    assert store.ready
    before = store.last_ping
    notify.notify("WATCHDOG=1")
    store.receive(os.getpid())
    assert store.last_ping > before


def test_others_are_not_heard(store: FdStore) -> None:
    before = descriptors()
    fd = pipe_holding(b"x")
    notify.store("blobs", fd)
    notify.notify("READY=1")
    os.close(fd)
    store.receive(os.getpid() + 1)
    assert store.fds == {}
    assert not store.ready
    assert descriptors() <= before


@pytest.mark.parametrize("text", ["", "FDSTORE=1", "FDSTORE=1\nFDNAME=a:b", "=\n\n==", "FDSTOREREMOVE=1", "\udcff"])
def test_nonsense_is_harmless(store: FdStore, text: str) -> None:
    import socket

    before = descriptors()
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.connect(store.address)
        sock.sendall(text.encode("utf-8", "surrogateescape"))
    store.receive(os.getpid())
    assert store.fds == {}
    assert descriptors() <= before


def test_the_store_has_an_end(store: FdStore) -> None:
    fd = pipe_holding(b"x")
    for number in range(MAX_FDS + 3):
        notify.store(f"n{number}", fd)
        store.receive(os.getpid())
    os.close(fd)
    assert len(store.fds) == MAX_FDS


def test_the_next_one_gets_them_by_name(store: FdStore, tmp_path: Path) -> None:
    for name in ("one", "two"):
        fd = pipe_holding(name.encode())
        notify.store(name, fd)
        os.close(fd)
    store.receive(os.getpid())
    script = (
        "import json, os\nfrom shim.daemon import notify\nfound = notify.inherited()\n"
        "print(json.dumps({n: os.read(fds[0], 10).decode() for n, fds in found.items()}))\n"
        "print(json.dumps([notify.inherited(), [k for k in os.environ if k.startswith('LISTEN')]]))"
    )
    out = tmp_path / "out"
    pid = os.fork()
    if pid == 0:
        try:
            environ = dict(os.environ)
            store.hand_over(environ)
            os.dup2(os.open(out, os.O_WRONLY | os.O_CREAT), 1)
            os.execve(sys.executable, [sys.executable, "-c", script], environ)
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    first, second = out.read_text().splitlines()
    assert json.loads(first) == {"one": "one", "two": "two"}
    assert json.loads(second) == [{}, []]


def test_what_is_meant_for_another_process_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LISTEN_PID", "1")
    monkeypatch.setenv("LISTEN_FDS", "1")
    assert notify.inherited() == {}


def test_sockets_of_dead_supervisors_are_removed(tmp_path: Path) -> None:
    done = subprocess.run(["sh", "-c", "echo $$"], capture_output=True, text=True, check=True)
    dead, alive = tmp_path / f"notify-{done.stdout.strip()}.sock", tmp_path / "notify-1.sock"
    for path in (dead, alive):
        path.touch()
    FdStore(tmp_path, {}).close()
    assert not dead.exists()
    assert alive.exists()


def test_a_witness_dies_with_its_process(store: FdStore) -> None:
    code = (
        "import os, sys; from shim.daemon import notify, witness; "
        "os.environ[notify.SUPERVISOR] = str(os.getppid()); witness.leave(); "
        "sys.stdout.write('left\\n'); sys.stdout.flush(); sys.stdin.read()"
    )
    child = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    assert child.stdout.readline() == "left\n"
    store.receive(child.pid)
    poll = select.poll()
    poll.register(store.witness, select.POLLIN)
    assert poll.poll(0) == []
    assert not os.get_inheritable(store.witness)
    child.kill()
    assert poll.poll(10_000)
    child.wait(10)
    store.started()
    assert store.witness == -1
    assert store.fds == {}
