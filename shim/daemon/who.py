"""Who a process is, for people: its name and the container it runs in. Only /proc and our own records are looked at."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shim.daemon.overlays import overlays
from shim.mount import mountinfo

_MAX_STATE = 4 << 20
_ID = re.compile(r"[0-9a-f]{64}")  # what engines call a container in cgroup names


@dataclass(frozen=True, slots=True)
class Container:
    """A container over a tree. rootfs: where its overlay is mounted; id: from its record, None if there is none."""

    rootfs: str
    index: str
    id: str | None


def containers(run_dir: Path) -> dict[bytes, Container]:
    """The containers over trees that this mount namespace shows, by their overlay's device (mountinfo's)."""
    ids = _ids(run_dir)
    found = {}
    for hex_, entry in overlays(mountinfo.read()):
        rootfs = entry.mount_point.decode("utf-8", "surrogateescape")
        found[entry.dev] = Container(rootfs, f"sha256:{hex_}", ids.get(rootfs))
    return found


def _ids(run_dir: Path) -> dict[str, str]:
    """rootfs → container ID, from the wrapper's records (shim/runtime/records.py)."""
    found = {}
    for path in (run_dir / "containers").glob("*/*/state.json"):
        try:
            with open(path, "rb") as file:
                state: Any = json.loads(file.read(_MAX_STATE))
        except (OSError, ValueError, RecursionError):
            continue
        if isinstance(state, dict) and isinstance(state.get("rootfs"), str):
            found[state["rootfs"]] = str(state.get("container"))
    return found


def describe(pid: int, known: dict[bytes, Container]) -> tuple[str | None, str | None]:
    """(name of process or thread `pid`, container ID or rootfs); None for what cannot be said."""
    proc = Path("/proc") / str(pid)
    try:
        name = (proc / "comm").read_text(errors="replace").strip()
    except OSError:
        return None, None
    container = None
    try:
        root = mountinfo.at("/", mountinfo.read_bytes(str(proc / "mountinfo")))
        found = known.get(root.dev) if root is not None else None
        if found is not None:
            container = found.id or found.rootfs
        else:
            match = _ID.search((proc / "cgroup").read_text(errors="replace"))
            container = match[0] if match else None
    except (OSError, ValueError):
        pass  # it ended meanwhile
    return name, container
