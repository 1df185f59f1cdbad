"""`clip-shim drain`: everything that is in use is completed, and who still depends on the registry is named."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from shim.daemon import who
from shim.daemon.background import Background
from shim.daemon.control import Answer, Session


class Drain:
    """Answers the control operation `drain`: it lasts as long as the connection on which it was asked for, and each
    further request on that says how far it is."""

    def __init__(self, background: Background, run_dir: Path) -> None:
        self._background = background
        self._run = run_dir

    def asked(self, session: Session, _request: dict[str, Any], _fds: list[int]) -> Answer:
        """`{"images": [{"index", "image", "size", "missing_bytes", "pending", "errors", "containers"}, …]}`: nothing
        that is `pending` is left when it is over. `missing_bytes` is None for containers that nobody serves."""
        if not session.notes.get("drain"):
            session.notes["drain"] = True
            self._background.begin_drain()
            session.on_close.append(self._background.end_drain)
        known = list(who.containers(self._run).values())
        rows = self._background.progress()
        for row in rows:
            row["containers"] = sorted(c.id or c.rootfs for c in known if c.index == row["index"])
        return {"images": rows + lost(known, {row["index"] for row in rows})}


def lost(known: list[who.Container], served: set[str]) -> list[dict[str, Any]]:
    """Containers whose index is not served: what they lack nobody can tell."""
    rows: dict[str, dict[str, Any]] = {}
    for container in known:
        if container.index not in served:
            row = rows.setdefault(container.index, {"index": container.index, "image": "", "size": None})
            row |= {"missing_bytes": None, "pending": False, "errors": ["no daemon serves it"]}
            row.setdefault("containers", []).append(container.id or container.rootfs)
    return list(rows.values())
