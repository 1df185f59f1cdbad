"""`install` on files that are odd, and cut off in the middle: what is there works on, and what is wrong is said."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from shim.install import plan
from tests.unit.test_install import BEFORE, ENGINES, PATH, call, place

__all__ = ["place"]  # a fixture for all


def test_a_runtime_that_is_not_there_is_noted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    note = f"note: {PATH} is not there, or cannot be executed"
    assert call("install", "crio", tmp_path / "file") == 0
    assert capsys.readouterr().err.startswith(note)
    there = tmp_path / "clip-shim-runtime"
    there.touch(mode=0o755)
    assert call("install", "crio", tmp_path / "file", "--runtime-path", str(there)) == 0
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("step", range(3))
def test_killed_at_any_step_leaves_a_drop_in_directory_as_it_was(step: int, tmp_path: Path) -> None:
    """CRI-O reads every file of its directory: half a file there, or one that stays, keeps it from starting."""
    file = tmp_path / "crio.conf.d" / "50-clip-shim.conf"
    file.parent.mkdir()
    file.write_text(BEFORE["crio"])
    pid = os.fork()
    if pid == 0:
        try:
            dies = [(plan.os, "fsync"), (plan.os, "replace"), (plan.Change, "_keep")][step]
            setattr(*dies, lambda *_: os.kill(os.getpid(), signal.SIGKILL))
            call("install", "crio", file)
        finally:
            os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL
    assert os.listdir(file.parent) == [file.name]
    assert file.read_text() == BEFORE["crio"]
    assert call("install", "crio", file) == 0  # and again: done
    assert os.listdir(file.parent) == [file.name]


@pytest.mark.parametrize("engine", ENGINES)
def test_a_directory_or_a_pipe_in_the_place_of_the_file(
    engine: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    os.mkfifo(tmp_path / "pipe")
    for odd in (tmp_path, tmp_path / "pipe"):
        assert call("install", engine, odd) == 1
        assert f"error: {odd} is no regular file" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["crio = {runtime = {}}\n", "[crio.runtime]\nruntimes = {}\n"])
def test_inline_tables_are_left_alone(text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text(text)
    assert call("install", "crio", tmp_path / "file") == 1
    assert "cannot be changed safely" in capsys.readouterr().err
    assert (tmp_path / "file").read_text() == text


@pytest.mark.parametrize(
    ("text", "message"),
    [("version = []\n", "version []"), ("version = 2.0\n", "version 2.0"), ("version = 2\nplugins = 1\n", "a table")],
)
def test_odd_containerd_configurations(
    text: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text(text)
    assert call("install", "containerd", tmp_path / "file") == 1
    assert message in capsys.readouterr().err
    assert (tmp_path / "file").read_text() == text


def test_disabled_plugins_that_are_no_list(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("version = 2\ndisabled_plugins = 5\n")
    assert call("install", "containerd", tmp_path / "file") == 0  # containerd itself says what it thinks of it
