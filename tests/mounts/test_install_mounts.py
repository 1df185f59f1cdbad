"""`install` where an engine's file cannot be replaced: read-only, or a mount by itself as a container has it."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from shim.cli.main import main

PATH = "/usr/bin/true"
BEFORE = '{"debug": true}\n'


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    (tmp_path / "config.yaml").write_text("{}\n")
    monkeypatch.setenv("CLIP_SHIM_CONFIG", str(tmp_path / "config.yaml"))
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    made = tmp_path / "etc" / "daemon.json"
    made.parent.mkdir()
    made.write_text(BEFORE)
    yield made
    subprocess.run(["umount", made, made.parent], capture_output=True)


def bind(path: Path, *options: str) -> None:
    subprocess.run(["mount", "--bind", path, path], check=True)
    for option in options:
        subprocess.run(["mount", "-o", f"remount,bind,{option}", path], check=True)


@pytest.mark.parametrize(("place", "error", "hint"), [("parent", "Read-only", "are made"), ("file", "busy", "a mount")])
def test_it_is_said_and_nothing_is_changed(
    place: str, error: str, hint: str, file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bind(file.parent, "ro") if place == "parent" else bind(file)
    assert main(["install", "docker", "--config", str(file), "--runtime-path", PATH]) == 1
    lines = capsys.readouterr().err.splitlines()
    assert error in lines[0]
    assert hint in lines[1]
    assert file.read_text() == BEFORE
    assert {path.name for path in file.parent.iterdir()} <= {"daemon.json", "daemon.json.clip-shim.bak"}
