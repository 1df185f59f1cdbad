"""Who uses trees, as the kernel says: overlays that wrappers made, found by their mount source, clones, open files."""

from __future__ import annotations

import os
from collections.abc import Container, Iterator
from pathlib import Path

from shim.mount import lease
from shim.mount.mountinfo import MountEntry

_SOURCE = b"clip:sha256:"


def overlays(entries: list[MountEntry]) -> Iterator[tuple[str, MountEntry]]:
    """(index hex, mount) of each."""
    for entry in entries:
        if entry.fs_type == b"overlay" and entry.source.startswith(_SOURCE):
            yield entry.source[len(_SOURCE) :].decode("ascii", "replace"), entry


def mounted_trees(entries: list[MountEntry], run: Path) -> set[str]:
    """Hexes of the trees mounted at their place below `run` (RUN/trees)."""
    trees = os.fsencode(run) + b"/"
    return {os.fsdecode(e.mount_point[len(trees) :]) for e in entries if e.mount_point.startswith(trees)}


def tree_users(entries: list[MountEntry], run: Path) -> set[str]:
    """Hexes of the trees mounted below `run` (RUN/trees) that somebody has another mount of: an overlay, a clone."""
    trees = os.fsencode(run) + b"/"
    devices = {entry.dev: entry.mount_point[len(trees) :] for entry in entries if entry.mount_point.startswith(trees)}
    users = {hex_ for hex_, _ in overlays(entries)}
    for entry in entries:
        name = devices.get(entry.dev)
        if name is not None and not entry.mount_point.endswith(trees + name):  # nor a copy that was propagated
            users.add(os.fsdecode(name))
    return users


def is_used(directory: Path, users: Container[str]) -> bool:
    """Whether anybody uses a tree that is kept in `directory`. users: hexes of those that are in mountinfo."""
    if directory.name in users:
        return True
    return any(lease.in_use(directory / name) for name in ("image.erofs", "index.clip"))
