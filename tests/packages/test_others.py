"""The rpm, and installing from the source with pip and pipx."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from shim import __version__

ROOT = Path(__file__).resolve().parents[2]


def output(*command: str | Path, **env: str) -> str:
    words = [str(word) for word in command]
    done = subprocess.run(words, capture_output=True, text=True, timeout=600, env={**os.environ, **env})
    assert done.returncode == 0, f"{words}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def test_rpm(packages: Path, tmp_path: Path) -> None:
    """There is no Fedora here: its metadata, and its files in an empty root; what it needs is not installed."""
    (rpm,) = packages.glob("*.rpm")
    needs = output("rpm", "-qp", "--requires", rpm)
    assert "python3 >= 3.11" in needs
    assert "(runc or crun)" in needs
    assert "/etc/clip-shim/config.yaml" in output("rpm", "-qp", "--configfiles", rpm)
    scripts = output("rpm", "-qp", "--scripts", rpm)
    assert "try-restart clip-shim.service" in scripts
    output("rpm", "--root", tmp_path, "--nodeps", "--noscripts", "-i", rpm)
    for path in ("usr/bin/clip-shim", "usr/lib/systemd/system/clip-shim.service", "usr/share/man/man1/clip-shim.1.gz"):
        assert (tmp_path / path).is_file()
    edited = tmp_path / "etc/clip-shim/config.yaml"
    edited.write_text("log:\n  level: debug\n")
    output("rpm", "--root", tmp_path, "--noscripts", "-e", "clip-shim")
    assert not (tmp_path / "usr/lib/clip-shim/pyvenv.cfg").exists()
    assert (edited.with_name("config.yaml.rpmsave")).read_text() == "log:\n  level: debug\n"


def check(command: Path, prefix: Path) -> None:
    assert "VERB" in output(command, "--help")
    assert f"runtime_path: {prefix}/libexec/clip-shim/clip-shim-runtime" in output(command, "config", "show")
    assert (prefix / "libexec/clip-shim/clip-shim-runtime").is_file()
    page = "import shim.cli.report as r; print(len(r.page({})))"
    assert int(output(prefix / "bin/python", "-I", "-c", page)) > 5000  # data files come along


def test_pip(tmp_path: Path) -> None:
    output(sys.executable, "-m", "venv", tmp_path / "venv")
    output(tmp_path / "venv/bin/pip", "install", "--quiet", "--disable-pip-version-check", ROOT)
    check(tmp_path / "venv/bin/clip-shim", tmp_path / "venv")


def test_pipx(tmp_path: Path) -> None:
    output(sys.executable, "-m", "venv", tmp_path / "tool")
    output(tmp_path / "tool/bin/pip", "install", "--quiet", "--disable-pip-version-check", "pipx")
    env = {"PIPX_HOME": str(tmp_path / "home"), "PIPX_BIN_DIR": str(tmp_path / "bin"), "PIPX_MAN_DIR": str(tmp_path)}
    output(tmp_path / "tool/bin/pipx", "install", "--python", sys.executable, ROOT, **env)
    check(tmp_path / "bin/clip-shim", tmp_path / "home/venvs/clip-shim")
    assert output(tmp_path / "tool/bin/pipx", "list", "--short", **env).split() == ["clip-shim", __version__]
    output(tmp_path / "tool/bin/pipx", "uninstall", "clip-shim", **env)
    assert not (tmp_path / "bin/clip-shim").exists()
