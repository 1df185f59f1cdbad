"""Work that is done once, however many ask for it at the same time."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable

from shim.errors import DaemonError, ShimError


class _Flight:
    """`done` is set at the end; error: why it failed."""

    def __init__(self) -> None:
        self.done = threading.Event()
        self.error: ShimError | None = None


class Flights:
    """`once(key, work)`: the first to ask for a key does the work, who comes meanwhile waits and shares its failure.

    Concurrency: `_lock` guards the table, and is not held during the work.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._flights: dict[str, _Flight] = {}

    def once(self, key: str, work: Callable[[], None]) -> None:
        """Return when the work is done, here or by another. Raises the ShimError it ended with."""
        mine = _Flight()
        with self._lock:
            flight = self._flights.setdefault(key, mine)
        if flight is not mine:
            flight.done.wait()
            if flight.error is not None:
                raise copy.copy(flight.error)
            return
        try:
            work()
        except ShimError as error:
            mine.error = error
            raise
        except BaseException as error:
            mine.error = DaemonError(f"internal error: {type(error).__name__}: {error}")
            raise
        finally:
            with self._lock:
                del self._flights[key]
            mine.done.set()
