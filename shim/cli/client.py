"""What verbs that talk to the daemon share."""

from __future__ import annotations

from typing import Any

from shim import settings
from shim.runtime import client

Answer = dict[str, Any]


def ask(request: dict[str, object], fds: tuple[int, ...] = ()) -> Answer:
    """One request to a daemon that is running; raises the daemon's error, or DaemonError when none runs."""
    loaded = settings.load()
    with client.connect(str(loaded.run_dir)) as connection:
        return connection.request(request, fds=fds, timeout=float(loaded["mount_deadline"]) + 10)
