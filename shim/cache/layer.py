"""One cached layer: a sparse file of its uncompressed bytes and the state of each span."""

from __future__ import annotations

import errno
import json
import os
import threading
import time
from array import array
from bisect import bisect_right
from collections.abc import Callable, Iterable
from pathlib import Path

from shim import log
from shim.cache import bitmap
from shim.cache.access import AccessList
from shim.cache.faultpoint import fault
from shim.cache.hashing import hash_range
from shim.cache.holes import contiguous, punch
from shim.cache.memory import MemorySpans
from shim.cache.opening import open_layer
from shim.index.model import BLOCK, Spans

ABSENT = 0  # nothing here
VERIFIED = 1  # in the data file, hashed in this process's life: served at once
MARKED = 2  # the same, and the next reader asks for what follows (read-ahead)
ON_DISK = 3  # the bitmap says so; hashed again before its first use
IN_MEMORY = 4  # verified, but the disk did not take it

_READABLE = (VERIFIED, MARKED, IN_MEMORY)
_IN_FILE = (VERIFIED, MARKED, ON_DISK)
_TOUCH_SECONDS = 60.0
_REFUSED_SECONDS = 60.0


def padded(size: int) -> int:
    """The length of a layer's blob file: EROFS counts its devices in blocks."""
    return (size + BLOCK - 1) // BLOCK * BLOCK


def layer_meta(diff_id: str, table_digest: bytes, size: int) -> str:
    """What meta.json says."""
    facts = {"v": 1, "diff_id": diff_id, "table_digest": table_digest.hex(), "size": size}
    return json.dumps(facts) + "\n"


class CachedLayer:
    """The verified spans of one layer with one span table.

        STATE/cache/<diff id hex>-<identity, first 16 hex>/     (store.layer_name)
            data         sparse, as long as the uncompressed layer rounded up to 512; span i at its own offset
            bitmap       which spans are there (bitmap.py)
            access       references that a registry has let read it (access.py)
            meta.json    diff id, table digest, sizes; its mtime is when the layer was last used

    The identity covers the span table: an index with another table for the same diff id has a cache of its own, so it
    cannot put its bytes before others.

    States of a span (`states`, one byte each):
        ABSENT → VERIFIED        publish: written to `data`; MARKED, where every first reader is looked for
        ABSENT → IN_MEMORY       publish: the disk refused (full, read-only, failing)
        ON_DISK → VERIFIED       verify: read back and hashed to the table's digest
        ON_DISK → ABSENT         verify: it does not; fetched again
        VERIFIED ↔ MARKED        mark, and the first reader
        any but ABSENT → ABSENT  drop (cleaner), forget (unreadable sector), eviction from memory

    Who may do what
        `stamp`, `read`, `states[i]`  any thread, no lock. Reading: stamp, read, compare with `epoch`, a number that
                                      grows whenever a readable span is taken away, *before* its bytes are: while it is
                                      the same, nothing that was read was punched.
        `_write`                      the lock for every change of a state, held while a span is written or punched:
                                      a hole is never punched into a span that was just written again.
        `_flush`                      one flush or drop at a time; taken before `_write`.
    Files are closed (`close`) only when no thread reads any more: the FUSE server has removed the blob, or stopped.

    Crash rules
        The data of a span is on disk (fdatasync) before its bit: bits are written in batches, about every two seconds
        and at close. A killed daemon loses the last batch: those spans are fetched again. A bitmap that is torn, of
        another table or without its data file counts as empty. A drop writes the bitmap before it punches; should power
        fail in between and the old bitmap come back, `verify` finds the hole.
    """

    def __init__(
        self,
        path: Path,
        diff_id: str,
        spans: Spans,
        memory: MemorySpans,
        *,
        on_dirty: Callable[[], None],
        on_write_error: Callable[[OSError], None],
    ) -> None:
        self.path = path
        self.diff_id = diff_id
        self.spans = spans
        self.count = spans.count
        self.length = spans.ustart(self.count)  # uncompressed bytes
        self.size = padded(self.length)
        self.epoch = 0
        self.uses = 0  # reads asked for, nearly (no lock); the flusher turns growth into meta.json's mtime
        self.data_fd = -1
        self.states = bytearray(self.count)
        self.fresh = VERIFIED  # or MARKED: the state of a span that was written
        self._starts = array("Q", (spans.ustart(i) for i in range(self.count)))
        self._starts.append(1 << 63)  # so that the padding belongs to the last span
        self._table_digest = spans.table_digest()
        self.access = AccessList(path / "access")
        self._memory = memory
        self._on_dirty = on_dirty
        self._on_write_error = on_write_error
        self._write = threading.Lock()
        self._flush = threading.Lock()
        self._dirty = False
        self._unsynced: list[int] = []
        self._refused_until = 0.0
        self._touched = (0, 0.0)  # (uses, monotonic time) of the last touch
        try:
            meta = layer_meta(diff_id, self._table_digest, self.length)
            self.data_fd, flags = open_layer(path, self.size, self.count, self._table_digest, meta)
            self.states = bytearray(ON_DISK if flag else ABSENT for flag in flags)
        except OSError as error:
            on_write_error(error)  # the layer lives in memory alone

    # Reading

    def stamp(self, offset: int, size: int) -> int:
        """The epoch if [offset, offset + size) is VERIFIED throughout, else -1. See the class on how to use it."""
        epoch = self.epoch  # before the states
        self.uses += 1
        starts, states = self._starts, self.states
        i = bisect_right(starts, offset) - 1
        if states[i] != VERIFIED:
            return -1
        end = offset + size
        i += 1
        while starts[i] < end:
            if states[i] != VERIFIED:
                return -1
            i += 1
        return epoch

    def span_range(self, offset: int, size: int) -> range:
        """The spans that [offset, offset + size) touches; 0 <= offset < self.size, size > 0."""
        first = bisect_right(self._starts, offset) - 1
        stop = first + 1
        while self._starts[stop] < offset + size:
            stop += 1
        return range(first, stop)

    def span_length(self, span: int) -> int:
        """Uncompressed bytes of a span."""
        return self.spans.ustart(span + 1) - self._starts[span]

    def is_readable(self, span: int) -> bool:
        return self.states[span] in _READABLE

    def read(self, offset: int, size: int) -> bytes | None:
        """The bytes, from file and memory; None if a span is not readable, or was taken away meanwhile.

        Bytes that the disk cannot give back (a bad sector) are forgotten, so that they are fetched again.
        """
        epoch = self.epoch
        spans = self.span_range(offset, size)
        try:
            pieces = [self._piece(span, offset, offset + size) for span in spans]
        except OSError as error:
            log.error("the layer cache cannot be read back", layer=self.diff_id, offset=offset, error=str(error))
            self.forget(spans)
            return None
        fault("read.copied")
        if self.epoch != epoch or None in pieces:
            return None
        data = b"".join(piece for piece in pieces if piece is not None)
        return data if len(data) == size else data.ljust(size, b"\0")  # the padding behind a last span in memory

    def _piece(self, span: int, start: int, end: int) -> bytes | None:
        """What [start, end) has of a span. Raises OSError (EIO also when the file is too short)."""
        state = self.states[span]
        low = max(start, self._starts[span])
        high = min(end, self._starts[span + 1])
        if state == IN_MEMORY:
            data = self._memory.get(self, span)
            return None if data is None else data[low - self._starts[span] : high - self._starts[span]]
        if state not in _READABLE:
            return None
        data = os.pread(self.data_fd, high - low, low)
        if len(data) != high - low:
            raise OSError(errno.EIO, "the data file is shorter than its layer")
        return data

    # Changing

    def publish(self, span: int, data: bytes) -> bool:
        """Take a span's bytes, which the caller has verified. They are readable when this returns True.

        False: neither disk nor memory took them; whoever waits must be given `data` itself.
        """
        with self._write:
            if self.states[span] in _READABLE:
                return True
            try:
                fault("publish.write")
                self._pwrite(data, self._starts[span])
            except OSError as error:
                kept = self._memory.put(self, span, data, self._evicted)
                self.states[span] = IN_MEMORY if kept else ABSENT
                failure = error
            else:
                fault("publish.set")
                self.states[span] = self.fresh
                self._unsynced.append(span)
                self._dirty = True
                self._on_dirty()
                return True
        self._on_write_error(failure)
        return kept

    def verify(self, span: int) -> bool:
        """Hash a span that a former process left. True: it is VERIFIED now; False: it is ABSENT and must be fetched."""
        epoch = self.epoch
        good = self._is_right(span)
        with self._write:
            if self.states[span] != ON_DISK or self.epoch != epoch:
                return self.states[span] in _READABLE
            self.states[span] = VERIFIED if good else ABSENT
        if not good:
            log.warning("the layer cache holds wrong bytes: fetching them again", layer=self.diff_id, span=span)
            self._set_dirty()
        return good

    def recheck(self, spans: Iterable[int]) -> int:
        """Hash spans again, also ones that were VERIFIED: a disk can change. Those that are wrong are ABSENT now;
        returns how many. Somebody suspects them, so this is no hot path."""
        suspects = [i for i in spans if 0 <= i < self.count and self.states[i] in _IN_FILE and self.data_fd >= 0]
        wrong = [span for span in suspects if not self._is_right(span)]
        with self._write:  # one dropped meanwhile is ABSENT already, or was written again and is fetched once more
            gone = self._clear(i for i in wrong if self.states[i] in _IN_FILE)
        if gone:
            log.warning("the layer cache holds wrong bytes: fetching them again", layer=self.diff_id, spans=len(gone))
            self._set_dirty()
        return len(gone)

    def _is_right(self, span: int) -> bool:
        """Whether the data file's bytes of a span hash to what the table says."""
        return hash_range(self.data_fd, self._starts[span], self.spans.ustart(span + 1)) == self.spans.digest(span)

    def mark(self, span: int, *, wait: bool = True) -> None:
        """Let the next reader of a VERIFIED span go the slow way, where read-ahead is looked after.

        wait=False: leave it if a span is being written just now.
        """
        if self._write.acquire(blocking=wait):
            try:
                if self.states[span] == VERIFIED:
                    self.states[span] = MARKED
            finally:
                self._write.release()

    def unmark(self, span: int) -> bool:
        """Take a mark away; True for the one caller who did. Never waits: if a span is being written, it stays."""
        if self.states[span] != MARKED or not self._write.acquire(blocking=False):
            return False
        try:
            if self.states[span] != MARKED:
                return False
            self.states[span] = VERIFIED
            return True
        finally:
            self._write.release()

    def forget(self, spans: Iterable[int]) -> None:
        """Spans that cannot be read back count as absent from now on."""
        with self._write:
            self._clear(spans)
        self._set_dirty()

    def drop(self, spans: Iterable[int]) -> int:
        """Give the disk space of spans back, also while the layer is read. Returns the bytes of the spans dropped.

        Order: states and epoch, then the bitmap, then the holes; readers that were in between look at the epoch again.
        On a full disk, where not even the bitmap can be written, it is deleted: after a crash the layer starts anew.
        """
        with self._flush, self._write:
            dropped = self._clear(spans)
            if not dropped or self.data_fd < 0:
                return 0
            try:
                bitmap.store(self.path / "bitmap", self._flags(), self._table_digest, sync=False)
            except OSError:
                (self.path / "bitmap").unlink(missing_ok=True)
            fault("drop.cleared")
            self._set_dirty()
            for first, stop in contiguous([i for i in range(self.count) if self.states[i] == ABSENT]):
                start, end = self._starts[first], self.spans.ustart(stop)  # also what a drop that was killed left
                punch(self.data_fd, start, (self.size if stop == self.count else end) - start)
            return sum(self.span_length(span) for span in dropped)

    def _clear(self, spans: Iterable[int]) -> list[int]:
        cleared = [span for span in spans if self.states[span] != ABSENT]
        for span in cleared:
            if self.states[span] == IN_MEMORY:
                self._memory.discard(self, span)
            self.states[span] = ABSENT
        if cleared:
            self.epoch += 1
        return sorted(cleared)

    def _evicted(self, span: int) -> None:
        """From MemorySpans, without locks. Readers hold the bytes themselves, so the epoch need not grow."""
        if self.states[span] == IN_MEMORY:
            self.states[span] = ABSENT

    def _pwrite(self, data: bytes, offset: int) -> None:
        if self.data_fd < 0:
            raise OSError(errno.EROFS, "the layer's cache directory could not be opened")
        if time.monotonic() < self._refused_until:
            raise OSError(errno.EIO, "the disk lost what was written lately")
        view = memoryview(data)
        while view:
            written = os.pwrite(self.data_fd, view, offset)
            view = view[written:]
            offset += written

    # On disk

    @property
    def cached_bytes(self) -> int:
        """Uncompressed bytes at hand, on disk or in memory."""
        states = self.states
        return sum(self.span_length(span) for span in range(self.count) if states[span] != ABSENT)

    def flush(self) -> None:
        """Make what was published survive a crash. Raises OSError; the spans stay readable all the same."""
        with self._flush:
            with self._write:
                flags, dirty, self._dirty = self._flags(), self._dirty, False
                unsynced, self._unsynced = self._unsynced, []
            self._touch()
            if self.data_fd < 0:
                return
            try:
                if dirty:
                    self._sync(unsynced)
                    fault("flush.synced")
                    bitmap.store(self.path / "bitmap", flags, self._table_digest)
            except OSError:
                self._dirty = True
                raise
            self.access.flush()

    def _sync(self, spans: list[int]) -> None:
        """fdatasync(2). Where it fails, what was written since the last one is lost as soon as the page cache lets go
        of it, and the kernel says so only once: those spans are given up, and new ones kept in memory for a while."""
        try:
            fault("flush.sync")
            os.fdatasync(self.data_fd)
        except OSError:
            with self._write:
                self._clear(spans)
                self._refused_until = time.monotonic() + _REFUSED_SECONDS
            raise

    def allow(self, reference: str) -> None:
        """A registry has let `reference` read the layer: remembered with it."""
        self.access.add(reference)
        self._on_dirty()

    def close(self) -> None:
        """Flush and close the file. Only when no thread reads the layer any more."""
        try:
            self.flush()
        except OSError as error:
            self._on_write_error(error)
        self._memory.discard(self)
        with self._write:
            if self.data_fd >= 0:
                os.close(self.data_fd)
                self.data_fd = -1
            self.states = bytearray(self.count)
            self.epoch += 1

    def _flags(self) -> bytes:
        return bytes(state in _IN_FILE for state in self.states)

    def _set_dirty(self) -> None:
        self._dirty = True
        self._on_dirty()

    def _touch(self) -> None:
        """Keep the time of last use, at most once a minute."""
        uses, when = self._touched
        now = time.monotonic()
        if self.uses != uses and (not when or now - when >= _TOUCH_SECONDS):
            self._touched = (self.uses, now)
            try:
                os.utime(self.path / "meta.json")
            except OSError:
                pass  # a read-only cache: the cleaner cannot work there either
