"""Removing a directory so that it is there or gone, never half: renamed first, then deleted.

Whoever is killed in between leaves `.gone-…`, which nobody reads and the next `sweep` deletes.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from shim.cache.faultpoint import fault

_PREFIX = ".gone-"


def set_aside(directory: Path) -> Path | None:
    """Take a directory out of the way; returns where it is now, for `delete`. None: there is no such directory."""
    aside = directory.with_name(f"{_PREFIX}{os.getpid()}-{directory.name}")
    shutil.rmtree(aside, ignore_errors=True)  # of a namesake that could not be deleted
    fault("discard.begin")
    try:
        directory.rename(aside)
    except FileNotFoundError:
        return None
    fault("discard.renamed")
    return aside


def delete(aside: Path | None) -> None:
    """Delete what was set aside. What cannot be deleted now is deleted by a later `sweep`."""
    if aside is not None:
        shutil.rmtree(aside, ignore_errors=True)
        fault("discard.deleted")


def sweep(parent: Path) -> None:
    """Delete what was set aside by processes that were killed."""
    for path in parent.glob(f"{_PREFIX}*"):
        shutil.rmtree(path, ignore_errors=True)


def allocated(directory: Path) -> int:
    """Bytes that the files right below a directory take on disk; 0 if it is gone."""
    size = 0
    try:
        with os.scandir(directory) as entries:
            for entry in entries:
                size += entry.stat(follow_symlinks=False).st_blocks * 512
    except OSError:
        pass  # removed meanwhile
    return size
