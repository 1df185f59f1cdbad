"""Which references have been let read a layer by its registry: who may have what is cached of it."""

from __future__ import annotations

import os
import threading
from pathlib import Path

_MAX = 256  # references; the oldest go first, and are asked about again
_MAX_FILE = 1 << 20


class AccessList:
    """The file `access` beside a layer's data: a line `REGISTRY/REPOSITORY@DIGEST` each, the newest last.

    Threads: any. It goes with the layer's directory; a file that is lost or torn costs a question to a registry. Where
    it cannot be written the daemon remembers by itself.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock = threading.Lock()
        self._dirty = False
        self._known: dict[str, None] = dict.fromkeys(self._load())

    def _load(self) -> list[str]:
        try:
            with open(self._path, "rb") as file:
                lines = file.read(_MAX_FILE).decode("utf-8", "replace").split("\n")
        except OSError:
            return []
        return [line for line in lines[:-1] if line][-_MAX:]  # what follows the last newline is torn

    def has(self, reference: str) -> bool:
        return reference in self._known

    def registries(self) -> set[str]:
        """host[:port] of every registry that has confirmed one."""
        with self._lock:
            return {reference.partition("/")[0] for reference in self._known}

    def add(self, reference: str) -> None:
        """A registry has let `reference` read the layer. It is on disk after the next `flush`."""
        with self._lock:
            self._known.pop(reference, None)
            self._known[reference] = None
            while len(self._known) > _MAX:
                del self._known[next(iter(self._known))]
            self._dirty = True

    def flush(self) -> None:
        """Write what was added. Raises OSError."""
        with self._lock:
            if not self._dirty:
                return
            data = "".join(f"{reference}\n" for reference in self._known).encode()
            self._dirty = False
        temporary = self._path.with_name("access.tmp")
        try:
            with open(temporary, "wb") as file:
                file.write(data)
                file.flush()
                os.fdatasync(file.fileno())
            temporary.rename(self._path)
        except OSError:
            self._dirty = True
            raise
