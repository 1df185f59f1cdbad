"""The one logging set-up: console lines on a terminal, journal fields under systemd, one JSON object a line elsewhere.

structlog is imported with the first line that is written, since a starting daemon serves reads before it talks.
Secrets never come here: callers log hosts, digests and paths, not URLs with queries, headers or credentials.
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

_LEVELS = {"debug": 10, "info": 20, "warning": 30, "error": 40}
_lock = threading.Lock()
_logger: Any = None
_level = "info"
_format = "auto"
_context: ContextVar[dict[str, object]] = ContextVar("log", default={})  # noqa: B039  replaced, never altered


def configure(level: str, format_: str) -> None:
    """Set the least level and the form ("auto", "console", "json", "journal"), for lines written from now on."""
    global _level, _format, _logger
    with _lock:
        _level, _format, _logger = level, format_, None


@contextmanager
def context(**fields: object) -> Iterator[None]:
    """Fields of every line that this thread writes inside; those that are None are left out."""
    token = _context.set({**_context.get(), **{key: value for key, value in fields.items() if value is not None}})
    try:
        yield
    finally:
        _context.reset(token)


def _form() -> str:
    if _format != "auto":
        return _format
    if sys.stderr.isatty():
        return "console"
    # systemd.exec(5): device and inode of the stream that leads to the journal, so that a redirected stderr is noticed
    status = os.fstat(2)
    return "journal" if os.environ.get("JOURNAL_STREAM") == f"{status.st_dev}:{status.st_ino}" else "json"


def _get() -> Any:
    global _logger
    with _lock:
        if _logger is None:
            import structlog

            form = _form()
            renderer: Any = structlog.processors.JSONRenderer()
            factory: Any = structlog.PrintLoggerFactory(sys.stderr)
            if form == "console":
                renderer = structlog.dev.ConsoleRenderer()
            elif form == "journal":
                from shim.journal import Journal, render

                renderer, factory = render, Journal
            structlog.configure(
                processors=[
                    structlog.processors.add_log_level,
                    structlog.processors.TimeStamper(fmt="iso", utc=True),
                    structlog.processors.format_exc_info,
                    renderer,
                ],
                wrapper_class=structlog.make_filtering_bound_logger(_LEVELS[_level]),
                logger_factory=factory,
                cache_logger_on_first_use=False,
            )
            _logger = structlog.get_logger()
        return _logger


def debug(event: str, **fields: object) -> None:
    if _level == "debug":
        _get().debug(event, **{**_context.get(), **fields})


def info(event: str, **fields: object) -> None:
    _get().info(event, **{**_context.get(), **fields})


def warning(event: str, **fields: object) -> None:
    _get().warning(event, **{**_context.get(), **fields})


def error(event: str, **fields: object) -> None:
    _get().error(event, **{**_context.get(), **fields})


def exception(event: str, **fields: object) -> None:
    """An error with the current traceback: only for what should never happen."""
    _get().exception(event, **{**_context.get(), **fields})
