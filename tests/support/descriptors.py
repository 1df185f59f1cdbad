"""Whether something left descriptors open in this process."""

from __future__ import annotations

import gc
import os


def descriptors() -> set[str]:
    """The numbers of the open ones. What earlier tests left to the garbage collector is closed first: it would be
    closed at any moment."""
    gc.collect()
    return {name for name in os.listdir("/proc/self/fd") if os.path.lexists(f"/proc/self/fd/{name}")}
