"""`clip-shim cache ls`."""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any


def add_parser(sub: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = sub.add_parser(
        "ls",
        help="the layers in the cache",
        description="List the layers in the cache, the least recently used first. Needs no daemon.",
    )
    parser.add_argument("--json", action="store_true", help="machine-readable output")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from shim import settings

    state = settings.load().state_dir
    rows = layers(state)
    if args.json:
        total = sum(row["disk_bytes"] for row in rows)
        json.dump({"cache": str(state / "cache"), "disk_bytes": total, "layers": rows}, sys.stdout, indent=2)
        print()
        return 0
    print("\n".join(_table(rows)))
    return 0


def layers(state: Path) -> list[dict[str, Any]]:
    """The rows of `cache ls --json`: `size`, `cached_bytes` (uncompressed) are None where no index of the layer is
    kept; `disk_bytes` is what it takes; `last_used` seconds since the epoch; `in_use`: the daemon has it open."""
    from shim.cache.check import claimed
    from shim.cache.store import entries
    from shim.daemon.kept import Kept, kept_layers

    kept, open_names = kept_layers(state / "trees"), _open_names()
    rows = []
    for entry in sorted(entries(state / "cache"), key=lambda entry: entry.last_used):
        known = kept.get(entry.name, Kept())
        size = cached = None
        spans = known.open(entry.name)
        if spans is not None:
            with spans:
                size, cached = spans.uncompressed_size, claimed(state / "cache" / entry.name, spans)
        rows.append(
            {
                "name": entry.name,
                "diff_id": f"sha256:{entry.name.partition('-')[0]}",
                "size": size,
                "cached_bytes": cached,
                "disk_bytes": entry.allocated,
                "last_used": entry.last_used,
                "in_use": entry.name in open_names,
                "images": known.images,
            }
        )
    return rows


def _open_names() -> set[str]:
    from shim.cli.client import ask
    from shim.errors import DaemonError

    try:
        return {layer["blob"] for layer in ask({"v": 1, "op": "status"})["layers"]}
    except DaemonError:
        return set()


def _table(rows: list[dict[str, Any]]) -> list[str]:
    from shim.cli.progress import human
    from shim.cli.table import ago, table

    now = time.time()
    lines = [
        (
            row["diff_id"][7:19],
            human(row["size"]) if row["size"] is not None else "-",
            f"{100 * row['cached_bytes'] / row['size']:.1f} %" if row["size"] else "-",
            human(row["disk_bytes"]),
            ago(max(0.0, now - row["last_used"])),
            "open" if row["in_use"] else "",
            ", ".join(row["images"]) or "-",
        )
        for row in rows
    ]
    head = ("LAYER", "SIZE", "CACHED", "ON DISK", "LAST USED", "STATE", "IMAGES")
    total = sum(row["disk_bytes"] for row in rows)
    return [*table(head, lines, right=".rrrr"), f"{len(rows)} layers, {human(total)} on disk"]
