"""The command line's frame: verbs, help, errors as one line and a hint, exit codes, and what goes to runc."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from shim import __version__
from shim.cli import status
from shim.cli.main import VERBS, main
from tests.support.host import CLIP_SHIM


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Directories of our own, and no daemon."""
    config = tmp_path / "config.yaml"
    config.write_text("{}\n")
    for name in [name for name in os.environ if name.startswith("CLIP_SHIM_") and name != "CLIP_SHIM_TEST"]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("CLIP_SHIM_CONFIG", str(config))
    monkeypatch.setenv("CLIP_SHIM_RUN_DIR", str(tmp_path / "run"))
    monkeypatch.setenv("CLIP_SHIM_STATE_DIR", str(tmp_path / "state"))
    return tmp_path


@pytest.mark.parametrize("words", [[], ["--help"], ["-h"], ["help"]])
def test_help(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words) == 0
    out = capsys.readouterr().out
    for verb in VERBS:
        assert f"\n    {verb} " in out


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_help(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main([verb, "--help"])
    assert caught.value.code == 0
    assert capsys.readouterr().out.startswith(f"usage: clip-shim {verb}")


@pytest.mark.parametrize(
    ("words", "code", "error", "hint"),
    [
        (["status", "--nonsense"], 2, "unrecognized arguments: --nonsense", "--help"),
        (["mount"], 2, "the following arguments are required: INDEX, DIR", "clip-shim mount --help"),
        (["config"], 2, "required: show|default|check", "clip-shim config --help"),
        (["config", "nonsense"], 2, "invalid choice: 'nonsense'", "--help"),
        (["status"], 1, "no daemon runs for", "clip-shim daemon"),
        (["status", "--json"], 1, "no daemon runs for", "clip-shim daemon"),
        (["mount", "/nonexistent/a.clip", "/nonexistent/dir"], 2, "/nonexistent/dir is not a directory", "mkdir"),
        (["mount", "/nonexistent/a.clip", "/"], 1, "/nonexistent/a.clip: No such file or directory", ""),
        (["umount", "/nonexistent"], 1, "no image is mounted on /nonexistent", "mountinfo"),
        (["umount", "/proc"], 1, "no image is mounted on /proc", "mountinfo"),
        (["config", "check", "/nonexistent.yaml"], 2, "cannot read /nonexistent.yaml: No such file", "config default"),
        (["daemon", "--config", "/nonexistent.yaml"], 2, "cannot read /nonexistent.yaml: No such file", ""),
        (["idnex", "python:3.12"], 2, "there is no verb 'idnex'", "did you mean `clip-shim index`?"),
        (["instal", "docker"], 2, "there is no verb 'instal'", "did you mean `clip-shim install`?"),
        (["--debug", "statsu"], 2, "there is no verb 'statsu'", "did you mean `clip-shim status`?"),
        (["inspect", "/etc"], 1, "Is a directory", "name a file"),
        (["inspect", "/nonexistent"], 1, "/nonexistent: No such file or directory", "check the name"),
        (["install", "docker", "--config", "/etc"], 1, "/etc is no regular file", "another file"),
    ],
)
def test_an_error_is_one_line_and_a_hint(
    words: list[str], code: int, error: str, hint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words) == code
    captured = capsys.readouterr()
    lines = captured.err.splitlines()
    assert captured.out == ""
    lines = lines[-2:] if words[0] == "--debug" else lines  # behind the traceback
    assert len(lines) == 2
    assert lines[0].startswith("error: ")
    assert error in lines[0]
    assert lines[1].startswith("hint: ")
    assert hint in lines[1]


@pytest.mark.parametrize("words", [["--debug", "umount", "/nonexistent"], ["umount", "--debug", "/nonexistent"]])
def test_debug_shows_the_traceback(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words) == 1
    err = capsys.readouterr().err
    assert "Traceback" in err
    assert "error: no image is mounted" in err


def test_a_defect_is_one_line_too(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def broken(_args: object) -> int:
        raise KeyError("layer")

    monkeypatch.setattr(status, "run", broken)
    assert main(["status"]) == 1
    err = capsys.readouterr().err
    assert err.splitlines()[0] == "error: KeyError: 'layer'"
    assert "--debug" in err
    assert "Traceback" not in err
    assert main(["--debug", "status"]) == 1
    assert "in broken" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["registries: {'a/b': {}}", "registries: {a.example: {mirrors: 3}}", "tre: x", "[1"])
def test_config_check_says_what_the_daemon_would(place: Path, text: str, capsys: pytest.CaptureFixture[str]) -> None:
    (place / "other.yaml").write_text(text)
    assert main(["config", "check", str(place / "other.yaml")]) == 2
    assert capsys.readouterr().err.startswith("error: ")
    (place / "other.yaml").write_text("registries: {a.example: {plain_http: true}}")
    assert main(["config", "check", str(place / "other.yaml")]) == 0
    assert capsys.readouterr().out == "the configuration is valid\n"


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["version"]) == 0
    assert capsys.readouterr().out == f"clip-shim version {__version__}\n"


@pytest.fixture
def runtime(place: Path) -> Path:
    """A runtime that prints its arguments and ends with 7."""
    path = place / "runc"
    path.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\nexit 7\n')
    path.chmod(0o755)
    return path


@pytest.mark.parametrize(
    "words", [["--version"], ["--debug", "--version"], ["features"], ["state", "x"], ["start", "x"], ["no-such-verb"]]
)
def test_what_is_no_verb_of_ours_is_the_runtimes(runtime: Path, words: list[str]) -> None:
    """Argument by argument, and its exit code comes back."""
    env = {**os.environ, "CLIP_SHIM_RUNTIMES": str(runtime)}
    done = subprocess.run([CLIP_SHIM, *words], env=env, capture_output=True, text=True)
    assert done.returncode == 7, done.stderr
    assert done.stdout.split() == words


@pytest.mark.parametrize("text", ["tre: x", "runtimes: 3", None])
def test_the_runtimes_verbs_need_no_valid_configuration(place: Path, text: str | None) -> None:
    """Whatever is wrong with ours, containers are killed and deleted; only what needs a root filesystem is refused."""
    (place / "config.yaml").write_text(text) if text else (place / "config.yaml").unlink()
    done = subprocess.run([CLIP_SHIM, "--version"], capture_output=True, text=True)
    assert done.returncode == 0
    assert "version" in done.stdout
    done = subprocess.run(
        [CLIP_SHIM, "--log", place / "log", "create", "c1"], capture_output=True, text=True, cwd=place
    )
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert "config.yaml" in (place / "log").read_text()


def test_a_reader_that_has_seen_enough_is_no_error(place: Path) -> None:
    done = subprocess.run(["sh", "-c", f"{CLIP_SHIM} config default | true"], capture_output=True, text=True)
    assert done.stderr == ""


def test_a_full_disk_is_an_error() -> None:
    with open("/dev/full", "w") as full:
        done = subprocess.run([CLIP_SHIM, "config", "default"], stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 1
    assert done.stderr.startswith("error: No space left on device")


ROW = {
    "pid": 7, "blob": "ab-cd", "offset": 4096, "size": 512, "age": 2.5, "trouble": "registry.test: no bytes came yet",
    "layer": "sha256:" + "ab" * 32, "process": "cat", "container": None, "file": "/usr/bin/x",
}  # fmt: skip


@pytest.mark.parametrize("container", [None, "c1"])
def test_waiting_reads_name_everything(container: str | None) -> None:
    _, line = status._waiting([{**ROW, "container": container}])
    for part in ("7", container or "cat", "/usr/bin/x", "abababababab", "4096", "512", "2.5 s", "registry.test"):
        assert part in line.split() or f"{part} " in line or f"{part}:" in line


def test_status_reads_like_a_person_writes() -> None:
    layer = {"diff_id": "sha256:" + "a" * 64, "size": 2 << 20, "cached_bytes": 1 << 20, "fetched_bytes": 300}
    layer |= {"hits": 5, "misses": 6, "failures": 0, "open": 1}
    index = "sha256:" + "b" * 64
    answer = {
        "daemon": {
            "pid": 1, "version": "x", "tier": "erofs", "tier_reason": "it works", "uptime": 7300.0, "read_failures": 3,
            "handover": "old kernel",
        },
        "images": [
            {"image": "a/b:c", "index": index, "overlays": 2, "layers": [layer["diff_id"]], "step": "lazy",
             "reason": ""}
        ],
        "layers": [layer, {**layer, "diff_id": "sha256:" + "c" * 64, "size": 0, "open": 0}],
        "containers": [
            {"id": "c1", "rootfs": "/x", "index": index}, {"id": "evil\x1b[2J", "rootfs": "/y", "index": index}
        ],
        "waiting": [ROW],
    }  # fmt: skip
    lines = status._tables(answer)
    text = "\n".join(lines)
    assert "\x1b" not in text
    assert "up 2 h" in lines[0]
    assert "1 reads wait, the oldest 2.5 s" in lines[2]
    assert "3 reads failed" in lines[2]
    assert "should the daemon be killed, reads of running containers fail: old kernel" in lines[2]
    assert "a/b:c  bbbbbbbbbbbb           2       1  2.0 MiB  50.0 %    300 B" in lines
    assert "c1         a/b:c  /x" in lines
    assert "cccccccccccc      0 B   100 %    300 B     5       6         0  idle" in lines


def test_the_module_is_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    done = subprocess.run([sys.executable, "-m", "shim", "config", "default"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert main(["config", "default"]) == 0
    assert capsys.readouterr().out == done.stdout
