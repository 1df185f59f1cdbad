"""Engines: whether their files name the runtime, whether what they name exists, and whether the engine that runs has
read them."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tomllib
from collections.abc import Iterator
from pathlib import Path

from shim.doctor.node import Node
from shim.doctor.result import Result, failed, ok, skipped, warning
from shim.errors import InstallError
from shim.install import containerd as containerd_files
from shim.install import crio as crio_files
from shim.install import docker as docker_files
from shim.install import podman as podman_files
from shim.install import running
from shim.install.plan import LAUNCHER_NAME

_SECONDS = 20
_HOOK_DIRS = ("/usr/share/containers/oci/hooks.d", "/etc/containers/oci/hooks.d")


def _ours(node: Node, runtimes: dict[str, str]) -> dict[str, str]:
    """Those of an engine's runtimes that lead to a launcher of ours."""
    return {
        name: path
        for name, path in runtimes.items()
        if path == str(node.launcher) or os.path.basename(path) == LAUNCHER_NAME
    }


def _path_problem(node: Node, engine: str, name: str, path: str) -> Result | None:
    expected = f"the runtime {name} of {engine} leads to {node.launcher}"
    command = f"`clip-shim install {engine.lower().replace('-', '')} --runtime-name {name}`"
    if not os.access(path, os.X_OK):
        return failed(f"{engine} has the runtime {name}, but {path} is not there", expected, f"run {command}")
    if path != str(node.launcher):
        return warning(
            f"the runtime {name} of {engine} leads to another installation, {path}",
            expected,
            f"run {command}, or use that installation's clip-shim",
        )
    return None


def docker(node: Node) -> Iterator[Result]:
    processes = [process for process in running.find("dockerd") if process.root == Path("/")]
    if not processes:
        config = docker_files.CONFIG
        if not config.exists() and shutil.which("dockerd") is None:
            yield skipped("Docker is not here")
            return
        yield from _at_rest(node, "Docker", docker_files.configured(config), config)
    for process in processes:
        config = Path(process.option(str(docker_files.CONFIG), "config-file"))
        filed = docker_files.configured(config)
        flagged = dict(word.split("=", 1) for word in process.options("add-runtime") if "=" in word)
        yield from _docker_process(node, process, config, _ours(node, filed), _ours(node, flagged))


def _docker_process(
    node: Node, process: running.Process, config: Path, filed: dict[str, str], flagged: dict[str, str]
) -> Iterator[Result]:
    who = f"dockerd (pid {process.pid})"
    reload = "run `systemctl reload docker`, or `kill -HUP` it"
    socket = docker_files.socket_of(process)
    try:
        said = running.get_json(socket, "info")["Runtimes"]
        served = _ours(node, {name: str(entry.get("path")) for name, entry in said.items()})
    except (InstallError, KeyError, TypeError, AttributeError) as error:
        yield warning(
            f"{who} cannot be asked: {error}", "dockerd answers on its socket", "see `systemctl status docker`"
        )
        return
    if not filed and not flagged and not served:
        yield skipped(f"{who} has no runtime of ours: `clip-shim install docker` adds it to {config}")
    for name, path in {**filed, **flagged}.items():
        expected = f"{who} serves what {config} says"
        problem = _path_problem(node, "Docker", name, path)
        if name not in served:
            yield failed(f"{config} has the runtime {name}, but {who} does not: it was not reloaded", expected, reload)
        elif served[name] != path:
            yield failed(f"{who} still has {served[name]} for the runtime {name}: not reloaded", expected, reload)
        else:
            yield problem or ok(f"{who} serves the runtime {name}", expected)
    for name in served.keys() - filed.keys() - flagged.keys():
        yield warning(
            f"{who} still has the runtime {name}, which {config} no longer names",
            f"{who} serves what {config} says",
            reload,
        )


def _at_rest(node: Node, engine: str, runtimes: dict[str, str], config: Path) -> Iterator[Result]:
    """An engine that does not run: only its file can be looked at."""
    ours = _ours(node, runtimes)
    if not ours:
        yield skipped(f"{engine} does not run, and {config} has no runtime of ours")
    for name, path in ours.items():
        yield _path_problem(node, engine, name, path) or ok(
            f"{config} has the runtime {name}; {engine} does not run", f"{config} names {node.launcher}"
        )


def containerd(node: Node) -> Iterator[Result]:
    processes = [process for process in running.find("containerd") if process.root == Path("/")]
    processes = [process for process in processes if "/docker/containerd/" not in process.option("", "config", "c")]
    if not processes:
        config = containerd_files.CONFIG
        if not config.exists() and shutil.which("containerd") is None:
            yield skipped("containerd is not here")
            return
        yield from _at_rest(node, "containerd", _handlers(config), config)
    for process in processes:
        config = Path(process.option(str(containerd_files.CONFIG), "config", "c"))
        who = f"containerd (pid {process.pid})"
        ours = _ours(node, _handlers(config))
        if not ours:
            yield skipped(f"{who} has no runtime of ours: `clip-shim install containerd` adds it to {config}")
            continue
        late = [path for path in containerd_files.files(config) if path.stat().st_mtime > process.started]
        for name, path in ours.items():
            expected = f"{who} was started after {config} was written"
            if late:
                yield failed(
                    f"{late[0]} was changed after {who} was started, and is read then only",
                    expected,
                    "run `systemctl restart containerd`: running containers go on",
                )
            else:
                yield _path_problem(node, "containerd", name, path) or ok(
                    f"{who} has read the runtime {name} from {config}", expected
                )


def _handlers(config: Path) -> dict[str, str]:
    """A file of version 1 is none of ours."""
    try:
        return containerd_files.configured(config)
    except InstallError as error:
        if "of version 1" in str(error):
            return {}
        raise


def podman(node: Node) -> Iterator[Result]:
    program = shutil.which("podman")
    if program is None:
        yield skipped("podman is not here")
        return
    ours: dict[str, str] = {}
    for file in podman_files.sources():
        ours |= _ours(node, podman_files.configured(file))
    if not ours:
        yield skipped("podman has no runtime of ours: `clip-shim install podman` adds it")
    for name, path in ours.items():
        problem = _path_problem(node, "podman", name, path)
        if problem is not None:
            yield problem
            continue
        expected = f"`podman --runtime {name}` runs {path}"
        try:
            done = subprocess.run(
                [program, "--runtime", name, "info", "--format", "{{.Host.OCIRuntime.Path}}"],
                capture_output=True, text=True, errors="replace", timeout=_SECONDS, check=False,
                stdin=subprocess.DEVNULL,
            )  # fmt: skip
        except (OSError, subprocess.TimeoutExpired) as error:
            yield warning(f"podman cannot be asked: {error}", expected, "see `podman info`")
            continue
        if done.returncode or done.stdout.strip() != path:
            said = done.stdout.strip() or " ".join(done.stderr.split())[-300:]
            yield failed(
                f"podman says: {said}", expected, "a later file may replace it: see containers.conf(5) and its drop-ins"
            )
        else:
            yield ok(f"podman has the runtime {name}", expected)


def crio(node: Node) -> Iterator[Result]:
    processes = [process for process in running.find("crio") if process.root == Path("/")]
    main = Path("/etc/crio/crio.conf")
    files = [path for path in (main, *sorted(crio_files.CONFIG.parent.glob("*"))) if path.is_file()]
    if not processes and not files and shutil.which("crio") is None:
        yield skipped("CRI-O is not here")
        return
    filed: dict[str, str] = {}
    for path in files:
        filed |= _ours(node, crio_files.configured(path))
    if not processes:
        yield from _at_rest(node, "CRI-O", filed, crio_files.CONFIG)
    for process in processes:
        yield from _crio_process(node, process, filed)
    for hook in _precreate_hooks():
        yield failed(
            f"{hook} has the stage precreate, which CRI-O does not know: it does not start",
            "podman's precreate hook lies where CRI-O does not look",
            f"move {hook} to a directory of its own, and name that by `podman --hooks-dir`",
        )


def _crio_process(node: Node, process: running.Process, filed: dict[str, str]) -> Iterator[Result]:
    who = f"crio (pid {process.pid})"
    reload = "run `systemctl restart crio`: running containers go on"
    try:
        text = running.get(process.path(process.option(crio_files.SOCKET, "listen").removeprefix("unix://")), "/config")
        table = tomllib.loads(text.decode()).get("crio", {}).get("runtime", {}).get("runtimes", {})
        served = _ours(node, {name: str(entry.get("runtime_path")) for name, entry in table.items()})
    except (InstallError, ValueError, AttributeError) as error:
        yield warning(f"{who} cannot be asked: {error}", "CRI-O answers on its socket", "see `systemctl status crio`")
        return
    if not filed and not served:
        yield skipped(f"{who} has no runtime of ours: `clip-shim install crio` adds it")
    for name, path in filed.items():
        expected = f"{who} serves what {crio_files.CONFIG.parent} says"
        if served.get(name) != path:
            yield failed(f"{who} does not have the runtime {name} as its files have it: not reloaded", expected, reload)
        else:
            yield _path_problem(node, "CRI-O", name, path) or ok(f"{who} serves the runtime {name}", expected)


def _precreate_hooks() -> Iterator[Path]:
    for directory in _HOOK_DIRS:
        for path in sorted(Path(directory).glob("*.json")):
            try:
                text = path.read_text(errors="replace")[:65536]
            except OSError:
                continue
            if re.search(r'"precreate"', text) and "clip" in text:
                yield path


def namespaces(node: Node) -> Iterator[Result]:
    expected = "the daemon and the engines are in one mount namespace, so that engines see its mounts"
    pid = node.daemon_pid
    if not pid:
        yield skipped("no daemon runs", expected)
        return
    own = running.mount_namespace(pid)
    others = [
        f"{program} (pid {process.pid})"
        for program in ("dockerd", "containerd", "crio")
        for process in running.find(program)
        if process.root == Path("/") and running.mount_namespace(process.pid) not in ("", own)
    ]
    if others:
        yield failed(
            f"{', '.join(others)} and the daemon (pid {pid}) are in different ones",
            expected,
            "remove PrivateTmp=, ProtectSystem= and the like from the units, then restart the daemon",
        )
    else:
        yield ok(f"the daemon (pid {pid}) is where the engines are", expected)
