"""The layer cache as a directory: one daemon's, many layers', with one thread that makes bits durable."""

from __future__ import annotations

import errno
import fcntl
import os
import re
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from shim import log
from shim.cache import bitmap, discard
from shim.cache.layer import CachedLayer
from shim.cache.memory import MemorySpans
from shim.cache.ownership import own
from shim.errors import CacheError
from shim.index.model import Spans

FLUSH_SECONDS = 2.0
MEMORY_BYTES = 64 << 20
_COMPLAIN_SECONDS = 60.0
SEED_PREFIX = ".seed-"
_NAME = re.compile(r"[0-9a-f]{64}-[0-9a-f]{16}")
_FULL = (errno.ENOSPC, errno.EDQUOT)


@dataclass(frozen=True, slots=True)
class Entry:
    """A layer on disk. `allocated`: bytes it takes there; `last_used`: seconds since the epoch."""

    name: str
    allocated: int
    last_used: float
    is_open: bool


def layer_name(diff_id: str, identity: bytes) -> str:
    """A layer's directory and blob name. Raises CacheError when `diff_id` is not sha256:<64 hex>.

    identity: of the span file: indexes that agree on a diff id but not on how to get it and what it hashes to share
    nothing, so a false one can neither put its bytes before another's containers nor make their fetches fail.
    """
    name = f"{diff_id.removeprefix('sha256:')}-{identity.hex()[:16]}"
    if not _NAME.fullmatch(name):
        raise CacheError(f"{diff_id!r} is no diff id", hint="it must be sha256: and 64 hexadecimal digits")
    return name


def entries(root: Path) -> list[Entry]:
    """Every layer in a cache directory, by name; `is_open` is false: only the cache's own daemon knows."""
    found = []
    for path in sorted(root.iterdir()) if root.is_dir() else []:
        if not _NAME.fullmatch(path.name):
            continue
        try:
            data = (path / "data").stat()
        except OSError:
            continue  # removed meanwhile, or never finished
        try:
            used = (path / "meta.json").stat().st_mtime
        except OSError:
            used = data.st_mtime
        found.append(Entry(path.name, data.st_blocks * 512, used, is_open=False))
    return found


def take_lock(root: Path) -> int:
    """The cache's own lock: a descriptor that holds it. Raises CacheError: somebody has it, or there can be none."""
    try:
        root.mkdir(mode=0o700, parents=True, exist_ok=True)
        try:
            return own(root / "lock")
        except OSError as error:
            if error.errno != errno.EROFS:
                raise
        fd = os.open(root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)  # nothing can be made there: itself, then
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BaseException:
            os.close(fd)
            raise
        return fd
    except BlockingIOError:
        raise CacheError(
            f"another daemon uses the cache {root}", hint="see `clip-shim status`; stop that one first"
        ) from None
    except OSError as error:
        raise CacheError(
            f"cannot use the cache directory {root}: {error.strerror}", hint="see `state_dir` in the config"
        ) from error


@contextmanager
def cleaners_turn(root: Path) -> Iterator[None]:
    """Taken by a cleaner before the cache's own lock, and by a daemon that finds that taken: so it waits for a cleaner,
    which is done soon, and for nobody else."""
    fd = os.open(root / "clean.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)


class LayerCache:
    """STATE/cache, held by one daemon.

        STATE/cache/lock     exclusive flock for as long as the daemon lives; the kernel frees it when it dies
        STATE/cache/clean.lock   see `cleaners_turn`
        STATE/cache/clock    see clock.py
        STATE/cache/<name>/  see CachedLayer

    Threads: any may call any method. One of its own flushes dirty layers FLUSH_SECONDS after the first change.
    When the disk refuses a write, spans are kept in memory (`memory_bytes` for all layers together), one line is logged
    a minute at most, and `on_full` is called if space is what is missing: it wakes the cleaner.
    """

    def __init__(
        self, root: Path, *, memory_bytes: int = MEMORY_BYTES, on_full: Callable[[], None] | None = None
    ) -> None:
        """Raises CacheError: another daemon has this cache, or the directory cannot be made at all."""
        self.root = root
        self.memory = MemorySpans(memory_bytes)
        self._on_full = on_full
        self._lock = threading.Lock()
        self._lock_complaint = threading.Lock()
        self._layers: dict[str, CachedLayer] = {}
        self._complained = -_COMPLAIN_SECONDS
        self._dirty = threading.Event()
        self._closed = threading.Event()
        self._lock_fd = self._take()
        for left in self.root.glob(f"{SEED_PREFIX}*"):  # of jobs that were killed (seed.py)
            shutil.rmtree(left, ignore_errors=True)
        self._flusher = threading.Thread(target=self._flush_loop, name="cache-flush", daemon=True)
        self._flusher.start()

    def layer(self, diff_id: str, spans: Spans, identity: bytes | None = None) -> CachedLayer:
        """Open or create a layer's cache. Raises CacheError when it is open already or `diff_id` is malformed.

        identity: see layer_name; the table's digest if the spans are in no file.
        """
        name = layer_name(diff_id, spans.table_digest() if identity is None else identity)
        with self._lock:
            if name in self._layers:
                raise CacheError(f"the layer {name} is open already")
            layer = self._layers[name] = CachedLayer(
                self.root / name,
                diff_id,
                spans,
                self.memory,
                on_dirty=self._dirty.set,
                on_write_error=self.write_failed,
            )
        return layer

    def close_layer(self, layer: CachedLayer) -> None:
        """Close a layer. Only when no thread reads it any more (see CachedLayer)."""
        with self._lock:
            self._layers.pop(layer.path.name, None)
        layer.close()

    def entries(self) -> list[Entry]:
        """Every layer on disk, open or not."""
        return [replace(entry, is_open=entry.name in self._layers) for entry in entries(self.root)]

    def remove(self, name: str) -> bool:
        """Delete a layer from disk; False, and nothing done, while it is open. Raises CacheError on a bad name."""
        if not _NAME.fullmatch(name):
            raise CacheError(f"{name!r} is no cached layer")
        with self._lock:  # which `layer` has too: who opens it meanwhile gets an empty one
            if name in self._layers:
                return False
            aside = discard.set_aside(self.root / name)
        discard.delete(aside)
        return True

    def distrust(self, name: str, spans: list[int]) -> int:
        """Spans of a layer are said to be wrong on disk (`clip-shim cache verify`): hash them again if the layer is
        open, else take their bits back. Returns how many are fetched anew. Raises CacheError, OSError."""
        if not _NAME.fullmatch(name):
            raise CacheError(f"{name!r} is no cached layer")
        with self._lock:
            layer = self._layers.get(name)
            if layer is None:
                try:
                    return bitmap.clear(self.root / name / "bitmap", spans)
                except FileNotFoundError:
                    return 0
        return layer.recheck(spans)

    def flush(self) -> None:
        """Make everything published so far durable."""
        with self._lock:
            layers = list(self._layers.values())
        for layer in layers:
            try:
                layer.flush()
            except OSError as error:
                self.write_failed(error)

    def close(self) -> None:
        """Flush and close every layer and give the lock back. Only when no thread reads any layer any more."""
        self._closed.set()
        self._dirty.set()
        self._flusher.join()
        with self._lock:
            layers = list(self._layers.values())
            self._layers.clear()
        for layer in layers:
            layer.close()
        os.close(self._lock_fd)

    def write_failed(self, error: OSError) -> None:
        """The disk refused: say it once a minute, and wake the cleaner if it is full."""
        now = time.monotonic()
        with self._lock_complaint:
            quiet = now - self._complained < _COMPLAIN_SECONDS
            if not quiet:
                self._complained = now
        if not quiet:
            log.error(
                "the layer cache cannot be written; reads go on from memory", path=str(self.root), error=str(error)
            )
            if error.errno in _FULL and self._on_full is not None:
                self._on_full()

    def _take(self) -> int:
        try:
            return take_lock(self.root)
        except CacheError:
            if not (self.root / "lock").exists():
                raise
        with cleaners_turn(self.root):  # a cleaner that works without a daemon has it for a moment
            return take_lock(self.root)

    def _flush_loop(self) -> None:
        while not self._closed.is_set():
            self._dirty.wait()
            if self._closed.wait(FLUSH_SECONDS):  # a batch
                return
            self._dirty.clear()
            self.flush()
