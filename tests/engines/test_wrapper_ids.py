"""Live IDs, creates that overlap, and many at once."""

from __future__ import annotations

import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.wrapperbox import Box


@pytest.fixture
def box(tmp_path: Path) -> Iterator[Box]:
    made = Box(tmp_path)
    yield made
    made.close()
    assert made.mounts() == []


@pytest.mark.parametrize("kind", ["overlay", "plain"])
def test_second_create_of_a_live_id(box: Box, kind: str) -> None:
    place = box.bundle("b", "while :; do sleep 0.05; done")
    if kind == "overlay":
        box.overlay(place, box.layer("thin"))
    assert box.create(place).returncode == 0
    assert box.call("start", "c").returncode == 0
    mounts = box.mounts()
    second = box.bundle("second", ":")
    done = box.call("create", "--bundle", second, "c")
    assert done.returncode == 1
    assert "exist" in done.stderr
    assert "clip-shim" not in done.stderr
    assert box.mounts() == mounts
    assert box.call("exec", "c", "/bin/cat", "/data/file").stdout == "of the image"
    assert len(box.daemon.requests) == 1


def test_second_run_of_a_live_id(box: Box) -> None:
    """A container in the foreground: its runtime is the process that made it, and lives."""
    place = box.bundle("b", ": > /ready; while :; do sleep 0.05; done")
    box.containers.append("c")
    first = subprocess.Popen([str(box.launcher), "--root", str(box.root), "run", "--bundle", str(place), "c"])
    while box.call("exec", "c", "/bin/test", "-e", "/ready").returncode:
        assert first.poll() is None
    done = box.call("run", "--bundle", box.bundle("second", ":"), "c")
    assert done.returncode == 1
    assert "clip-shim" not in done.stderr
    assert box.call("exec", "c", "/bin/cat", "/data/file").stdout == "of the image"
    box.call("kill", "c", "KILL")
    assert first.wait(20) == 137
    assert box.mounts() == []
    assert box.leftovers() == []


def test_second_create_while_the_first_waits(box: Box) -> None:
    """Two creates of one ID: the one that comes while the other still waits for its tree is refused."""
    reached, go = threading.Event(), threading.Event()
    answer = box.daemon.answer
    assert isinstance(answer, dict)

    def wait(_: dict[str, Any]) -> dict[str, Any]:
        reached.set()
        go.wait(20)
        return answer

    box.daemon.answer = wait
    place = box.bundle("b", "while :; do sleep 0.05; done")
    first: list[subprocess.CompletedProcess[str]] = []
    thread = threading.Thread(target=lambda: first.append(box.create(place)))
    thread.start()
    assert reached.wait(20)
    done = box.call("create", "--bundle", box.bundle("second", ":"), "c")
    assert done.returncode == 1
    assert "is being created by another process" in done.stderr
    go.set()
    thread.join()
    assert first[0].returncode == 0
    assert box.call("start", "c").returncode == 0
    assert box.call("exec", "c", "/bin/true").returncode == 0


def test_killed_wrapper_can_be_followed_by_another(box: Box) -> None:
    reached = threading.Event()
    answer = box.daemon.answer
    box.daemon.answer = lambda _: reached.set() or threading.Event().wait(20) or {}  # type: ignore[func-returns-value]
    place = box.bundle("b", "cat /data/file")
    line = [str(box.launcher), "--root", str(box.root), "run", "--bundle", str(place), "c"]
    first = subprocess.Popen(line)
    assert reached.wait(20)
    first.kill()
    first.wait()
    box.daemon.answer = answer
    assert box.run(place).stdout == "of the image"
    assert box.leftovers() == []


def test_ten_at_once(box: Box) -> None:
    places = [box.bundle(f"b{n}", f"cat /data/file; echo {n} > /n; cat /n") for n in range(10)]
    thin = box.layer("thin")
    for place in places[:5]:
        box.overlay(place, thin)
    done: dict[int, subprocess.CompletedProcess[str]] = {}
    threads = [
        threading.Thread(target=lambda n=n: done.update({n: box.run(places[n], f"c{n}")}))  # type: ignore[misc]
        for n in range(10)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for n in range(10):
        assert done[n].stdout == f"of the image{n}\n", done[n]
    assert len(box.mounts()) == 5
    assert not box.log.exists() or box.log.read_text() == ""
