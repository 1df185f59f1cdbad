"""A container that reads all its files over and over, while the service is killed, restarted, stopped and upgraded.

What it reads is taken out of the kernel's and clip-shim's caches all the time. It must see no error and no wrong byte.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.boot.conftest import RUNTIME, pid
from tests.support import bundle
from tests.support.debianroot import NEXT, DebianRoot
from tests.support.host import wait_for

INDEX = "/var/lib/clip-shim/indexes/debian.clip"
READER = """
import hashlib, os, sys
def passes():
    total = hashlib.sha256()
    for directory, names, files in os.walk("/usr"):
        names.sort()
        for name in sorted(files):
            path = os.path.join(directory, name)
            if os.path.islink(path):
                continue
            with open(path, "rb", buffering=0) as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
                while piece := file.read(1 << 20):
                    total.update(piece)
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return total.hexdigest()
while True:
    try:
        print(passes(), flush=True)
    except OSError as error:
        print("ERROR", error, flush=True)
"""


@pytest.fixture(scope="module")
def output(machine: DebianRoot, pushed: Callable[[str], str]) -> Iterator[Path]:
    """What a container prints that reads all the time, one line a pass."""
    machine.run("clip-shim", "index", pushed("debian"), "-o", INDEX)
    place = machine.path / "srv/reader"
    bundle.make(place, ["python3", "-c", READER], index=INDEX)
    machine.run("sh", "-c", f"{RUNTIME} create --bundle /srv/reader reader >/srv/reader.out 2>&1")
    machine.run(RUNTIME, "start", "reader")
    printed = machine.path / "srv/reader.out"
    wait_for("one pass is done", lambda: printed.read_text().strip(), timeout=120)
    yield printed
    machine.run(RUNTIME, "delete", "--force", "reader")


def goes_on(output: Path) -> None:
    """Two more passes are done, and all had the same bytes."""
    done = len(output.read_text().splitlines())
    wait_for("two more passes", lambda: len(output.read_text().splitlines()) >= done + 2, timeout=180)
    lines = output.read_text().splitlines()
    assert set(lines) == {lines[0]}
    assert "ERROR" not in lines[0]


def drop(machine: DebianRoot) -> None:
    """Make the reads to come need the daemon: what it has cached is dropped, as far as it lies on disk."""
    machine.run("sh", "-c", "echo 3 >/proc/sys/vm/drop_caches")


def test_killed_again_and_again(machine: DebianRoot, output: Path) -> None:
    for _ in range(10):
        before = pid(machine)
        drop(machine)
        machine.run("kill", "-KILL", str(before))
        wait_for("another runs", lambda before=before: pid(machine) not in (0, before))
        time.sleep(0.3)  # some load on each
    goes_on(output)


def test_restarted(machine: DebianRoot, output: Path) -> None:
    for _ in range(5):
        drop(machine)
        begin = time.monotonic()
        machine.run("systemctl", "restart", "clip-shim.service")
        assert time.monotonic() - begin < 10  # nothing waits for what only a successor can answer
    goes_on(output)


def test_stopped_for_a_while(machine: DebianRoot, output: Path) -> None:
    """systemd 254 and later keep the descriptors over a stop (FileDescriptorStorePreserve=): the reads wait."""
    machine.run("systemctl", "stop", "clip-shim.service")
    drop(machine)
    time.sleep(2)
    machine.run("systemctl", "start", "clip-shim.service")
    goes_on(output)


def test_upgraded(machine: DebianRoot, output: Path, packages: Path) -> None:
    before = pid(machine)
    (deb,) = packages.glob(f"clip-shim_{NEXT}-*.deb")
    machine.run("dpkg", "-i", machine.offer(deb))
    wait_for("the new one runs", lambda: pid(machine) not in (0, before))
    goes_on(output)
    status = json.loads(machine.output("clip-shim", "status", "--json"))
    assert status["daemon"]["read_failures"] == 0
    assert [c["id"] for c in status["containers"]] == ["reader"]
