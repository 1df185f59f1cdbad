"""Creates that fail: one message where engines read it, and everything as it was before."""

from __future__ import annotations

import json
import os
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from shim.mount import syscalls
from tests.support.fakedaemon import DIGEST
from tests.support.wrapperbox import Box


@pytest.fixture
def box(tmp_path: Path) -> Iterator[Box]:
    made = Box(tmp_path)
    yield made
    made.close()
    assert made.mounts() == []


def errors(box: Box) -> list[dict[str, str]]:
    """The error entries of runc's log, as containerd reads them."""
    if not box.log.exists():
        return []
    entries = [json.loads(line) for line in box.log.read_text().splitlines()]
    return [entry for entry in entries if entry["level"] == "error"]


def failure(box: Box, done: subprocess.CompletedProcess[str], text: str) -> str:
    """Check that a create failed as engines want it, and give its message."""
    assert done.returncode == 1
    (entry,) = errors(box)
    assert set(entry) == {"level", "msg", "time"}
    assert len(entry["time"]) == 20
    assert text in entry["msg"]
    for misread in ("no such file or directory", "permission denied", "not a directory"):
        assert misread not in entry["msg"].lower()
    assert box.leftovers() == []
    return entry["msg"]


@pytest.mark.parametrize("kind", ["overlay", "plain"])
@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"ok": False, "kind": "TrustError", "error": "registry evil.test is not trusted", "hint": "no."}, "evil.test"),
        ({"ok": False, "kind": "os.system", "error": "Permission denied: /x"}, "EACCES: /x"),
        ({"tree": "/no/such/tree"}, "cannot be opened: ENOENT"),
        ({"tree": "relative"}, "names no tree"),
        ({"index": "sha256:../../x"}, "names no tree"),
        ({"symlinks": {"lib64": {"target": "usr/lib64", "resolves": True}}}, "/lib64 is not the symlink to usr/lib64"),
        ({"symlinks": {"bin": {"target": "", "resolves": True}}}, "empty symlink /bin"),
        ({"symlinks": {"../x": {"target": "y", "resolves": True}}}, "makes no sense"),
        ({"symlinks": {"vmlinuz": {"target": "boot/gone", "resolves": True}}}, "leads nowhere"),
        ({"dirs": ["proc", "dev", "sys"], "tree": "EMPTY"}, "another mount namespace"),
    ],
)
def test_failure_undoes_everything(box: Box, change: dict[str, Any], text: str, kind: str) -> None:
    assert isinstance(box.daemon.answer, dict)
    box.daemon.answer |= change
    if change.get("tree") == "EMPTY":
        box.daemon.answer["tree"] = str(box.layer("empty"))
    place = box.bundle("b", ":")
    if kind == "overlay":
        box.overlay(place, box.layer("thin", {"t": "thin"}))
    before = (place / "config.json").read_bytes()
    mounts = box.mounts()
    done = box.run(place)
    message = failure(box, done, text)
    assert done.stderr == message + "\n"
    assert done.stdout == ""
    assert (place / "config.json").read_bytes() == before
    assert box.mounts() == mounts
    assert not list((box.run_dir / "containers").glob("*/c"))
    # what was wrong is put right: the same create works
    box.daemon.answer = {**box.daemon.answer, "ok": True, "tree": str(box.tree), "index": DIGEST, "symlinks": {}}
    assert box.run(place).returncode == 0


@pytest.mark.parametrize("answer", [b"", b"nonsense\n", b"[]\n", b'{"ok": true}\n', b'{"ok": true'])
def test_daemon_that_answers_nonsense(box: Box, answer: bytes) -> None:
    box.daemon.answer = answer
    os.environ["CLIP_SHIM_MOUNT_DEADLINE"] = "500ms"
    try:
        done = box.run(box.bundle("b", ":"))
    finally:
        del os.environ["CLIP_SHIM_MOUNT_DEADLINE"]
    failure(box, done, "the daemon")


def test_daemon_that_is_not_there_and_does_not_start(box: Box) -> None:
    box.daemon.close()
    failure(box, box.run(box.bundle("b", ":")), "the daemon did not start")


def test_failed_runtime_leaves_nothing_beside(box: Box) -> None:
    place = box.bundle("b", ":")
    box.configure(place, ["/no/such/program"])
    before = (place / "config.json").read_bytes()
    assert box.run(place).returncode == 1
    assert box.mounts() == []
    assert box.leftovers() == []
    assert (place / "config.json").read_bytes() == before


def test_failed_runtime_leaves_the_engine_one_mount(box: Box) -> None:
    """In place there is no hook: the engine unmounts its rootfs after a failed create, and that is all there is."""
    place = box.bundle("b", ":")
    box.overlay(place, box.layer("thin"))
    box.configure(place, ["/no/such/program"])
    assert box.run(place).returncode == 1
    assert box.mounts() == [str(place / "rootfs")]
    box.configure(place, ["/bin/true"])
    assert box.run(place).returncode == 0  # a retry finds ours and uses it
    syscalls.umount2(place / "rootfs")
    assert box.mounts() == []


def test_user_namespace_is_refused(box: Box) -> None:
    place = box.bundle("b", ":")
    spec = box.spec(place)
    spec["linux"]["uidMappings"] = [{"containerID": 0, "hostID": 100000, "size": 65536}]
    (place / "config.json").write_text(json.dumps(spec))
    failure(box, box.run(place), "user namespace")
    assert box.daemon.requests == []


def test_mount_below_the_rootfs_is_refused(box: Box) -> None:
    place = box.bundle("b", ":")
    box.overlay(place, box.layer("thin", {"sub/file": "x"}))
    syscalls.mount("tmpfs", place / "rootfs" / "sub", "tmpfs")
    failure(box, box.run(place), "something is mounted below")


def test_kill_switch(box: Box) -> None:
    (box.directory / "etc").mkdir()
    (box.directory / "etc" / "disabled").write_text("registry moves on Friday\n")
    failure(box, box.run(box.bundle("b", ":")), "registry moves on Friday")
    assert box.daemon.requests == []
    plain = box.bundle("plain", "echo plain", annotations={})
    box.overlay(plain, box.tree)
    assert box.run(plain, "p").stdout == "plain\n"


def test_wrong_configuration_fails_lazy_containers_only(box: Box) -> None:
    (box.directory / "etc").mkdir()
    (box.directory / "etc" / "c.yaml").write_text("run_dri: /x\n")
    failure(box, box.run(box.bundle("b", ":")), "unknown key `run_dri`")
    plain = box.bundle("plain", "echo plain", annotations={})
    box.overlay(plain, box.tree)
    assert box.run(plain, "p").stdout == "plain\n"


@pytest.mark.parametrize("kind", ["overlay", "plain"])
def test_runtime_that_cannot_be_executed(box: Box, kind: str) -> None:
    """The last step fails: everything is ready, and nothing takes it."""
    place = box.bundle("b", ":")
    if kind == "overlay":
        box.overlay(place, box.layer("thin"))
    before = (place / "config.json").read_bytes()
    failure(box, box.run(place, env={"CLIP_SHIM_RUNTIMES": "/no/such/runc"}), "no low-level runtime can be executed")
    assert (place / "config.json").read_bytes() == before
    assert box.mounts() == []  # the engine's overlay had gone before


def test_log_keeps_what_stands_in_it(box: Box) -> None:
    old = '{"level":"warning","msg":"older","time":"2026-01-01T00:00:00Z"}\n'
    box.log.write_text(old)
    assert isinstance(box.daemon.answer, dict)
    box.daemon.answer["tree"] = "/no/such/tree"
    failure(box, box.run(box.bundle("b", ":")), "ENOENT")
    assert box.log.read_text().startswith(old)


def test_log_in_text_form(box: Box) -> None:
    assert isinstance(box.daemon.answer, dict)
    box.daemon.answer["tree"] = "/no/such/tree"
    place = box.bundle("b", ":")
    line = [str(box.launcher), "--root", str(box.root), "--log", str(box.log), "create", "--bundle", str(place), "c"]
    assert subprocess.run(line, capture_output=True, check=False).returncode == 1
    (entry,) = box.log.read_text().splitlines()
    assert re.fullmatch(r'time="\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ" level=error msg="clip-shim: the tree .*"', entry)


def test_log_that_cannot_be_written(box: Box) -> None:
    box.log = box.directory / "no" / "such" / "log"
    assert isinstance(box.daemon.answer, dict)
    box.daemon.answer["tree"] = "/no/such/tree"
    done = box.run(box.bundle("b", ":"))
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
