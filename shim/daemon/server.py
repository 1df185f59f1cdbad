"""`clip-shim daemon`: puts the parts together and serves until SIGTERM."""

from __future__ import annotations

import faulthandler
import fcntl
import os
import resource
import select
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

from shim import __version__, log
from shim.daemon import jobs, mounter, notify
from shim.daemon.control import Answer, ControlServer, Session
from shim.daemon.layers import Layers
from shim.daemon.trees import Trees, overlay_users
from shim.errors import CacheError, DaemonError, IndexFormatError, ShimError
from shim.fuse import connection
from shim.fuse.server import BlobServer
from shim.settings import Settings

_REAP_SECONDS = 5.0
_SWEEP_SECONDS = 60.0
_SHOWN = 1024  # characters of a reference in a message


def serve(settings: Settings) -> int:
    """Serve until SIGTERM or SIGINT; returns the exit code. Raises ShimError when it cannot start."""
    log.configure(settings["log.level"], settings["log.format"])
    sys.setswitchinterval(0.0005)  # the GIL's: a cached read waits this long beside CPU-bound threads, not 5 ms
    faulthandler.register(signal.SIGUSR1)
    resource.setrlimit(resource.RLIMIT_NOFILE, (resource.getrlimit(resource.RLIMIT_NOFILE)[1],) * 2)
    stop = _stop_requests()
    try:
        daemon = Daemon(settings)
    except ShimError as error:
        notify.failed(str(error))
        raise
    daemon.start()
    notify.ready()
    log.info("daemon serves", pid=os.getpid(), version=__version__, run_dir=str(settings.run_dir))
    while not select.select([stop], [], [], _REAP_SECONDS)[0]:
        daemon.tick()
    return daemon.stop()


def _stop_requests() -> int:
    """A descriptor that becomes readable with SIGTERM or SIGINT. Blocking them for sigwait(3) would not do:
    multiprocessing unblocks both when it starts its helpers."""
    reader, writer = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: None)
    return reader


class Daemon:
    """The composition root. Threads: FUSE readers, fetch pool, control accept + one a connection, this main loop.

    Only one daemon uses a RUN directory: an flock on RUN/daemon.lock, and one on the cache (see shim/cache).
    """

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        run = settings.run_dir
        for directory in (run, settings.state_dir):
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            os.chmod(directory, 0o700)
        self._next_sweep = 0.0
        self._lock_fd = _exclusive(run / "daemon.lock")
        jobs.start()
        blobs = run / "blobs"
        for path in jobs.run(20, mounter.clear_stale, str(run)):
            log.warning("left by a daemon that died, detached", path=path)
        blobs.mkdir(mode=0o700, exist_ok=True)
        self._blobs_dir = str(blobs)
        self._fuse_fd = connection.mount(self._blobs_dir)
        self._server = BlobServer.create(self._fuse_fd, run, read_deadline=settings["read_deadline"])
        self._layers = Layers(settings, self._server)
        self._trees = Trees(settings, self._layers, self._blobs_dir)
        self._control = ControlServer(
            run / "control.sock",
            {"acquire": self._acquire, "status": self._status, "ping": lambda *_: {"pid": os.getpid()}},
        )

    def start(self) -> None:
        self._server.start()
        threading.Thread(target=self._control.serve, name="accept", daemon=True).start()
        threading.Thread(target=self._warm, name="warm", daemon=True).start()

    def _warm(self) -> None:
        """What the first container would otherwise wait for."""
        try:
            self._trees.tier()
            self._layers.warm()
        except ShimError as error:
            log.error("no tree can be mounted here", error=str(error), hint=error.hint)

    def tick(self) -> None:
        try:
            self._trees.reap()
            if time.monotonic() >= self._next_sweep:
                self._sweep()
        except ShimError as error:
            log.warning("housekeeping failed", error=str(error))

    def _sweep(self) -> None:
        self._next_sweep = time.monotonic() + _SWEEP_SECONDS
        run, state = str(self._settings.run_dir), str(self._settings.state_dir)
        for directory in jobs.run(60, mounter.sweep_containers, run, state):
            log.info("cleaned up after a container that is gone", directory=directory)

    def stop(self) -> int:
        """Unmount what nobody uses and end. What is in use stays mounted; its uncached reads fail until a start."""
        self._control.close()
        self._trees.close()
        if self._layers.open_count():
            log.warning(
                "containers still use layers: their uncached reads fail from now on", layers=self._layers.open_count()
            )
        else:
            try:
                jobs.run(10, mounter.unmount_blobs, self._blobs_dir)
            except ShimError as error:
                log.warning("blobs not unmounted", error=str(error))
        self._server.stop()
        self._layers.close()
        log.info("daemon stopped")
        return 0

    def _acquire(self, session: Session, request: dict[str, Any], fds: list[int]) -> Answer:
        if not fds:
            raise DaemonError(
                f"the reference {str(request.get('value'))[:_SHOWN]!r} names no file",
                hint="this version reads indexes from files: make one with `clip-shim index REF -o FILE`",
            )
        try:
            lease = self._trees.acquire(fds[0])
        except IndexFormatError as error:
            raise IndexFormatError(f"{str(request.get('value'))[:_SHOWN]}: {error}", hint=error.hint) from error
        session.on_close.append(lease.release)
        return lease.answer

    def _status(self, _session: Session, _request: dict[str, Any], _fds: list[int]) -> Answer:
        tier, reason = self._trees.tier()
        containers = [
            {"rootfs": path, "index": f"sha256:{hex_}"} for hex_, paths in overlay_users().items() for path in paths
        ]
        return {
            "daemon": {"pid": os.getpid(), "version": __version__, "tier": tier, "tier_reason": reason},
            "images": self._trees.status(),
            "containers": containers,
            "layers": self._layers.status(),
            "registries": self._layers.traffic(),
            "waiting": self._layers.waiting(),
        }


def _exclusive(path: Path) -> int:
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(fd)
        raise CacheError(
            f"another daemon serves {path.parent}", hint="see `clip-shim status`; stop that one first"
        ) from None
    return fd
