"""CRI-O: a runtime handler in a drop-in below /etc/crio/crio.conf.d (crio.conf.d(5)), which CRI-O merges by key.

CRI-O reads every file of that directory, whatever its name; so backups lie above it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from shim.errors import InstallError
from shim.install.plan import Plan, Runtime, read
from shim.install.runtimes import DROP_IN, RuntimeTable

TITLE = "CRI-O"
CONFIG = Path("/etc/crio/crio.conf.d") / DROP_IN
PROGRAM = "crio"
SOCKET = "/var/run/crio/crio.sock"
_RELOAD = "systemctl restart crio   (running containers go on)"
_RUNTIMES = ("crio", "runtime", "runtimes")
_DEFAULT = ("crio", "runtime", "default_runtime")
_BUNDLES = "/run/containers/storage"
_HANDLER = "io.kubernetes.cri-o.RuntimeHandler"


def install(config: Path, runtime: Runtime, *, force: bool) -> Plan:
    """Raises InstallError: the file is not valid, or the name is taken."""
    table = _table(config)
    entry = {"runtime_path": runtime.path, "runtime_type": "oci", "runtime_root": "/run/runc"}
    table.set(runtime, entry, force=force)
    return Plan(table.changes(), _RELOAD, f"runtimeClassName: {runtime.name}   (packaging/kubernetes)")


def uninstall(config: Path, runtime: Runtime, *, force: bool) -> Plan:
    """Raises InstallError: the file is not valid, or the entry is not ours."""
    table = _table(config)
    if not table.remove(runtime, _DEFAULT, "another runtime", force=force):
        return Plan([], "", "")
    return Plan(table.changes(), _RELOAD, "")


def configured(config: Path) -> dict[str, str]:
    """Name → path of the handlers in the file. Raises InstallError."""
    return _table(config).paths()


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


def _table(config: Path) -> RuntimeTable:
    return RuntimeTable(config, _RUNTIMES, _path_of)


def _path_of(entry: Any) -> str | None:
    found = entry.get("runtime_path") if isinstance(entry, dict) else None
    return found if isinstance(found, str) else None
