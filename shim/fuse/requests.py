"""Parked requests: reads that wait for bytes, and the three ways out: answered, killed, too late.

An answer is given by whoever *takes* the request (`take` gives it to one caller only), so a late result, a deadline and
a kill never answer twice.

Interrupts (fs/fuse/dev.c: request_wait_answer). A reader that was delivered to the server waits in the kernel, deaf
even to SIGKILL, until there is an answer. The kernel sends INTERRUPT for *any* signal; answering EINTR then would turn
a harmless one (Go's SIGURG, a timer) into EIO in the program. So EINTR is the answer only when SIGKILL is pending for
the caller. That is looked at when INTERRUPT comes, and every 200 ms, since an INTERRUPT may overtake its request, and
a SIGKILL that follows another signal sends none of its own. The fetch behind it goes on.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from shim.counters import Histogram
from shim.fuse.blob import Blob

SCAN_SECONDS = 0.2
_SIGKILL_BIT = 1 << 8  # signal 9


@dataclass(slots=True)
class Parked:
    """A READ that waits. `since` and `deadline` are readings of time.monotonic()."""

    unique: int
    blob: Blob
    offset: int
    size: int
    pid: int  # the calling thread's id, 0 if the kernel did not say
    since: float
    deadline: float


def kill_pending(tid: int) -> bool:
    """True if SIGKILL waits for thread `tid` (SigPnd) or its process (ShdPnd), proc_pid_status(5).

    False for a thread that is gone or unknown. Opens /proc only, which never leads back to the mount.
    """
    if tid <= 0:
        return False
    try:
        with open(f"/proc/{tid}/status", "rb", buffering=0) as file:
            status = file.read(8192)
    except OSError:
        return False
    for line in status.split(b"\n"):
        if line.startswith((b"SigPnd:", b"ShdPnd:")) and int(line[7:], 16) & _SIGKILL_BIT:
            return True
    return False


class ParkedRequests:
    """All parked requests of a server, and the one thread that watches over them.

    The thread sleeps while nothing is parked. `killed` and `late` are called from it, or `killed` from the thread that
    reports an INTERRUPT, with a request that was taken: they answer it.
    """

    def __init__(self, killed: Callable[[Parked], None], late: Callable[[Parked], None]) -> None:
        self._killed = killed
        self._late = late
        self._requests: dict[int, Parked] = {}
        self._wake = threading.Condition()
        self._closed = False
        self.waits = Histogram()  # how long those that were answered had waited
        self._thread = threading.Thread(target=self._watch, name="fuse-parked", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def close(self) -> list[Parked]:
        """Stop watching; what is left stays unanswered (the kernel gives it to a successor that asks for it)."""
        with self._wake:
            self._closed = True
            left = list(self._requests.values())
            self._requests.clear()
            self._wake.notify_all()
        if self._thread.is_alive():
            self._thread.join()
        return left

    def park(self, request: Parked) -> None:
        with self._wake:
            if self._closed:
                return
            self._requests[request.unique] = request
            if len(self._requests) == 1:
                self._wake.notify_all()

    def take(self, unique: int) -> Parked | None:
        """Remove a request in order to answer it; None if another did."""
        with self._wake:
            request = self._requests.pop(unique, None)
            if request is not None:
                self.waits.add(time.monotonic() - request.since)
            return request

    def interrupt(self, unique: int) -> None:
        """The kernel reports a signal for a request: end it if the signal is SIGKILL."""
        with self._wake:
            request = self._requests.get(unique)
        if request is not None:
            self._end_if_killed(request)

    def snapshot(self) -> list[Parked]:
        with self._wake:
            return list(self._requests.values())

    def _end_if_killed(self, request: Parked) -> None:
        if kill_pending(request.pid) and self.take(request.unique) is not None:
            self._killed(request)

    def _watch(self) -> None:
        while True:
            with self._wake:
                while not self._requests and not self._closed:
                    self._wake.wait()
                if not self._closed:
                    self._wake.wait(SCAN_SECONDS)
                if self._closed:
                    return
                requests = list(self._requests.values())
            now = time.monotonic()
            for request in requests:
                if now >= request.deadline:
                    if self.take(request.unique) is not None:
                        self._late(request)
                else:
                    self._end_if_killed(request)
