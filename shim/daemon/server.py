"""`clip-shim daemon`: puts the parts together and serves until SIGTERM."""

from __future__ import annotations

import faulthandler
import os
import resource
import select
import signal
import sys
import threading
import time
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shim import __version__, log
from shim.cache.ownership import own
from shim.daemon import allocator, handover, jobs, mounter, notify, who, witness
from shim.daemon.background import Background
from shim.daemon.cleaner import Cleaner
from shim.daemon.control import Answer, ControlServer, Session
from shim.daemon.drain import Drain
from shim.daemon.eager import Eager
from shim.daemon.failures import FailureLog
from shim.daemon.layers import Layers
from shim.daemon.plan import Plan, Request
from shim.daemon.resolve import Resolver, show
from shim.daemon.starts import Starts
from shim.daemon.trees import Trees
from shim.daemon.trust import SOURCES
from shim.daemon.watchdog import Watchdog
from shim.errors import CacheError, DaemonError, IndexFormatError, ShimError
from shim.fuse import connection
from shim.fuse.server import BlobServer
from shim.settings import Settings

if TYPE_CHECKING:
    from shim.daemon.metrics import Endpoint

EXIT_BROKEN = 70  # sysexits(3), EX_SOFTWARE: the supervisor starts another
_REAP_SECONDS = 5.0
_SWEEP_SECONDS = 60.0
_NAMED = 64  # waiting reads whose files are looked up
_NAME_SECONDS = 4.0
_RELEASE_SECONDS = 2.0


def serve(settings: Settings) -> int:
    """Serve until SIGTERM or SIGINT; returns the exit code. Raises ShimError when it cannot start."""
    log.configure(settings["log.level"], settings["log.format"])
    sys.setswitchinterval(0.0005)  # the GIL's: a cached read waits this long beside CPU-bound threads, not 5 ms
    allocator.keep()
    faulthandler.enable()  # also for the watchdog's SIGABRT
    faulthandler.register(signal.SIGUSR1)
    resource.setrlimit(resource.RLIMIT_NOFILE, (resource.getrlimit(resource.RLIMIT_NOFILE)[1],) * 2)
    witness.leave()
    stop = _stop_requests()
    try:
        daemon = _make(settings)
    except ShimError as error:
        notify.failed(str(error))
        raise
    daemon.start()
    notify.ready()
    log.info("daemon serves", pid=os.getpid(), version=__version__, run_dir=str(settings.run_dir))
    select.select([stop, daemon.broken], [], [])
    asked = bool(select.select([stop], [], [], 0)[0])
    if not asked:
        log.error("somebody has unmounted the blob files: ending, so that another server mounts them again")
    daemon.stop()
    return 0 if asked else EXIT_BROKEN


def _make(settings: Settings) -> Daemon:
    try:
        return Daemon(settings)
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        raise DaemonError(
            f"the daemon cannot start: {where}{error.strerror or error}",
            hint="it runs as root; see `run_dir` and `state_dir` in `clip-shim config show`",
        ) from error


def _stop_requests() -> int:
    """A descriptor that becomes readable with SIGTERM, SIGINT or SIGHUP. Blocking them for sigwait(3) would
    not do: multiprocessing unblocks some when it starts its helpers."""
    reader, writer = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, lambda *_: None)
    return reader


class Daemon:
    """The composition root. Threads: FUSE readers, fetch pool, control accept + one a connection, failure log,
    housekeeping; the main one waits for signals.

    Only one daemon uses a RUN directory: an flock on RUN/daemon.lock, and one on the cache (see shim/cache).
    """

    def __init__(self, settings: Settings) -> None:
        """Takes the locks, then takes over a predecessor's blobs, or clears what it left and mounts new ones. Raises
        ShimError, OSError; then nothing that is new is left mounted."""
        self._settings = settings
        passed = notify.inherited()
        run = settings.run_dir
        for directory in (run, settings.state_dir):
            _make_private(directory)
        self._stopping = threading.Event()
        self._since = time.monotonic()
        self.broken = os.eventfd(0, os.EFD_CLOEXEC)  # readable when the blobs were unmounted by somebody else
        self._lock_fd = _exclusive(run / "daemon.lock")
        self._blobs_dir = str(run.resolve() / "blobs")  # as mountinfo has it
        self._watchdog = Watchdog(self._blobs_dir, self._stopping)
        taken = handover.take(passed, run)
        self._failures = FailureLog(self._places, settings.state_dir / "trees", self._container_of)
        self._resolver = Resolver(settings)
        with ExitStack() as undo:
            self._fuse_fd = taken[0] if taken else self._mount_blobs(run, undo)
            self._server = BlobServer.create(
                self._fuse_fd,
                run,
                journal=taken[1] if taken else None,
                read_deadline=settings["read_deadline"],
                on_failure=self._failures.add,
                on_unmounted=lambda: os.eventfd_write(self.broken, 1),
            )
            self._full = threading.Event()  # the cleaner is wanted at once
            self._layers = Layers(settings, self._server, self._full.set)
            self._trees = Trees(settings, self._layers, self._blobs_dir)
            if taken:
                handover.restore(settings, taken[1], self._layers, self._trees)
            else:
                notify.store(handover.BLOBS, self._fuse_fd)
            self._cleaner = Cleaner(settings, self._layers, self._trees)
            self._background = Background(settings, self._layers, self._trees, self._cleaner)
            self._drain = Drain(self._background, run)
            self._starts = Starts(self._layers, settings["report.seconds"])
            self._plan = Plan(settings, self._resolver, self._trees, Eager(settings, self._layers))
            self._control = ControlServer(
                run / "control.sock",
                {
                    "acquire": self._acquire,
                    "started": self._starts.started,
                    "report": self._starts.report,
                    "status": self._status,
                    "distrust": self._distrust,
                    "profile": self._profile,
                    "clean": self._cleaner.asked,
                    "drain": self._drain.asked,
                    "ping": lambda *_: {"pid": os.getpid()},
                },
                *(passed.get("control", []) + passed.get(handover.LISTENER, []))[:1],
            )
            # who connects while we are replaced waits; systemd has a unit for that, which can be stopped
            if notify.supervisor() and "control" not in passed:
                notify.store(handover.LISTENER, self._control.listener)
                self._control.outlives_us()
            self._metrics: Endpoint | None = None
            undo.pop_all()

    def _mount_blobs(self, run: Path, undo: ExitStack) -> int:
        jobs.start()
        for path in jobs.run(20, mounter.clear_stale, str(run)):
            log.warning("left by a daemon that died, detached", path=path)
        os.makedirs(self._blobs_dir, 0o700, exist_ok=True)
        fd = connection.mount(self._blobs_dir)
        undo.callback(jobs.run, 10, mounter.clear_stale, str(run))
        undo.callback(os.close, fd)
        return fd

    def _serve_metrics(self) -> None:
        """Where `metrics.listen` says so; tried again from time to time: a predecessor may still have the address."""
        listen = self._settings["metrics.listen"]
        if not listen or self._metrics is not None:
            return
        try:
            from shim.daemon.measures import Measures
            from shim.daemon.metrics import Endpoint

            parts = (self._layers, self._trees, self._server, self._starts, self._failures)
            self._metrics = Endpoint(listen, Measures(*parts, self._settings.state_dir))
        except (DaemonError, ImportError) as error:
            log.error("no metrics are served", error=str(error))

    def _places(self, blob: str) -> tuple[list[tuple[str, int]], list[str], list[str]]:
        return self._layers.places(blob)

    def _container_of(self, pid: int) -> str | None:
        return who.describe(pid, who.containers(self._settings.run_dir))[1]

    def start(self) -> None:
        self._server.start()
        jobs.start()
        self._failures.start()
        self._watchdog.start()
        threads = {"accept": self._control.serve, "warm": self._warm, "housekeeping": self._housekeeping}
        threads["background"] = self._background.loop
        threads["cleaner"] = lambda: self._cleaner.loop(self._full, self._stopping)
        for name, target in threads.items():
            threading.Thread(target=target, name=name, daemon=True).start()

    def _warm(self) -> None:
        """What the first container would otherwise wait for."""
        try:
            self._trees.tier()
            self._layers.warm()
        except (ShimError, OSError) as error:
            hint = error.hint if isinstance(error, ShimError) else None
            log.error("no tree can be mounted here", error=str(error), hint=hint)

    def _housekeeping(self) -> None:
        self._serve_metrics()
        next_sweep = 0.0
        period = min(_REAP_SECONDS, max(0.1, self._settings["tree_linger"] / 2))
        while not self._stopping.wait(period):
            try:
                self._trees.reap()
                self._starts.tick()
                if time.monotonic() >= next_sweep:
                    next_sweep = time.monotonic() + _SWEEP_SECONDS
                    allocator.trim()
                    self._sweep()
                    self._serve_metrics()
            except ShimError as error:
                log.warning("housekeeping failed", error=str(error))
            except Exception:  # noqa: BLE001  whatever it is, the next round may be better
                log.exception("housekeeping failed")

    def _sweep(self) -> None:
        run, state = str(self._settings.run_dir), str(self._settings.state_dir)
        for directory in jobs.run(60, mounter.sweep_containers, run, state):
            log.info("cleaned up after a container that is gone", directory=directory)

    def stop(self) -> None:
        """Unmount what nobody uses and end. What is in use stays mounted: its uncached reads wait for a successor, or
        fail if nobody keeps our descriptor for one."""
        self._stopping.set()
        self._full.set()
        self._watchdog.close()
        self._background.close()
        self._control.close()
        if self._metrics is not None:
            self._metrics.close()
        self._trees.close()
        if self._blobs_are_free():
            try:
                jobs.run(10, mounter.unmount_blobs, self._blobs_dir)
                notify.unstore(handover.BLOBS)
            except ShimError as error:
                log.warning("blobs not unmounted", error=str(error))
        elif notify.keeps_fds():
            log.info("containers still use layers: their uncached reads wait", layers=self._layers.open_count())
        else:
            log.warning(
                "containers still use layers: their uncached reads fail from now on", layers=self._layers.open_count()
            )
        self._server.stop()
        self._failures.close()
        self._layers.close()
        log.info("daemon stopped")

    def _blobs_are_free(self) -> bool:
        """Whether the kernel has closed every blob. The last RELEASE comes a little after the last unmount."""
        end = time.monotonic() + _RELEASE_SECONDS
        while self._layers.open_count():
            if time.monotonic() > end or self._trees.are_used():
                return False
            time.sleep(0.01)
        return True

    def _acquire(self, session: Session, request: dict[str, Any], fds: list[int]) -> Answer:
        source, value = str(request.get("source")), str(request.get("value"))
        if source not in SOURCES:
            raise DaemonError(f"unknown source of a reference: {source[:40]!r}")
        begin = self._starts.asked(session)
        try:
            lease = self._plan.acquire(Request(source, value, fds[0] if fds else None, session.announce))
        except IndexFormatError as error:
            raise IndexFormatError(f"{show(value)}: {error}", hint=error.hint) from error
        session.on_close.append(lease.release)
        self._starts.acquired(session, request, begin, lease.answer, lease.blobs)
        return lease.answer

    def _distrust(self, _session: Session, request: dict[str, Any], _fds: list[int]) -> Answer:
        """`{"layer": blob name, "spans": [number, …]}`: they hash wrong on disk, says `clip-shim cache verify`."""
        spans = request.get("spans")
        if not isinstance(spans, list) or not all(type(span) is int for span in spans):
            raise DaemonError("`spans` must be a list of numbers")
        return {"refetched": self._layers.cache.distrust(str(request.get("layer")), spans)}

    def _status(self, _session: Session, request: dict[str, Any], _fds: list[int]) -> Answer:
        try:
            tier, reason = self._trees.tier()
        except ShimError as error:
            tier, reason = "none", str(error)
        known = who.containers(self._settings.run_dir)
        return {
            "daemon": {
                "pid": os.getpid(),
                "version": __version__,
                "tier": tier,
                "tier_reason": reason,
                "supervisor": notify.supervisor(),
                "handover": handover.possible(self._server),
                "uptime": round(time.monotonic() - self._since, 1),
                "read_failures": self._failures.count,
            },
            "images": self._trees.status(),
            "containers": [asdict(container) for container in known.values()],
            "layers": self._layers.status(),
            "registries": self._layers.traffic(),
            "waiting": self._waiting(known, with_files=bool(request.get("files"))),
        }

    def _profile(self, _session: Session, request: dict[str, Any], _fds: list[int]) -> Answer:
        return {"spans": self._trees.profile(str(request.get("index")).removeprefix("sha256:"))}

    def _waiting(self, known: dict[bytes, who.Container], *, with_files: bool) -> list[Answer]:
        """The reads that wait, oldest first. with_files: the first ones' files too, which costs a job."""
        rows = []
        for read in self._layers.waiting():
            process, container = who.describe(read.pid, known)
            layer = f"sha256:{read.blob.partition('-')[0]}"
            rows.append({**asdict(read), "layer": layer, "process": process, "container": container, "file": None})
        if with_files:
            named = rows[:_NAMED]
            for blob in {row["blob"] for row in named}:
                mine = [row for row in named if row["blob"] == blob]
                files = self._failures.files(blob, [(row["offset"], row["size"]) for row in mine], _NAME_SECONDS)
                for row, found in zip(mine, files, strict=True):
                    row["file"] = found[0] if found else None
        return rows


def _make_private(path: Path) -> None:
    """Whoever has made it before us, in /tmp for instance, could put another in the place of any file in it."""
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    owner = path.stat().st_uid
    if owner not in (0, os.geteuid()):
        raise DaemonError(
            f"{path} belongs to uid {owner}, not to root", hint=f"chown root:root {path}, or set another directory"
        )
    os.chmod(path, 0o700)


def _exclusive(path: Path) -> int:
    try:
        return own(path)
    except BlockingIOError:
        raise CacheError(
            f"another daemon serves {path.parent}", hint="see `clip-shim status`; stop that one first"
        ) from None
