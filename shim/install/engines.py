"""The engines that `install` knows, and what is asked of each."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from shim.errors import InstallError
from shim.install import containerd, crio, docker, podman, podman_hooks
from shim.install.plan import Plan, Runtime, read


class Planner(Protocol):
    """`install` or `uninstall`: config, runtime, force → Plan."""

    def __call__(self, config: Path, runtime: Runtime, *, force: bool) -> Plan: ...


@dataclass(frozen=True, slots=True)
class Engine:
    """users: the containers that need the runtime, None when the engine cannot be asked. mark: tells the root
    directories that it gives its runtime from the others'."""

    title: str
    config: Path
    install: Planner
    uninstall: Planner
    configured: Callable[[Path], dict[str, str]]
    users: Callable[[Path, Runtime], list[str] | None]
    mark: str


ENGINES: dict[str, Engine] = {
    "docker": Engine(
        docker.TITLE,
        docker.CONFIG,
        docker.install,
        docker.uninstall,
        docker.configured,
        docker.users,
        "/runtime-runc/",
    ),
    "containerd": Engine(
        containerd.TITLE,
        containerd.CONFIG,
        containerd.install,
        containerd.uninstall,
        containerd.configured,
        containerd.users,
        "/containerd/",
    ),
    "podman": Engine(
        podman.TITLE, podman.CONFIG, podman.install, podman.uninstall, podman.configured, podman.users, ""
    ),
    "podman-hooks": Engine(
        podman_hooks.TITLE,
        podman_hooks.CONFIG,
        podman_hooks.install,
        podman_hooks.uninstall,
        podman_hooks.configured,
        podman_hooks.users,
        podman_hooks.MARK,
    ),
    "crio": Engine(crio.TITLE, crio.CONFIG, crio.install, crio.uninstall, crio.configured, crio.users, ""),
}


def users(engine: Engine, config: Path, runtime: Runtime, run_dir: Path) -> list[str]:
    """The containers that would be lost to the engine without the runtime: what it says, or, when it cannot be asked,
    the records of lazily loaded containers that may be its."""
    found = engine.users(config, runtime)
    return _recorded(engine, run_dir) if found is None else found


def _recorded(engine: Engine, run_dir: Path) -> list[str]:
    others = [other.mark for other in ENGINES.values() if other.mark]
    found = []
    for path in sorted(run_dir.glob("containers/*/*/state.json")):
        try:
            state = json.loads(read(path) or b"{}")
            root = f"{state.get('root')}/"
        except (ValueError, AttributeError, InstallError, RecursionError):
            continue
        if (engine.mark in root) if engine.mark else not any(mark in root for mark in others):
            found.append(str(state.get("container") or path.parent.name))
    return found
