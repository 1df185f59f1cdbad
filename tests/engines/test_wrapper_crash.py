"""The wrapper is killed between any two steps, power is lost, a runtime forgets its container: all of it is put right
by a retry, by the engine's own unmount, or by the sweep."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from shim.daemon.mounter import sweep_containers
from shim.mount import syscalls
from shim.runtime.cleanup import sweep
from shim.runtime.config import Config, load
from shim.runtime.records import Record, start_time
from tests.support.wrapperbox import Box

# at which system call SIGKILL comes, and the how-manieth of its kind (strace does not count the first execve)
STEPS = [("sendmsg", 1), ("fsopen", 1), ("fsmount", 1), ("umount2", 1), ("move_mount", 1), ("fsync", 1), ("execve", 1)]
STEPS += [("mkdir", 1), ("rename", 1), ("rename", 2), ("fsconfig", 1)]


@pytest.fixture
def box(tmp_path: Path) -> Iterator[Box]:
    made = Box(tmp_path)
    yield made
    made.close()


def settings(box: Box) -> Config:
    return load(str(box.launcher.with_name("clip-shim-runtime.json")), {})


def killed(box: Box, place: Path, call: str, number: int, log: Path) -> bool:
    """Run the wrapper and kill it when it enters that system call. False if it never did."""
    inject = f"inject={call}:signal=KILL:when={number}"
    line = ["strace", "-qq", "-o", str(log), "-e", f"trace={call}", "-e", inject, str(box.launcher)]
    done = subprocess.run(
        [*line, "--root", str(box.root), "run", "--bundle", str(place), "c"], check=False, capture_output=True
    )
    return done.returncode in (-signal.SIGKILL, 128 + signal.SIGKILL)


@pytest.mark.parametrize(("call", "number"), STEPS)
def test_killed_in_place(box: Box, call: str, number: int) -> None:
    thin = box.layer("thin", {"t": "thin "})
    place = box.bundle("b", "cat /t /data/file; cat /kept 2>/dev/null || true; echo kept > /kept")
    upper = box.overlay(place, thin)
    (upper / "kept").write_text(" before")
    assert killed(box, place, call, number, box.directory / "trace")
    if not box.source(place):
        box.overlay(place, thin)  # the engine finds its rootfs unmounted and mounts it
    assert box.run(place).stdout == "thin of the image before"
    assert box.mounts() == [str(place / "rootfs")]
    syscalls.umount2(place / "rootfs")
    assert box.mounts() == []
    sweep(settings(box))
    assert box.leftovers() == []


@pytest.mark.parametrize(("call", "number"), [step for step in STEPS if step[0] != "umount2"])
def test_killed_beside(box: Box, call: str, number: int) -> None:
    place = box.bundle("b", "cat /data/file; cat /made 2>/dev/null || true; echo made > /made")
    assert killed(box, place, call, number, box.directory / "trace")
    assert box.run(place).stdout == "of the image"
    assert box.mounts() == []
    assert box.leftovers() == []
    assert box.spec(place)["root"]["path"] in ("rootfs", str(place / "rootfs"))
    assert box.run(place).stdout == "of the image"


@pytest.mark.parametrize(("call", "number"), STEPS)
def test_killed_and_swept(box: Box, call: str, number: int) -> None:
    """Nobody tries again."""
    place = box.bundle("b", ":")
    before = (place / "config.json").read_bytes()
    if not killed(box, place, call, number, box.directory / "trace"):
        assert call == "umount2"  # nothing to unmount here
    sweep(settings(box))
    assert box.mounts() == []
    assert box.leftovers() == []
    if call != "fsync":  # then a temporary file is left in the bundle, and nothing else
        assert (place / "config.json").read_bytes() == before
    assert sweep(settings(box)) == []


def test_runtime_that_forgot_its_container(box: Box) -> None:
    place = box.bundle("b", "while :; do sleep 0.05; done")
    before = (place / "config.json").read_bytes()
    assert box.create(place).returncode == 0
    pid = int((place / "pid").read_text())
    assert sweep(settings(box)) == []  # it lives
    assert len(box.mounts()) == 1
    os.kill(pid, signal.SIGKILL)
    subprocess.run(["tail", f"--pid={pid}", "-f", "/dev/null"], check=False)
    shutil.rmtree(box.root / "c")
    assert len(sweep_containers(str(box.run_dir), str(box.state_dir))) == 1  # as the daemon does it
    assert box.mounts() == []
    assert box.leftovers() == []
    assert (place / "config.json").read_bytes() == before


def test_overlay_in_place_is_swept_after_the_engine_unmounted_it(box: Box) -> None:
    place = box.bundle("b", ":")
    box.overlay(place, box.layer("thin"))
    assert box.run(place).returncode == 0
    assert sweep(settings(box)) == []  # the engine may start it again
    syscalls.umount2(place / "rootfs")
    assert len(sweep(settings(box))) == 1
    assert box.leftovers() == []


def test_uppers_from_before_a_reboot(box: Box) -> None:
    """RUN is on tmpfs: after a reboot there is no record."""
    place = box.bundle("b", ":")
    assert box.create(place).returncode == 0
    box.call("delete", "--force", "c")
    for top in ("containers", "kept"):
        (box.state_dir / top / "0123456789abcdef" / "x" / "upper").mkdir(parents=True)
        (box.state_dir / top / "0123456789abcdef" / "x" / "upper" / "file").write_text("x")
    (box.state_dir / "trash" / "half").mkdir(parents=True, exist_ok=True)
    sweep(settings(box))
    assert box.leftovers() == []
    assert not (box.state_dir / "trash" / "half").exists()
    assert (box.state_dir / "kept" / "0123456789abcdef" / "x" / "upper" / "file").exists()


def test_sweep_leaves_a_container_in_the_making(box: Box) -> None:
    record = Record(settings(box), str(box.root), "c")
    os.makedirs(record.directory, 0o700)
    Path(record.directory, "owner").write_text(f"1 {start_time(1)} t")
    assert sweep(settings(box)) == []
    Path(record.directory, "owner").write_text(f"1 {start_time(1) + 1} t")  # another process had that number
    assert sweep(settings(box)) == [record.directory]


def test_damaged_record_counts_as_none(box: Box) -> None:
    place = box.bundle("b", "cat /data/file")
    box.overlay(place, box.layer("thin"))
    assert box.run(place).returncode == 0
    (state,) = (box.run_dir / "containers").glob("*/c/state.json")
    for text in ("", "{", "[]", '{"version": 99}', '{"version": 1, "kind": "in-place", "lowers": 7}'):
        state.write_text(text)
        box.configure(place, ["/bin/cat", "/data/file"])
        assert box.run(place).stdout == "of the image", text
        assert box.mounts() == [str(place / "rootfs")]
