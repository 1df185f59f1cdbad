"""The wrapper starts the daemon when none answers: once, detached from all that is the engine's, and says why if not.

The daemon here is a small program that writes down how it was started and then serves a directory as tree.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.wrapperbox import Box

PROGRAM = """#!{python}
import json, os, signal, sys
sys.path.insert(0, {package!r})
fds = {{n: os.readlink("/proc/self/fd/" + n) for n in sorted(os.listdir("/proc/self/fd"), key=int)[:-1]}}
status = dict(line.split(":", 1) for line in open("/proc/self/status").read().splitlines())
facts = {{"pid": os.getpid(), "args": sys.argv[1:], "environ": dict(os.environ), "fds": fds, "cwd": os.getcwd(),
         "session": os.getsid(0), "sigblk": int(status["SigBlk"], 16), "cgroup": open("/proc/self/cgroup").read(),
         "oom": open("/proc/self/oom_score_adj").read().strip(), "umask": status["Umask"].strip()}}
with open({facts!r} + "/" + str(os.getpid()), "w") as file:
    json.dump(facts, file)
ready = int(os.environ["CLIP_SHIM_READY_FD"])
{middle}
from pathlib import Path
from tests.support.fakedaemon import FakeDaemon
daemon = FakeDaemon(Path(os.environ["CLIP_SHIM_RUN_DIR"]), Path({tree!r}))
os.write(ready, b"READY\\n")
os.close(ready)
while True:
    signal.pause()
"""


class Starting:
    """A box whose daemon is not running but can be started."""

    def __init__(self, box: Box) -> None:
        self.box = box
        self.facts_dir = box.directory / "facts"
        self.facts_dir.mkdir()
        self.program = box.directory / "daemon"
        settings = box.launcher.with_name("clip-shim-runtime.json")
        compiled = json.loads(settings.read_text())
        compiled["daemon_command"] = [str(self.program)]
        settings.write_text(json.dumps(compiled))
        box.daemon.close()

    def write(self, middle: str = "") -> None:
        text = PROGRAM.format(
            python=sys.executable,
            package=str(Path(__file__).parents[2]),
            facts=str(self.facts_dir),
            tree=str(self.box.tree),
            middle=middle,
        )
        self.program.write_text(text)
        self.program.chmod(0o755)

    def facts(self) -> list[dict[str, Any]]:
        return [json.loads(path.read_text()) for path in self.facts_dir.iterdir()]


@pytest.fixture
def starting(tmp_path: Path) -> Iterator[Starting]:
    box = Box(tmp_path)
    made = Starting(box)
    yield made
    for pid in (int(path.name) for path in made.facts_dir.iterdir()):
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue
    box.close()


def test_started_free_of_the_engine(starting: Starting) -> None:
    starting.write()
    box = starting.box
    place = box.bundle("b", "cat /data/file")
    environ = os.environ | {"NOTIFY_SOCKET": "/n", "LISTEN_FDS": "1", "_OCI_LOGPIPE": "9", "HTTPS_PROXY": "http://p"}

    def engine() -> None:
        os.umask(0o077)
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
        Path("/proc/self/oom_score_adj").write_text("500")

    with (box.directory / "leaked").open("w") as leaked:
        done = box.run(place, env=environ, preexec_fn=engine, pass_fds=[leaked.fileno()], cwd=box.directory)
    assert done.stdout == "of the image", done.stderr
    (facts,) = starting.facts()
    assert facts["args"] == ["daemon", "--supervise"]
    assert {facts["fds"][n] for n in "012"} == {"/dev/null"}
    assert set(facts["fds"]) == {"0", "1", "2", "3"}
    assert facts["environ"]["CLIP_SHIM_READY_FD"] == "3"
    assert facts["environ"]["CLIP_SHIM_RUN_DIR"] == str(box.run_dir)
    assert facts["environ"]["CLIP_SHIM_STATE_DIR"] == str(box.state_dir)
    assert facts["environ"]["HTTPS_PROXY"] == "http://p"
    assert not {"NOTIFY_SOCKET", "LISTEN_FDS", "_OCI_LOGPIPE"} & set(facts["environ"])
    assert (facts["cwd"], facts["umask"], facts["oom"], facts["sigblk"]) == ("/", "0022", "0", 0)
    assert facts["session"] not in (os.getsid(0), facts["pid"])  # of the process between, which is gone
    assert not Path(f"/proc/{facts['session']}").exists()
    # the places that PID 1 has; each line is "number:controllers:path"
    assert facts["cgroup"] == Path("/proc/1/cgroup").read_text()
    # the next one finds it running
    assert box.run(place).stdout == "of the image"
    assert len(starting.facts()) == 1


def test_ten_wrappers_start_one(starting: Starting) -> None:
    starting.write("import time; time.sleep(0.5)  # slow to start, so that all ten come meanwhile")
    box = starting.box
    places = [box.bundle(f"b{n}", "cat /data/file") for n in range(10)]
    done: dict[int, subprocess.CompletedProcess[str]] = {}
    threads = [
        threading.Thread(target=lambda n=n: done.update({n: box.run(places[n], f"c{n}")}))  # type: ignore[misc]
        for n in range(10)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [done[n].stdout for n in range(10)] == ["of the image"] * 10, done
    assert len(starting.facts()) == 1


@pytest.mark.parametrize(
    ("middle", "text"),
    [
        ("os.write(ready, b'ERROR state_dir is full\\n'); sys.exit(1)", "did not start: state_dir is full"),
        ("sys.exit(1)", "it ended without a word"),
        ("os.write(ready, b'READY\\n'); sys.exit(0)", "does not listen at"),
        ("signal.pause()", "did not become ready in time"),
    ],
)
def test_daemon_that_does_not_come_up(starting: Starting, middle: str, text: str) -> None:
    starting.write(middle)
    box = starting.box
    place = box.bundle("b", ":")
    begin = time.monotonic()
    done = box.run(place, env=os.environ | {"CLIP_SHIM_MOUNT_DEADLINE": "1500ms"})
    assert time.monotonic() - begin < 15
    assert done.returncode == 1
    assert text in done.stderr
    assert box.mounts() == []
    assert box.leftovers() == []
    # the lock is free: a good one starts
    starting.write()
    assert box.run(place).returncode == 0


def test_daemon_program_that_is_missing(starting: Starting) -> None:
    done = starting.box.run(starting.box.bundle("b", ":"))
    assert done.returncode == 1
    assert "cannot be executed (errno 2)" in done.stderr


def test_waiter_gives_up_in_time(starting: Starting) -> None:
    """Another wrapper holds the start lock and hangs."""
    import fcntl

    starting.write()
    box = starting.box
    with (box.run_dir / "start.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        done = box.run(box.bundle("b", ":"), env=os.environ | {"CLIP_SHIM_MOUNT_DEADLINE": "500ms"})
    assert done.returncode == 1
    assert "another wrapper is starting the daemon" in done.stderr
    assert starting.facts() == []
