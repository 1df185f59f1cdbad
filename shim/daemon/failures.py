"""Says which file a read was for that failed or waits: the server knows a layer and an offset, people know files.

The name is looked up in a job (naming.py), one at a time, for all failures that came meanwhile: a container that reads
on after an error must cost neither the server's threads nor the log.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

from shim import log
from shim.daemon import jobs, naming
from shim.errors import ShimError
from shim.fuse.blob import ReadFailure

Places = Callable[[str], tuple[list[tuple[str, int]], list[str], list[str]]]  # Layers.places
_QUEUE = 256
_LINES = 8  # of one batch; the rest is counted
_PAUSE = 1.0  # seconds between batches
_DEADLINE = 20.0


class FailureLog:
    """`add` takes a failed read from any thread, at once; a thread of its own logs it: one line that names the file,
    the layer and offset, the host and the cause.

    trees: STATE/trees, where the indexes are. container: names the container of a process.
    """

    def __init__(self, places: Places, trees: Path, container: Callable[[int], str | None]) -> None:
        self._places = places
        self._container = container
        self.count = 0  # reads that failed
        self._trees = trees
        self._queue: queue.Queue[ReadFailure | None] = queue.Queue(_QUEUE)
        self._closed = threading.Event()
        self._lock = threading.Lock()
        self._lost = 0
        self._thread = threading.Thread(target=self._run, name="failures", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def add(self, failure: ReadFailure) -> None:
        with self._lock:
            self.count += 1
        try:
            self._queue.put_nowait(failure)
        except queue.Full:
            with self._lock:
                self._lost += 1

    def close(self) -> None:
        """Log what is left, without names of files, and end."""
        self._closed.set()
        try:
            self._queue.put_nowait(None)
        except queue.Full:
            pass  # the thread is awake then
        self._thread.join(5)

    def files(self, blob: str, ranges: Sequence[naming.Range], deadline: float = _DEADLINE) -> list[list[str]]:
        """For each (offset, length) of a blob the files that have bytes there; empty lists where nobody can say."""
        indexes, _, _ = self._places(blob)
        for hex_, number in indexes[:1]:
            try:
                index = str(self._trees / hex_ / "index.clip")
                return jobs.run(deadline, naming.name_files, index, number, list(ranges))
            except ShimError as error:
                log.debug("no file can be named", blob=blob, error=str(error))
        return [[] for _ in ranges]

    def _run(self) -> None:
        while True:
            first = self._queue.get()
            batch = [] if first is None else [first]
            while not self._queue.empty():
                item = self._queue.get_nowait()
                batch += [] if item is None else [item]
            with self._lock:
                lost, self._lost = self._lost, 0
            shown, lost = batch[:_LINES], lost + max(0, len(batch) - _LINES)
            for blob in dict.fromkeys(failure.blob for failure in shown):
                self._log(blob, [failure for failure in shown if failure.blob == blob])
            if lost:
                log.error("more reads failed", count=lost)
            if self._closed.is_set() and self._queue.empty():
                return
            self._closed.wait(_PAUSE)

    def _log(self, blob: str, failures: list[ReadFailure]) -> None:
        _, hosts, images = self._places(blob)
        ranges = [(failure.offset, failure.size) for failure in failures]
        names: list[list[str]] = [[] for _ in ranges] if self._closed.is_set() else self.files(blob, ranges)
        for failure, files in zip(failures, names, strict=True):
            log.error(
                "read failed",
                container=self._container(failure.pid),
                image=images[0] if images else None,
                file=files[0] if files else None,
                files=len(files),
                layer=f"sha256:{blob.partition('-')[0]}",
                offset=failure.offset,
                size=failure.size,
                host=", ".join(hosts),
                pid=failure.pid,
                waited=round(failure.waited, 3),
                cause=failure.cause,
            )
