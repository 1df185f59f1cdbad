"""Log lines as journal entries with fields (systemd's native protocol): `journalctl CLIP_CONTAINER=…` finds them.

A line becomes MESSAGE (event and fields, as a person reads it), PRIORITY, SYSLOG_IDENTIFIER, and every field as
CLIP_<NAME>. Source: https://systemd.io/JOURNAL_NATIVE_PROTOCOL/.
"""

from __future__ import annotations

import re
import socket
import struct
import sys
from typing import Any

SOCKET = "/run/systemd/journal/socket"
_PRIORITY = {"debug": 7, "info": 6, "warning": 4, "error": 3}  # syslog(3)
_FIELD_MAX = 16 << 10  # bytes; all of a line fits into one datagram, so no memfd is needed
_NAME_MAX = 64  # journald refuses longer names


def render(_logger: object, _method: str, event: dict[str, Any]) -> str:
    """A structlog renderer: the fields in the journal's form, as text of Latin-1 so that structlog can carry it."""
    level = str(event.pop("level", "info"))
    event.pop("timestamp", None)  # the journal has its own
    trace = event.pop("exception", None)
    text = str(event.pop("event", ""))
    details = " ".join(f"{key}={value}" for key, value in event.items())
    message = " ".join(part for part in (text, details) if part)
    fields = {"MESSAGE": f"{message}\n{trace}" if trace else message, "PRIORITY": str(_PRIORITY.get(level, 6))}
    fields |= {"SYSLOG_IDENTIFIER": "clip-shim", "CLIP_EVENT": text}
    fields |= {_name(key): str(value) for key, value in event.items() if value is not None}
    return b"".join(_field(name, value) for name, value in fields.items()).decode("latin-1")


def _name(key: str) -> str:
    return ("CLIP_" + re.sub(r"[^A-Z0-9_]", "_", key.upper()))[:_NAME_MAX]


def _field(name: str, value: str) -> bytes:
    data = value.encode("utf-8", "backslashreplace")[:_FIELD_MAX]
    if b"\n" in data:
        return name.encode() + b"\n" + struct.pack("<Q", len(data)) + data + b"\n"
    return name.encode() + b"=" + data + b"\n"


class Journal:
    """A structlog logger that sends rendered lines to the journal, or to stderr while it does not take them."""

    def __init__(self, *_: object) -> None:
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC)

    def msg(self, message: str) -> None:
        data = message.encode("latin-1")
        try:
            self._socket.sendto(data, SOCKET)
        except OSError:
            line = data.partition(b"PRIORITY=")[0].removeprefix(b"MESSAGE=")
            sys.stderr.write(line.decode("utf-8", "replace"))
            sys.stderr.flush()

    debug = info = warning = error = critical = exception = msg
