"""What the daemon does with start profiles (profile.py): has them fetched ahead, or records them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from shim.cache.fetch import LazyLayer
from shim.cache.prefetch import Prefetch, plan
from shim.daemon.layers import Layers
from shim.daemon.profile import Profile, Recorder, read_profile


class StartProfiles:
    """One for all trees. No state but the recorder's; any thread may call."""

    def __init__(self, layers: Layers, state: Path, *, enabled: bool) -> None:
        """state: STATE/trees."""
        self._layers = layers
        self._state = state
        self._enabled = enabled
        self._recorder = Recorder()

    def begin(self, tree: str, meta: dict[str, Any]) -> None:
        """The layers of `tree` (index hex) are served from now on, for the first container since it was not mounted."""
        if not self._enabled:
            return
        directory = self._state / tree
        layers = self._layers.of(meta)
        profile = read_profile(directory, [layer.spans.count for layer in layers])
        if profile:
            Prefetch(plan(layers, profile), self._hold).start()
        else:
            self._layers.record(tree, meta, self._recorder.begin(tree, directory))

    @contextmanager
    def _hold(self, layer: LazyLayer) -> Iterator[bool]:
        """Nobody closes a layer while it is held; False: it is served no longer."""
        with self._layers.held(os.fsdecode(layer.name)) as served:
            yield served is not None and served.lazy is layer

    def current(self, tree: str, meta: dict[str, Any] | None) -> Profile:
        """What was recorded so far, or is kept; () for nothing. meta: of the mounted tree, None if it is not."""
        found = self._recorder.current(tree)
        if found or meta is None:
            return found
        return read_profile(self._state / tree, [layer.spans.count for layer in self._layers.of(meta)])

    def end(self, *, everything: bool = False) -> None:
        """Keep the recordings whose time is over, or all."""
        for tree in self._recorder.end_due(everything=everything):
            self._layers.end_recording(tree)
