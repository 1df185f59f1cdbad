"""One image's tree, and a lease on it: the values of trees.py."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from shim.daemon.indexfile import Head
from shim.daemon.portable import PortableTree
from shim.errors import ShimError

Fill = Callable[[list[str], float], None]
"""Has the blob files of these names in the cache by that time (monotonic)."""

LAZY = ("lazy", "")


@dataclass(frozen=True, slots=True)
class Files:
    """An index that may be used, and descriptors: of its file, and of the archive that it is about if that is a local
    one (often the same file). What was judged is `head`: the file may be a tenant's, and change at any time."""

    head: Head
    index: int
    archive: int


@dataclass(slots=True)
class ImageTree:
    """One image. `lock` is held while it is prepared, mounted or unmounted; `leases` counts control connections.

    unsure: an unmount failed, so something may still be at its path. failed: the last attempt to mount it, if that
    failed: when it began (monotonic), and why.
    """

    hex: str
    lock: threading.Lock = field(default_factory=threading.Lock)
    meta: dict[str, Any] | None = None
    mounted: str | None = None  # the tier, while it is mounted
    unsure: bool = False
    failed: tuple[float, ShimError] | None = None
    leases: int = 0
    last_used: float = 0.0
    portable: PortableTree | None = None
    device: str = ""  # major:minor while it is mounted: what a wrapper must see at its path
    step: tuple[str, str] = LAZY  # of `fallback`, that mounted it, and why not the one before

    @property
    def image(self) -> str:
        return str(self.meta["image"]) if self.meta is not None else ""

    def status(self, path: str, overlays: int) -> dict[str, Any]:
        """A row of `images` in `status --json`; it is mounted at `path`."""
        meta = self.meta or {}
        return {
            "image": meta.get("image"),
            "digest": meta.get("digest"),
            "index": f"sha256:{self.hex}",
            "tree": path,
            "tier": self.mounted,
            "step": self.step[0],
            "reason": self.step[1],
            "leases": self.leases,
            "overlays": overlays,
            "layers": [layer["diff_id"] for layer in meta.get("layers", ())],
        }


@dataclass(slots=True)
class Lease:
    """While a lease is open its tree stays mounted. Closing it twice is harmless."""

    tree: ImageTree
    answer: dict[str, Any]
    blobs: list[str]  # its layers' files
    release: Callable[[], None]
