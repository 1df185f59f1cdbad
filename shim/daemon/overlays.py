"""The overlays that wrappers made over trees, found by their mount source."""

from __future__ import annotations

from collections.abc import Iterator

from shim.mount.mountinfo import MountEntry

_SOURCE = b"clip:sha256:"


def overlays(entries: list[MountEntry]) -> Iterator[tuple[str, MountEntry]]:
    """(index hex, mount) of each."""
    for entry in entries:
        if entry.fs_type == b"overlay" and entry.source.startswith(_SOURCE):
            yield entry.source[len(_SOURCE) :].decode("ascii", "replace"), entry
