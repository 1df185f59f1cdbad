"""The one logging set-up: console lines on a terminal, one JSON object a line elsewhere.

structlog is imported with the first line that is written, since a starting daemon serves reads before it talks.
Secrets never come here: callers log hosts, digests and paths, not URLs with queries, headers or credentials.
"""

from __future__ import annotations

import sys
import threading
from typing import Any

_LEVELS = {"debug": 10, "info": 20, "warning": 30, "error": 40}
_lock = threading.Lock()
_logger: Any = None
_level = "info"
_format = "auto"


def configure(level: str, format_: str) -> None:
    """Set the least level and the form ("auto", "console", "json"). Takes effect for lines written from now on."""
    global _level, _format, _logger
    with _lock:
        _level, _format, _logger = level, format_, None


def _get() -> Any:
    global _logger
    with _lock:
        if _logger is None:
            import structlog

            console = _format == "console" or (_format == "auto" and sys.stderr.isatty())
            renderer: Any = structlog.dev.ConsoleRenderer() if console else structlog.processors.JSONRenderer()
            structlog.configure(
                processors=[
                    structlog.processors.add_log_level,
                    structlog.processors.TimeStamper(fmt="iso", utc=True),
                    structlog.processors.format_exc_info,
                    renderer,
                ],
                wrapper_class=structlog.make_filtering_bound_logger(_LEVELS[_level]),
                logger_factory=structlog.PrintLoggerFactory(sys.stderr),
                cache_logger_on_first_use=False,
            )
            _logger = structlog.get_logger()
        return _logger


def debug(event: str, **fields: object) -> None:
    if _level == "debug":
        _get().debug(event, **fields)


def info(event: str, **fields: object) -> None:
    _get().info(event, **fields)


def warning(event: str, **fields: object) -> None:
    _get().warning(event, **fields)


def error(event: str, **fields: object) -> None:
    _get().error(event, **fields)


def exception(event: str, **fields: object) -> None:
    """An error with the current traceback: only for what should never happen."""
    _get().exception(event, **fields)
