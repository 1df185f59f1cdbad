"""What a successor must know to serve the same mount: INIT's result, the node ids, the files that are open.

    RUN/blobs.journal     {"v": 1, "next": 16}                         first line: version, first free node id
                          {"init": {"major": 7, …}}
                          {"node": 17, "name": "<hex>-<hex>", "size": 4096}   a blob was added
                          {"gone": 17}                                        and removed
                          {"open": 1234, "node": 17}                          OPEN answered; 1234 is the file handle
                          {"close": 1234}                                     RELEASE answered

Rules. Each line is one write(2) before the reply it is about, so a server that is killed leaves either no trace of a
request (the kernel delivers it again) or the whole. The file handle given to the kernel *is* the OPEN's `unique`
without the resend bit: an OPEN or RELEASE that is delivered twice changes nothing the second time. An OPEN whose reply
meets ENOENT stays recorded: after a hand-over the predecessor's reply may have won, and forgetting an open file would
be worse than remembering a closed one. RUN is a tmpfs and the mount does not survive a boot, so nothing is synced; a
last line without its newline is ignored.
"""

from __future__ import annotations

import errno
import json
import os
import threading
from pathlib import Path
from typing import Any

from shim.errors import DaemonError
from shim.fuse.proto import InitState

VERSION = 1
FIRST_NODE = 16
_COMPACT_LINES = 10_000


class Journal:
    """The journal file and what it says. Thread-safe; one process writes, the one that serves."""

    def __init__(self, path: Path, *, fresh: bool) -> None:
        """fresh: begin a new mount's journal, whatever was there; else load it. Raises DaemonError, OSError."""
        self.path = path
        self.init: InitState | None = None
        self.nodes: dict[int, tuple[bytes, int]] = {}  # node id -> (name, size)
        self.opens: dict[int, int] = {}  # file handle -> node id
        self.next_node = FIRST_NODE
        self._lock = threading.Lock()
        self._lines = 0
        self._fd = -1
        if not fresh:
            self._load()
        self._rewrite()

    def close(self) -> None:
        with self._lock:
            if self._fd >= 0:
                os.close(self._fd)
                self._fd = -1

    def record_init(self, state: InitState) -> None:
        with self._lock:
            self.init = state
            self._append({"init": state.to_json()})

    def allocate(self, name: bytes) -> int:
        """The node id of `name`: the recorded one, or a new one that no name ever had in this mount's life."""
        with self._lock:
            for node_id, (known, _) in self.nodes.items():
                if known == name:
                    return node_id
            self.next_node += 1
            return self.next_node - 1

    def add_node(self, node_id: int, name: bytes, size: int) -> None:
        with self._lock:
            if self.nodes.get(node_id) == (name, size):
                return
            self._append({"node": node_id, "name": os.fsdecode(name), "size": size})
            self.nodes[node_id] = (name, size)
            self.next_node = max(self.next_node, node_id + 1)

    def remove_node(self, node_id: int) -> None:
        with self._lock:
            if self.nodes.pop(node_id, None) is not None:
                self._append({"gone": node_id})

    def opened(self, handle: int, node_id: int) -> None:
        """Record an OPEN, before its reply. OSError: it could not be recorded, and must be refused."""
        with self._lock:
            if handle not in self.opens:
                self._append({"open": handle, "node": node_id})
                self.opens[handle] = node_id

    def closed(self, handle: int) -> None:
        """Record a RELEASE, before its reply."""
        with self._lock:
            if self.opens.pop(handle, None) is not None:
                self._append({"close": handle})

    def open_count(self, node_id: int) -> int:
        with self._lock:
            return sum(1 for node in self.opens.values() if node == node_id)

    def _append(self, record: dict[str, Any]) -> None:
        line = json.dumps(record).encode() + b"\n"
        written = os.write(self._fd, line)
        if written < len(line):  # what came behind it would make the whole journal unreadable
            os.ftruncate(self._fd, os.fstat(self._fd).st_size - written)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.path))
        self._lines += 1
        if self._lines > _COMPACT_LINES + 4 * (len(self.nodes) + len(self.opens)):
            try:
                self._rewrite()
            except OSError:
                self._lines = 0  # no room for both: the record is written, and a long journal is as good as a short one

    def _records(self) -> list[dict[str, Any]]:
        out: list[dict[str, Any]] = [{"v": VERSION, "next": self.next_node}]
        if self.init is not None:
            out.append({"init": self.init.to_json()})
        out += [{"node": n, "name": os.fsdecode(name), "size": size} for n, (name, size) in self.nodes.items()]
        out += [{"open": handle, "node": node} for handle, node in self.opens.items()]
        return out

    def _rewrite(self) -> None:
        """Write what is live to a new file and rename it over the old one: killed anywhere, one of both is whole."""
        records = self._records()
        temporary = self.path.with_name(self.path.name + ".tmp")
        fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND | os.O_CLOEXEC, 0o600)
        try:
            with os.fdopen(os.dup(fd), "wb") as out:
                out.write(b"".join(json.dumps(record).encode() + b"\n" for record in records))
            temporary.rename(self.path)
        except OSError:
            os.close(fd)
            temporary.unlink(missing_ok=True)  # the room that it takes is wanted
            raise
        if self._fd >= 0:
            os.close(self._fd)
        self._fd = fd
        self._lines = len(records)

    def _load(self) -> None:
        lines = self.path.read_bytes().split(b"\n")[:-1]
        try:
            head = json.loads(lines[0])
            if head["v"] != VERSION:
                raise ValueError(f"version {head['v']}")
            self.next_node = int(head["next"])
            for line in lines[1:]:
                self._replay(json.loads(line))
        except (LookupError, TypeError, ValueError, ArithmeticError, RecursionError) as error:
            raise DaemonError(f"{self.path} is damaged: {error}") from error

    def _replay(self, record: dict[str, Any]) -> None:
        if "init" in record:
            self.init = InitState.from_json(record["init"])
        elif "name" in record:
            self.nodes[int(record["node"])] = (os.fsencode(record["name"]), int(record["size"]))
            self.next_node = max(self.next_node, int(record["node"]) + 1)
        elif "gone" in record:
            self.nodes.pop(int(record["gone"]), None)
        elif "open" in record:
            self.opens[int(record["open"])] = int(record["node"])
        elif "close" in record:
            self.opens.pop(int(record["close"]), None)
