"""Make a v1 archive: of an image, straight from its registry, or of a directory. No unpacked tree in between."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from shim.archive.blocks import MAX_HOLES, Block, BlockWriter
from shim.archive.finish import Source, finish
from shim.errors import IntegrityError, LayerError
from shim.index.build import check_layers, layer_name, read_diff_ids
from shim.index.merge import TreeMerger, show_path
from shim.index.model import Index
from shim.layers.scan import MAX_SPACING, LayerScanner
from shim.layers.tar import REGULAR, TarEntry, TarWalker
from shim.registry.client import Manifest, RegistryClient
from shim.registry.ref import ImageRef

Progress = Callable[[int, int], None]
"""(bytes done, bytes in all)."""


@dataclass(frozen=True, slots=True)
class Archived:
    """What was made: the index that stands at the archive's end, and what Go clip will not see of it."""

    index: Index
    left_out: list[bytes]


def archive_image(
    ref: ImageRef,
    client: RegistryClient,
    path: Path,
    *,
    platform: str | None = None,
    progress: Progress | None = None,
    warn: Callable[[str], None] | None = None,
) -> Archived:
    """Write the archive of an image to the open file `path`, which exists and is empty.

    Each layer is streamed once, and verified as for an index. Raises RegistryError, IntegrityError, LayerError (each
    naming the layer), StoreError (the disk). After an error the file holds nothing of use.
    """
    manifest = client.resolve(ref, platform)
    check_layers(manifest.layers)
    diff_ids = read_diff_ids(manifest.config_raw, len(manifest.layers))
    merger = TreeMerger()
    blocks: dict[tuple[int, int], Block] = {}
    total = sum(layer.size for layer in manifest.layers)
    done = 0

    def count(size: int) -> None:
        nonlocal done
        done += size
        if progress is not None:
            progress(done, total)

    with open(path, "r+b") as out, closing(BlockWriter(out.fileno())) as writer:
        for number in range(len(manifest.layers)):
            layer = _LayerWriter(number, writer, blocks)
            _stream(ref, client, manifest, number, diff_ids[number], layer, count)
            merger.apply(layer.walker.entries, number)
        if merger.dropped and warn is not None:
            parts = ", ".join(f"{many} {reason}s" for reason, many in sorted(merger.dropped.items()))
            warn(f"left out, since no container may see it: {parts}")
        source = Source(ref.image, manifest.digest, manifest.platform, manifest.config_raw)
        index, left_out = finish(out, writer, merger.finish(), blocks, source)
    return Archived(index, left_out)


def _stream(
    ref: ImageRef,
    client: RegistryClient,
    manifest: Manifest,
    number: int,
    diff_id: str,
    layer: _LayerWriter,
    count: Callable[[int], None],
) -> None:
    descriptor = manifest.layers[number]
    try:
        with (
            client.open_blob(ref, descriptor.digest, 0, descriptor.size) as stream,
            LayerScanner(None, MAX_SPACING, layer.take) as scanner,
        ):
            for chunk in stream:
                scanner.feed(chunk)
                count(len(chunk))
            result = scanner.finish()
        layer.walker.finish()
        if result.digest != descriptor.digest or result.size != descriptor.size:
            raise IntegrityError(f"its {result.size} bytes hash to {result.digest}")
        if result.diff_id != diff_id:
            raise IntegrityError(f"its uncompressed bytes hash to {result.diff_id}, the config says {diff_id}")
    except (LayerError, IntegrityError) as error:
        error.args = (f"{layer_name(number, manifest.layers)}: {error}",)
        raise


class _LayerWriter:
    """Takes a layer's tar as it comes and writes its files' data as blocks, found by (layer, offset in the tar)."""

    def __init__(self, number: int, writer: BlockWriter, blocks: dict[tuple[int, int], Block]) -> None:
        self._number = number
        self._writer = writer
        self._blocks = blocks
        self.walker = TarWalker()
        self._seen = 0  # entries that were looked at
        self._at = 0  # tar offset of the next bytes
        self._pieces: list[tuple[int, int, int]] = []  # what is to come of the file in work: (logical, offset, length)
        self._entry: TarEntry | None = None
        self._written = 0  # bytes of the file in work

    def take(self, view: memoryview) -> None:
        start = self._at
        self.walker.feed(view)
        self._at = end = start + len(view)
        while True:
            if self._entry is None and not self._next():
                return
            if not self._copy(view, start, end):
                return

    def _next(self) -> bool:
        """Begin with the next entry that has data."""
        entries = self.walker.entries
        while self._seen < len(entries):
            entry = entries[self._seen]
            self._seen += 1
            if entry.typeflag == REGULAR and entry.size and entry.extents != ():
                whole = ((0, entry.data_offset, entry.size),)
                self._pieces = [piece for piece in (whole if entry.extents is None else entry.extents) if piece[2]]
                if not self._pieces:
                    continue
                if entry.size - sum(piece[2] for piece in self._pieces) > MAX_HOLES:
                    raise LayerError(
                        f"{show_path(entry.name)} has more than {MAX_HOLES >> 30} GiB of holes,"
                        " which an archive would hold as zeros",
                        hint="use an index: it keeps holes",
                    )
                self._entry, self._written = entry, 0
                self._writer.begin(entry.size)
                return True
        return False

    def _copy(self, view: memoryview, start: int, end: int) -> bool:
        """Write what `view`, the tar's [start, end), has of the file in work; True when the file is complete."""
        assert self._entry is not None
        while self._pieces:
            logical, offset, length = self._pieces[0]
            if offset >= end:
                return False
            self._writer.zeros(logical - self._written)
            low, high = max(offset, start), min(offset + length, end)
            self._writer.write(view[low - start : high - start])
            moved = high - offset
            self._written = logical + moved
            if moved < length:
                self._pieces[0] = (logical + moved, offset + moved, length - moved)
                return False
            del self._pieces[0]
        self._writer.zeros(self._entry.size - self._written)
        first = self._entry.data_offset if self._entry.extents is None else next(
            piece[1] for piece in self._entry.extents if piece[2]
        )  # fmt: skip
        self._blocks[self._number, first] = self._writer.end()
        self._entry = None
        return True
