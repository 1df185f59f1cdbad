"""Docker: `runtimes` in daemon.json (https://docs.docker.com/reference/cli/dockerd/). There are no drop-ins."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

from shim.errors import InstallError
from shim.install import running
from shim.install.plan import Plan, Runtime, change, check_free, read

TITLE = "Docker"
CONFIG = Path("/etc/docker/daemon.json")
PROGRAM = "dockerd"
SOCKET = "/var/run/docker.sock"
_RELOAD = "systemctl reload docker   (or: kill -HUP $(pidof dockerd))"
_BOM = b"\xef\xbb\xbf"
_CONTAINERS_MAX = 5000


def install(config: Path, runtime: Runtime, *, force: bool) -> Plan:
    """Raises InstallError: the file is not valid, or the name is taken."""
    before = read(config)
    data = _parse(config, before or b"{}")
    runtimes = _runtimes(config, data)
    entry = runtimes.get(runtime.name)
    if entry is not None and not force:
        check_free(config, runtime, entry.get("path"), entry.get("runtimeType"))
    flagged = [word for process in _serving(config) for word in process.options("add-runtime")]
    if flagged and not force:
        raise InstallError(
            f"dockerd was started with --add-runtime {flagged[0]}: it refuses to start with `runtimes` in {config} too",
            hint="move that runtime from dockerd's command line to the file, or add ours to the command line",
        )
    if entry is None or entry.get("path") != runtime.path:
        runtimes[runtime.name] = {**(entry if entry and not force else {}), "path": runtime.path}
        data["runtimes"] = runtimes
        after = _encode(before, data)
    else:
        after = before or b""
    return Plan(
        change(config, before, after, _validate), _RELOAD, f"docker run --runtime={runtime.name} --rm THIN_IMAGE"
    )


def uninstall(config: Path, runtime: Runtime, *, force: bool) -> Plan:
    """Raises InstallError: the file is not valid, or the entry is not ours."""
    before = read(config)
    data = _parse(config, before or b"{}")
    runtimes = _runtimes(config, data)
    entry = runtimes.get(runtime.name)
    if entry is None:
        return Plan([], "", "")
    if not force:
        check_free(config, runtime, entry.get("path"), entry.get("runtimeType"))
    if data.get("default-runtime") == runtime.name:
        raise InstallError(
            f"`default-runtime` in {config} is {runtime.name}: dockerd would not start without it",
            hint="set `default-runtime` to runc, or remove it, and restart Docker first",
        )
    del runtimes[runtime.name]
    if not runtimes:
        del data["runtimes"]
    return Plan(change(config, before, _encode(before, data), _validate), _RELOAD, "")


def configured(config: Path) -> dict[str, str]:
    """Name → path of the runtimes that the file has. Raises InstallError."""
    data = _parse(config, read(config) or b"{}")
    return {name: str(entry.get("path")) for name, entry in _runtimes(config, data).items()}


def socket_of(process: running.Process | None) -> Path:
    """Where dockerd listens: the first unix socket of its -H flags, or of its configuration's `hosts`."""
    if process is None:
        return Path(SOCKET)
    hosts = process.options("H", "host")
    if not hosts:
        try:
            config = process.path(process.option(str(CONFIG), "config-file"))
            listed = _parse(config, read(config) or b"{}").get("hosts")
        except InstallError:
            listed = None
        hosts = [host for host in listed if isinstance(host, str)] if isinstance(listed, list) else []
    unix = [host.removeprefix("unix://") for host in hosts if host.startswith("unix://")]
    return process.path(unix[0] if unix else SOCKET)


def users(config: Path, runtime: Runtime) -> list[str] | None:
    """The containers, running or not, that Docker would start with the runtime; None if it does not answer."""
    for process in [*_serving(config), None]:
        socket = socket_of(process)
        try:
            listed = running.get_json(socket, "containers", "json", query="?all=1")
            found = []
            for item in listed[:_CONTAINERS_MAX]:
                inspected = running.get_json(socket, "containers", str(item["Id"]), "json")
                if inspected["HostConfig"]["Runtime"] == runtime.name:
                    found.append(str(inspected["Name"]).lstrip("/"))
        except InstallError:
            continue
        except (KeyError, TypeError):
            continue
        return found
    return None


def _serving(config: Path) -> list[running.Process]:
    """The dockerd that reads `config`, in this mount namespace."""
    return [
        process
        for process in running.find(PROGRAM)
        if process.root == Path("/")
        and os.path.realpath(process.option(str(CONFIG), "config-file")) == os.path.realpath(config)
    ]


def _parse(config: Path, data: bytes) -> dict[str, Any]:
    def no_twins(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            raise ValueError("a key stands twice in one object")
        return found

    try:
        text = data.removeprefix(_BOM).decode("utf-8")
        value = json.loads(text, object_pairs_hook=no_twins) if text.strip() else {}
    except (ValueError, RecursionError) as error:
        raise InstallError(
            f"{config} is not valid JSON: {error}", hint="mend it first: dockerd would refuse it too"
        ) from None
    if not isinstance(value, dict):
        raise InstallError(f"{config} does not hold a JSON object", hint="mend it first: dockerd would refuse it too")
    return value


def _runtimes(config: Path, data: dict[str, Any]) -> dict[str, dict[str, Any]]:
    found = data.get("runtimes", {})
    if not isinstance(found, dict) or not all(isinstance(entry, dict) for entry in found.values()):
        raise InstallError(f"{config}: `runtimes` must be an object of objects")
    return found


def _encode(before: bytes | None, data: dict[str, Any]) -> bytes:
    """As the file was indented."""
    old = before or b""
    match = re.search(rb"\n([ \t]+)\"", old)
    indent: str | int = match[1].decode() if match else 4
    text = json.dumps(data, indent=indent, ensure_ascii=False)
    return (_BOM if old.startswith(_BOM) else b"") + text.encode() + b"\n"


def _validate(path: Path) -> None:
    """Ask dockerd itself (23.0 and later can tell)."""
    program = shutil.which(PROGRAM, path=f"{os.environ.get('PATH', '')}:/usr/sbin:/usr/local/sbin")
    if program is None:
        return
    try:
        done = subprocess.run(
            [program, "--validate", "--config-file", str(path)],
            capture_output=True, text=True, errors="replace", timeout=20, check=False, stdin=subprocess.DEVNULL,
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired):
        return
    if done.returncode and "unknown flag" not in done.stderr:
        said = " ".join(done.stderr.split())[-500:]
        raise InstallError(f"dockerd does not take the configuration: {said}", hint="mend the file first")
