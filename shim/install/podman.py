"""podman: `engine.runtimes` in containers.conf(5), by default in a drop-in of its own.

`runtime_supports_json` must name the runtime too, or its errors are shown as raw text. A list in a later file takes the
place of an earlier one's (older versions know no `append`), so ours is the list that holds here, and our name.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

from shim.install import running
from shim.install.plan import Plan, Runtime, read
from shim.install.runtimes import DROP_IN, RuntimeTable
from shim.install.toml import TomlFile

TITLE = "podman"
CONFIG = Path("/etc/containers/containers.conf.d") / DROP_IN
PROGRAM = "podman"
_SOURCES = (Path("/usr/share/containers/containers.conf"), Path("/etc/containers/containers.conf"))
_DROP_INS = (Path("/usr/share/containers/containers.conf.d"), Path("/etc/containers/containers.conf.d"))
# what podman has built in (common/pkg/config/default.go); a name too much does no harm
_SUPPORT_JSON = ["crun", "crun-vm", "runc", "kata", "runsc", "youki", "krun"]
_RUNTIMES = ("engine", "runtimes")
_DEFAULT = ("engine", "runtime")
_SECONDS = 60.0
_JSON = ("engine", "runtime_supports_json")


def install(config: Path, runtime: Runtime, *, force: bool) -> Plan:
    """Raises InstallError: a file is not valid, or the name is taken."""
    table = _table(config)
    table.set(runtime, [runtime.path], force=force)
    names = table.file.get(*_JSON)
    listed = [item for item in names if isinstance(item, str)] if isinstance(names, list) else _supporting(config)
    if names is None or runtime.name not in listed:
        table.file.set(_JSON, [*listed, runtime.name])
    usage = f"podman --runtime {runtime.name} run …   (podman has no daemon: nothing is to be reloaded)"
    return Plan(table.changes(), "", usage)


def uninstall(config: Path, runtime: Runtime, *, force: bool) -> Plan:
    """Raises InstallError: the file is not valid, or the entry is not ours."""
    table = _table(config)
    if not table.remove(runtime, _DEFAULT, "runc or crun", force=force):
        return Plan([], "", "")
    names = table.file.get(*_JSON)
    if isinstance(names, list) and runtime.name in names:
        left = [name for name in names if name != runtime.name]
        if config == CONFIG or set(left) <= set(_supporting(config)):
            table.file.remove(_JSON)  # what holds without it
        else:
            table.file.set(_JSON, left)
    return Plan(table.changes(), "", "")


def configured(config: Path) -> dict[str, str]:
    """Name → path of the runtimes in the file. Raises InstallError."""
    return _table(config).paths()


def users(_: Path, runtime: Runtime) -> list[str] | None:
    """The containers, running or not, that were made with the runtime; None if podman cannot say."""
    program = shutil.which(PROGRAM)
    if program is None:
        return None
    names = running.output([program, "container", "ls", "--all", "--quiet", "--no-trunc"], _SECONDS)
    if names is None:
        return None
    if not names.split():
        return []
    text = running.output([program, "container", "inspect", *names.split()[:5000]], _SECONDS)
    try:
        items = json.loads(text or "")
        return [
            str(item["Name"])
            for item in items
            if item.get("OCIRuntime") in (runtime.name, runtime.path) or runtime.is_ours(item.get("OCIRuntime"))
        ]
    except (ValueError, KeyError, TypeError, AttributeError):
        return None


def sources() -> list[Path]:
    """The files that podman reads as root, a later one over an earlier one (containers.conf(5))."""
    named = os.environ.get("CONTAINERS_CONF")
    return [Path(named)] if named else [*_SOURCES, *(p for d in _DROP_INS for p in sorted(d.glob("*.conf")))]


def _supporting(config: Path) -> list[str]:
    """`runtime_supports_json` as the files before `config` leave it."""
    found = list(_SUPPORT_JSON)
    for path in sources():
        if path == config or (data := read(path)) is None:
            continue
        names: Any = TomlFile(path, data).get(*_JSON)
        if isinstance(names, list):
            found = [name for name in names if isinstance(name, str)]
    return found


def _table(config: Path) -> RuntimeTable:
    return RuntimeTable(config, _RUNTIMES, _first)


def _first(entry: Any) -> str | None:
    return entry[0] if isinstance(entry, list) and entry and isinstance(entry[0], str) else None
