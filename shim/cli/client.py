"""What verbs that talk to the daemon share."""

from __future__ import annotations

import time
from contextlib import closing
from typing import Any

from shim import settings
from shim.errors import DaemonError
from shim.runtime import client, jsontext

Answer = dict[str, Any]


def ask(request: dict[str, object]) -> Answer:
    """One request to a daemon that is running; raises the daemon's error, or DaemonError when none runs."""
    answer = ask_if_running(request)
    if answer is None:
        raise DaemonError(
            f"no daemon runs for {settings.load().run_dir}", hint="the first container starts it, or `clip-shim daemon`"
        )
    return answer


def ask_if_running(request: dict[str, object]) -> Answer | None:
    """The same; None when none runs."""
    connection = client.try_connect(str(settings.load().run_dir), time.monotonic() + 10)
    if connection is None:
        return None
    with closing(connection):
        answer: Answer = _floats(connection.request(request))
        return answer


def _floats(value: Any) -> Any:
    """The wrapper keeps the text of numbers with a point; people and `--json` want floats."""
    if isinstance(value, dict):
        return {key: _floats(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_floats(item) for item in value]
    return float(value.text) if isinstance(value, jsontext.Number) else value
