"""Which cached layers the prepared trees know: their span tables, and the images they are of."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from shim.cache.store import layer_name
from shim.daemon.prepare import read_meta
from shim.errors import CacheError
from shim.index.spanfile import SpanFile


@dataclass(slots=True)
class Kept:
    """A layer that trees under STATE/trees have. `tables`: span files of it; `images`: references, as indexed."""

    tables: list[Path] = field(default_factory=list)
    images: list[str] = field(default_factory=list)

    def open(self, name: str) -> SpanFile | None:
        """The span table of layer `name`, from the first file that is sound; None if there is none."""
        for path in self.tables:
            try:
                spans = SpanFile(path)
            except CacheError:
                continue
            if layer_name(spans.diff_id, spans.identity) == name:
                return spans
            spans.close()
        return None


def kept_layers(trees: Path) -> dict[str, Kept]:
    """Layers by name (store.layer_name) of all prepared trees under `trees`; damaged ones are passed over."""
    found: dict[str, Kept] = {}
    for directory in sorted(trees.iterdir()) if trees.is_dir() else []:
        meta = read_meta(directory)
        for number, layer in enumerate(meta["layers"] if meta else []):
            kept = found.setdefault(layer["blob"], Kept())
            kept.tables.append(directory / f"spans.{number}")
            if meta is not None and meta["image"] not in kept.images:
                kept.images.append(meta["image"])
    return found
