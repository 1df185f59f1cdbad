"""Put a whole layer into the cache from outside the daemon: by whoever has all its bytes in hand anyway."""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from pathlib import Path

from shim.cache import bitmap
from shim.cache.layer import layer_meta, padded
from shim.cache.store import SEED_PREFIX, layer_name
from shim.index.model import Layer
from shim.index.spanfile import SpanFile, write_span_file


class Seed:
    """`write` a layer's uncompressed bytes in order, then `keep` them under the layer they turned out to be.

    A layer's directory is filled under another name and renamed: the daemon sees a whole one or none, and one that it
    has already stays. What is in it counts as left by a former process: every span is hashed again before its first
    use. A seed is a favour: when the disk refuses, `failed` says so, and everything goes on without it.
    Crashes: what a killed process left is removed when the daemon next takes the cache.
    """

    def __init__(self, root: Path, free_low: float = 0.0) -> None:
        """root: STATE/cache. free_low: `cache.free_low`; with less of the disk free the cleaner would take it away."""
        self._root = root
        self.failed: OSError | None = None
        self._fd = -1
        try:
            root.mkdir(mode=0o700, parents=True, exist_ok=True)
            disk = os.statvfs(root)
            if disk.f_bavail < free_low * disk.f_blocks:
                raise OSError(errno.ENOSPC, "the disk is nearly full")
            self._directory = Path(tempfile.mkdtemp(prefix=SEED_PREFIX, dir=root))
            self._fd = os.open(self._directory / "data", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            self.failed = error

    def write(self, data: memoryview | bytes) -> None:
        """The layer's next bytes."""
        if self.failed is not None:
            return
        view = memoryview(data)
        try:
            while view:
                view = view[os.write(self._fd, view) :]
        except OSError as error:
            self.failed = error

    def keep(self, layer: Layer) -> bool:
        """All bytes were written, and are those of `layer`. False: the cache has it already, or the disk refused."""
        if self.failed is not None:
            return False
        try:
            spans = self._directory / "spans"
            write_span_file(spans, layer)
            with SpanFile(spans) as table:
                name = layer_name(layer.diff_id, table.identity)
                digest = table.table_digest()
            spans.unlink()
            os.ftruncate(self._fd, padded(layer.uncompressed_size))
            os.fdatasync(self._fd)
            (self._directory / "meta.json").write_text(layer_meta(layer.diff_id, digest, layer.uncompressed_size))
            bitmap.store(self._directory / "bitmap", bytes([1]) * layer.spans.count, digest)
            self._directory.rename(self._root / name)
        except OSError as error:
            self.failed = error
            return False
        return True

    def close(self) -> None:
        """Remove what was not kept. Harmless twice."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
            shutil.rmtree(self._directory, ignore_errors=True)
