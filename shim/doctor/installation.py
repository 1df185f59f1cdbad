"""This installation: its configuration, the file that engines run, and the runtimes behind it."""

from __future__ import annotations

import os
import stat
import subprocess
from collections.abc import Iterator
from pathlib import Path

from shim.daemon.trust import Trust
from shim.doctor.node import Node, why
from shim.doctor.result import Result, failed, ok, warning
from shim.errors import ShimError
from shim.registry.hosts import Hosts
from shim.runtime.fastpath import is_stale, read_settings
from shim.runtime.launcher import SETTINGS_NAME, find_runtimes
from shim.settings import DEFAULT_CONFIG
from shim.stores.transfer import Stores

_SECONDS = 15
_DISABLED = Path("/etc/clip-shim/disabled")


def config_file() -> Path:
    return Path(os.environ.get("CLIP_SHIM_CONFIG", DEFAULT_CONFIG))


def configuration(node: Node) -> Iterator[Result]:
    path = config_file()
    expected = f"{path} is absent or valid, root's, and writable by root alone"
    if node.problem is not None:
        yield failed(str(node.problem), expected, node.problem.hint or "see `clip-shim config default`")
        return
    try:
        Hosts(node.settings["registries"])
        Trust(node.settings)
        with Stores(node.settings, node.registry) as stores:
            for url in (*node.settings["stores.lookup"], *node.settings["stores.write"]):
                stores.store(url)
    except ShimError as error:
        yield failed(str(error), expected, error.hint or "see `clip-shim config default`")
        return
    if path.exists():
        info = path.stat()
        if info.st_uid != 0 or info.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
            yield failed(
                f"{path} has uid {info.st_uid} and mode {info.st_mode & 0o7777:04o}: others can decide what root reads",
                expected,
                f"chown root:root {path}; chmod go-w {path}",
            )
            return
    yield ok(f"{path} is valid" if path.exists() else f"there is no {path}: all settings have their defaults", expected)
    for switch in (path.parent / "disabled", _DISABLED):
        if switch.exists():
            yield warning(
                f"{switch} switches lazy loading off: containers with a reference fail",
                "no such file",
                f"rm {switch}",
            )
            break


def launcher(node: Node) -> Iterator[Result]:
    path = node.launcher
    expected = f"{path} is there, runs, and its settings are those of {config_file()}"
    mend = "run `clip-shim config compile` as root"
    if not os.access(path, os.X_OK):
        yield warning(f"{path} is not there", expected, mend, node.make_launcher)
        return
    try:
        done = subprocess.run(
            [path, "--version"],
            capture_output=True, text=True, errors="replace", timeout=_SECONDS, check=False, stdin=subprocess.DEVNULL,
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired) as error:
        yield failed(str(error), expected, mend, node.make_launcher)
        return
    if done.returncode:
        said = " ".join(done.stderr.split())[-300:]
        yield failed(
            f"{path} --version ends with {done.returncode}: {said}", expected, "see the check runtimes; " + mend
        )
        return
    try:  # after the run, since a launcher whose settings are older compiles them again, if it can
        compiled = read_settings(str(path.with_name(SETTINGS_NAME)))
        stale = is_stale(compiled) or compiled["launcher"] != str(path)
    except (OSError, ValueError, StopIteration, KeyError, TypeError) as error:
        text = f"its settings cannot be read: {type(error).__name__}"
        yield failed(text, expected, mend, node.make_launcher)
        return
    if stale:
        yield warning("its settings are older than the configuration", expected, mend, node.make_launcher)
    else:
        yield ok(f"{path} runs", expected)


def runtimes(node: Node) -> Iterator[Result]:
    names = node.settings["runtimes"]
    expected = f"one of {', '.join(names)} is there and runs"
    found = [path for path in find_runtimes(names, node.launcher) if os.access(path, os.X_OK)]
    if not found:
        yield failed("none of them is there", expected, "install runc (or crun), or name it in `runtimes`")
    for number, path in enumerate(found):
        try:
            done = subprocess.run(
                [path, "--version"],
                capture_output=True, text=True, errors="replace", timeout=_SECONDS, check=False,
                stdin=subprocess.DEVNULL,
            )  # fmt: skip
            version = done.stdout.splitlines()[0].strip() if done.stdout else ""
            trouble = "" if done.returncode == 0 and version else f"ends with {done.returncode}"
        except (OSError, subprocess.TimeoutExpired) as error:
            version, trouble = "", why(error) if isinstance(error, OSError) else "does not answer"
        if trouble:
            text = f"{path} --version {trouble}"
            yield (failed if number == 0 else warning)(text, expected, f"install it again, or take {path} out")
        else:
            yield ok(f"{path}: {version}" + (", used" if number == 0 else ""), expected)
