"""Tells the service manager that the daemon is well, as long as it is: what hangs without a crash is started again."""

from __future__ import annotations

import threading

from shim import log
from shim.daemon import jobs, mounter, notify
from shim.errors import ShimError

_PINGS = 3  # in each period of the manager's: one or two may fail on a busy machine


class Watchdog:
    """One thread, if the manager asks for it (`WatchdogSec=`). Before each ping a job asks the FUSE server something
    over its own mount, so that a ping says: requests are read, answered, and jobs can be made.

    `close` before the server stops: a job that nobody answers any more would wait in the kernel, deaf to SIGTERM, and
    this process at its end for the job.
    """

    def __init__(self, blobs_dir: str, stopping: threading.Event) -> None:
        self._blobs = blobs_dir
        self._stopping = stopping
        self._seconds = notify.watchdog_seconds()
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        if self._seconds is not None:
            period = self._seconds / _PINGS
            self._thread = threading.Thread(target=self._run, args=(period,), name="watchdog", daemon=True)
            self._thread.start()

    def close(self) -> None:
        """Look no more; what is being looked at is answered, or given up at its deadline. `stopping` is set."""
        if self._thread is not None:
            self._thread.join()

    def _run(self, period: float) -> None:
        while True:
            try:
                jobs.run(period, mounter.look_at_blobs, self._blobs)
            except ShimError as error:
                log.error("the daemon does not answer its own mount", error=str(error))
            else:
                notify.notify("WATCHDOG=1")
            if self._stopping.wait(period):
                return
