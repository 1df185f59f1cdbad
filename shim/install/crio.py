"""CRI-O: a runtime handler in a drop-in below /etc/crio/crio.conf.d (crio.conf.d(5)), which CRI-O merges by key.

CRI-O reads every file of that directory, whatever its name; so backups lie above it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from shim.errors import InstallError
from shim.install.plan import Plan, Runtime, change, read, taken
from shim.install.toml import TomlFile

TITLE = "CRI-O"
CONFIG = Path("/etc/crio/crio.conf.d/50-clip-shim.conf")
PROGRAM = "crio"
SOCKET = "/var/run/crio/crio.sock"
_RELOAD = "systemctl restart crio   (running containers go on)"
_RUNTIMES = ("crio", "runtime", "runtimes")
_BUNDLES = "/run/containers/storage"
_HANDLER = "io.kubernetes.cri-o.RuntimeHandler"


def install(config: Path, runtime: Runtime, *, force: bool) -> Plan:
    """Raises InstallError: the file is not valid, or the name is taken."""
    before = read(config)
    file = TomlFile(config, before or b"")
    entry = file.table(*_RUNTIMES).get(runtime.name)
    path = _path_of(entry)
    if entry is not None and not runtime.is_ours(path) and not force:
        raise taken(config, runtime.name, path)
    if path != runtime.path:
        file.set(
            [*_RUNTIMES, runtime.name],
            {"runtime_path": runtime.path, "runtime_type": "oci", "runtime_root": "/run/runc"},
        )
    return Plan(
        change(config, before, file.encode()), _RELOAD, f"runtimeClassName: {runtime.name}   (packaging/kubernetes)"
    )


def uninstall(config: Path, runtime: Runtime, *, force: bool) -> Plan:
    """Raises InstallError: the file is not valid, or the entry is not ours."""
    before = read(config)
    file = TomlFile(config, before or b"")
    entry = file.table(*_RUNTIMES).get(runtime.name)
    if entry is None:
        return Plan([], "", "")
    if not runtime.is_ours(_path_of(entry)) and not force:
        raise taken(config, runtime.name, _path_of(entry))
    if file.get("crio", "runtime", "default_runtime") == runtime.name:
        raise InstallError(f"`default_runtime` in {config} is {runtime.name}", hint="set it to another runtime first")
    file.remove([*_RUNTIMES, runtime.name])
    after: bytes | None = file.encode()
    if config.name == CONFIG.name and not (after or b"").strip():
        after = None
    return Plan(change(config, before, after), _RELOAD, "")


def configured(config: Path) -> dict[str, str]:
    """Name → path of the handlers in the file. Raises InstallError."""
    file = TomlFile(config, read(config) or b"")
    return {name: _path_of(entry) or "" for name, entry in file.table(*_RUNTIMES).items()}


def users(_: Path, runtime: Runtime) -> list[str]:
    """The containers and sandboxes of the handler: CRI-O names it in their configurations' annotations."""
    found = []
    for path in Path(_BUNDLES).glob("overlay-containers/*/userdata/config.json"):
        try:
            annotations: Any = json.loads((read(path) or b"{}").decode()).get("annotations") or {}
            if annotations.get(_HANDLER) == runtime.name:
                found.append(str(annotations.get("io.kubernetes.cri-o.Name") or path.parent.parent.name))
        except (ValueError, AttributeError, InstallError, RecursionError):
            continue
    return found


def _path_of(entry: Any) -> str | None:
    found = entry.get("runtime_path") if isinstance(entry, dict) else None
    return found if isinstance(found, str) else None
