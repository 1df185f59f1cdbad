"""One served layer: its blob, who uses it, what was fetched of it."""

from __future__ import annotations

from dataclasses import astuple, dataclass, field

from shim.cache.fetch import LazyLayer
from shim.daemon.origins import Source
from shim.daemon.profile import Recording
from shim.daemon.trace import WatchedBlob
from shim.index.spanfile import SpanFile

_MAX_SOURCES = 16  # the latest repositories of a layer; one that serves for months sees many


@dataclass(frozen=True, slots=True)
class Traffic:
    """What was fetched: `fetched` bytes as they came, the uncompressed ones somebody waited for, and those ahead."""

    fetched: int = 0
    requests: int = 0
    demand: int = 0
    ahead: int = 0

    def __add__(self, other: Traffic) -> Traffic:
        return Traffic(*map(int.__add__, astuple(self), astuple(other)))

    def __sub__(self, other: Traffic) -> Traffic:
        return Traffic(*(max(0, a - b) for a, b in zip(astuple(self), astuple(other), strict=True)))


@dataclass(slots=True)
class ServedLayer:
    """A blob file. `users`: hexes of the mounted trees over it. `sources`: the repositories of the trees it served.
    `places`: for messages, hex of an index that has the layer → its number there."""

    lazy: LazyLayer
    spans: SpanFile
    users: set[str] = field(default_factory=set)
    sources: list[Source] = field(default_factory=list)
    places: dict[str, int] = field(default_factory=dict)
    watched: WatchedBlob | None = None
    holds: int = 0  # who keeps it from being taken away, see `Layers.held`
    recordings: dict[str, tuple[Recording, int]] = field(default_factory=dict)

    def record(self, tree: str, recording: tuple[Recording, int] | None) -> None:
        """Feed the start profile of a tree from now on, as layer number …; None: no longer. The dict is replaced, never
        changed: the threads that read look at it without a lock."""
        others = {key: item for key, item in self.recordings.items() if key != tree}
        self.recordings = others if recording is None else {**others, tree: recording}
        self.lazy.listen(self._touched if self.recordings else None)

    def _touched(self, spans: range) -> None:
        for recording, number in self.recordings.values():
            recording.touch(number, spans)

    def note(self, tree: str, number: int, source: Source) -> None:
        """One more tree over it."""
        self.users.add(tree)
        self.places.pop(tree, None)
        self.places[tree] = number
        if len(self.places) > _MAX_SOURCES:
            del self.places[next(iter(self.places))]
        if not any(known.is_same(source) for known in self.sources):
            self.sources.append(source)
            del self.sources[:-_MAX_SOURCES]
