"""Start profiles: which spans the first containers of an image read, so that the next cold start has them ahead.

    STATE/trees/<index hex>/profile.json        {"v": 1, "spans": [[layer, span], …]} in the order of the first reads

It comes from the index (section PROF), or is recorded here: for half a minute after a tree without one was mounted, the
first read of each span is noted. It is advice, so a lost or damaged one is as good as none.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from shim import log
from shim.errors import IndexFormatError
from shim.index import profile as profiles

SECONDS = 30.0
_NAME = "profile.json"
_VERSION = 1

Profile = profiles.Profile


def read_profile(directory: Path, counts: Sequence[int]) -> Profile:
    """What is kept for the tree in `directory`; () for none, or one that does not fit. counts: each layer's spans."""
    try:
        table = json.loads((directory / _NAME).read_bytes())
        profile = tuple((layer, span) for layer, span in table["spans"]) if table["v"] == _VERSION else ()
        if not all(type(number) is int for item in profile for number in item):
            return ()
        profiles.check(profile, counts)
    except (OSError, ValueError, TypeError, KeyError, RecursionError, IndexFormatError):
        return ()
    return profile


def write_profile(directory: Path, profile: Iterable[tuple[int, int]]) -> None:
    """Keep a profile: complete or not at all. Raises OSError."""
    temporary = directory / f"{_NAME}.tmp"
    temporary.write_text(json.dumps({"v": _VERSION, "spans": list(profile)}))
    temporary.rename(directory / _NAME)


@dataclass(slots=True, eq=False)
class Recording:
    """One tree's first reads. `touch` may be called from any thread: it appends, and nothing else."""

    directory: Path
    until: float  # monotonic
    touched: list[tuple[int, range]] = field(default_factory=list)

    def touch(self, layer: int, spans: range) -> None:
        if len(self.touched) < profiles.MAX_PROFILE:
            self.touched.append((layer, spans))

    def profile(self) -> Profile:
        """So far."""
        spans = ((layer, span) for layer, touched in list(self.touched) for span in touched)
        return tuple(dict.fromkeys(spans))[: profiles.MAX_PROFILE]


class Recorder:
    """The recordings under way. `_lock` guards the dict; a recording's own list needs none."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._recordings: dict[str, Recording] = {}

    def begin(self, tree: str, directory: Path) -> Recording:
        """Record what is read of `tree` (index hex) from now on; the caller feeds it."""
        recording = Recording(directory, self._clock() + SECONDS)
        with self._lock:
            self._recordings[tree] = recording
        return recording

    def current(self, tree: str) -> Profile:
        """What was recorded so far, if it is being recorded; else ()."""
        with self._lock:
            recording = self._recordings.get(tree)
        return recording.profile() if recording is not None else ()

    def end_due(self, *, everything: bool = False) -> list[str]:
        """Keep the recordings whose time is over (or all), and return their trees."""
        now = self._clock()
        with self._lock:
            due = {tree: item for tree, item in self._recordings.items() if everything or now >= item.until}
            for tree in due:
                del self._recordings[tree]
        for tree, recording in due.items():
            profile = recording.profile()
            try:
                if profile:
                    write_profile(recording.directory, profile)
            except OSError as error:  # the tree's directory went, or the disk is full
                log.warning("a start profile was not kept", index=tree, error=str(error))
        return list(due)
