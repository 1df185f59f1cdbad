"""A small control-socket server for tests of the wrapper: it answers `acquire` with a directory that is there already.

It speaks the protocol of `shim/ARCHITECTURE.md` and can be told to answer wrongly, late or not at all.
"""

from __future__ import annotations

import json
import os
import socket
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

DIGEST = "sha256:" + "ab" * 32


class FakeDaemon:
    """Serves `run_dir`/control.sock in threads. `requests` holds (request, content of the descriptor or None);
    `connections` counts those open now. `answer` may be replaced by any value or a function of the request."""

    def __init__(self, run_dir: Path, tree: Path, *, index: str = DIGEST) -> None:
        self.tree = tree
        self.requests: list[tuple[dict[str, Any], bytes | None]] = []
        self.answer: dict[str, Any] | bytes | Callable[[dict[str, Any]], dict[str, Any]] = {
            "ok": True,
            "index": index,
            "image": "registry.test/busybox:latest",
            "tree": str(tree),
            "tier": "fake",
            "symlinks": describe_links(tree),
            "dirs": [name for name in ("proc", "dev", "sys") if (tree / name).is_dir()],
        }
        self.connections = 0
        run_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._lock = threading.Lock()
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        directory = os.open(run_dir, os.O_PATH)
        self._socket.bind(f"/proc/self/fd/{directory}/control.sock")  # a test's path may be longer than 107 bytes
        os.close(directory)
        self._path = run_dir / "control.sock"
        self._socket.listen(64)
        threading.Thread(target=self._serve, daemon=True).start()

    def close(self) -> None:
        """Stop listening; a second time does nothing."""
        self._path.unlink(missing_ok=True)
        if self._socket.fileno() >= 0:
            self._socket.shutdown(socket.SHUT_RDWR)
            self._socket.close()

    def _serve(self) -> None:
        while True:
            try:
                connection, _ = self._socket.accept()
            except OSError:
                return
            threading.Thread(target=self._talk, args=(connection,), daemon=True).start()

    def _talk(self, connection: socket.socket) -> None:
        with self._lock:
            self.connections += 1
        try:
            with connection:
                data, fds, _, _ = socket.recv_fds(connection, 65536, 4)
                while data and not data.endswith(b"\n"):
                    data += connection.recv(65536)
                if not data:
                    return
                request = json.loads(data)
                content = None
                for fd in fds:
                    with os.fdopen(fd, "rb") as file:
                        content = file.read()
                with self._lock:
                    self.requests.append((request, content))
                answer = self.answer(request) if callable(self.answer) else self.answer
                connection.sendall(answer if isinstance(answer, bytes) else json.dumps(answer).encode() + b"\n")
                while connection.recv(4096):  # the tree stays mounted while this is open
                    pass
        except OSError:
            pass  # the wrapper was killed
        finally:
            with self._lock:
                self.connections -= 1


def describe_links(tree: Path) -> dict[str, dict[str, object]]:
    """The root's symlinks as the daemon describes them."""
    return {
        entry.name: {"target": os.readlink(entry), "resolves": _resolves(tree, os.readlink(entry))}
        for entry in tree.iterdir()
        if entry.is_symlink()
    }


def _resolves(tree: Path, target: str) -> bool:
    return (tree / target.lstrip("/")).exists()
