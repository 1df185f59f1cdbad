"""The life of the package in a clean Debian 12 and 13: installed, used, upgraded, removed, purged. In this order."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from shim import __version__
from shim.runtime.launcher import write_launcher
from shim.settings import load
from tests.support import bundle
from tests.support.debianroot import NEXT, DebianRoot
from tests.support.host import wait_for

LOOP = """
import subprocess, sys, time
best = 9.0
for _ in range(40):
    start = time.monotonic()
    subprocess.run(sys.argv[1:], check=True)
    best = min(best, time.monotonic() - start)
print(best)
"""
RUNTIME = "/usr/lib/clip-shim/libexec/clip-shim/clip-shim-runtime"


def offer(root: DebianRoot, packages: Path, version: str) -> str:
    """Copy a deb into the root; its path there."""
    (deb,) = packages.glob(f"clip-shim_{version}-*.deb")
    return root.offer(deb)


def apt(root: DebianRoot, *words: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    options = ["-y", "-q", "-o", "Dpkg::Use-Pty=0", "-o", "Dpkg::Options::=--force-confold"]
    return root.run("apt-get", *options, *words, check=check)


def make_bundle(root: DebianRoot, name: str, args: list[str], index: str) -> str:
    bundle.make(root.path / "srv" / name, args, index=Path(index))
    return f"/srv/{name}"


def ours(root: DebianRoot) -> list[str]:
    """Paths that have to do with the package, outside of dpkg's and apt's own."""
    found = root.output("find", "/", "-xdev", "-name", "*clip-shim*", "-not", "-path", "/var/lib/dpkg/*")
    return [line for line in found.splitlines() if not line.startswith(("/root/", "/var/cache/apt", "/var/log"))]


def test_lintian_finds_no_error(packages: Path) -> None:
    (deb,) = packages.glob(f"clip-shim_{__version__}-*.deb")
    done = subprocess.run(["lintian", "--fail-on", "error", "--allow-root", str(deb)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    assert "E: " not in done.stdout


def test_install(root: DebianRoot, packages: Path) -> None:
    apt(root, "update")
    apt(root, "install", "--no-install-recommends", offer(root, packages, __version__))
    shown = json.loads(root.output("clip-shim", "config", "show", "--json"))
    assert shown["runtime_path"] == RUNTIME
    assert set(shown["source"].values()) == {"default"}
    compiled = json.loads((root.path / "var/lib/clip-shim/runtime.json").read_text())
    assert compiled["daemon_command"] == ["/usr/lib/clip-shim/bin/python3", "-m", "shim"]
    assert root.output("clip-shim", "config", "check") == "the configuration is valid"
    assert root.output("dpkg", "--verify", "clip-shim") == ""  # what `config show` did changed no file of the package
    assert (root.path / "var/lib/clip-shim").stat().st_mode & 0o777 == 0o700


def test_a_container_runs_lazily(root: DebianRoot, registry_address: str, pushed: Callable[[str], str]) -> None:
    config = root.path / "etc/clip-shim/config.yaml"
    edited = config.read_text().replace("\ntrust:\n", f'\ntrust:\n  registries: ["{registry_address}"]\n')
    config.write_text(edited)
    root.run("clip-shim", "index", pushed("small"), "-o", "/var/lib/clip-shim/indexes/small.clip")
    place = make_bundle(root, "first", ["sha256sum", "/data/noise.bin"], "/var/lib/clip-shim/indexes/small.clip")
    said = root.output(RUNTIME, "run", "--bundle", place, "first")
    assert said.split()[1] == "/data/noise.bin"
    status = json.loads(root.output("clip-shim", "status", "--json"))
    assert status["daemon"]["version"] == __version__
    assert sum(layer["fetched_bytes"] for layer in status["layers"]) > 100_000
    assert "first" in root.output("clip-shim", "report", "first")


def test_it_starts_as_fast_as_from_a_checkout(root: DebianRoot, tmp_path: Path) -> None:
    """The least of many, of a call that the launcher hands on at once."""
    here = write_launcher(tmp_path / "clip", load(env={}, flags={"runtimes": ["/bin/true"]}), [sys.executable])
    text = (root.path / RUNTIME.lstrip("/")).read_text().splitlines()
    assert here.read_text().splitlines()[:-1] == text[:-1]
    if root.suite != "bookworm":  # another Python than this machine's
        return
    there = "/root/speed"
    runtime_json = json.loads((root.path / "var/lib/clip-shim/runtime.json").read_text())
    runtime_json |= {"runtimes": ["/bin/true"]}
    (root.path / "root/speed.json").write_text(json.dumps(runtime_json))
    speed = root.path / there.lstrip("/")
    speed.write_text("\n".join(text).replace("/var/lib/clip-shim/runtime.json", "/root/speed.json") + "\n")
    speed.chmod(0o755)
    packaged = float(root.output("python3", "-c", LOOP, there, "state", "x"))
    checkout = min(timed(here) for _ in range(40))
    assert packaged < checkout + 0.003, f"{packaged * 1000:.1f} ms against {checkout * 1000:.1f} ms"


def timed(command: Path) -> float:
    start = time.monotonic()
    subprocess.run([command, "state", "x"], check=True, env={"PATH": os.environ["PATH"]})
    return time.monotonic() - start


def test_upgrade_keeps_the_configuration_and_running_containers(root: DebianRoot, packages: Path) -> None:
    place = make_bundle(root, "stays", ["sh", "-c", "sleep 1000"], "/var/lib/clip-shim/indexes/small.clip")
    root.run("sh", "-c", f"{RUNTIME} create --bundle {place} stays >/srv/stays.log 2>&1 && {RUNTIME} start stays")
    before = (root.path / "etc/clip-shim/config.yaml").read_text()
    apt(root, "install", "--no-install-recommends", offer(root, packages, NEXT))
    assert (root.path / "etc/clip-shim/config.yaml").read_text() == before
    assert root.output("dpkg-query", "-W", "-f", "${Version}", "clip-shim") == f"{NEXT}-1"
    assert json.loads(root.output(RUNTIME, "state", "stays"))["status"] == "running"
    assert root.output(RUNTIME, "exec", "stays", "cat", "/data/one").strip()


def test_remove_waits_for_containers(root: DebianRoot) -> None:
    refused = apt(root, "remove", "clip-shim", check=False)
    assert refused.returncode != 0
    assert "1 running containers read their files through it" in refused.stdout + refused.stderr
    assert json.loads(root.output(RUNTIME, "state", "stays"))["status"] == "running"
    root.run(RUNTIME, "delete", "--force", "stays")
    apt(root, "remove", "clip-shim")
    assert not (root.path / "usr/lib/clip-shim").exists()
    assert (root.path / "etc/clip-shim/config.yaml").exists()
    assert (root.path / "var/lib/clip-shim/indexes/small.clip").exists()


def test_purge_leaves_nothing(root: DebianRoot) -> None:
    root.run("pkill", "-f", "m shim", check=False)
    wait_for("the daemon ended", lambda: root.run("pgrep", "-f", "m shim", check=False).returncode != 0)
    apt(root, "purge", "clip-shim")
    assert ours(root) == []
