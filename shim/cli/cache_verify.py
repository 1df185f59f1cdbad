"""`clip-shim cache verify`: the cache's fsck."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from shim.settings import Settings

_AT_ONCE = 4000  # spans in one request to the daemon

Distrust = Callable[[str, list[int]], int]


def add_parser(sub: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = sub.add_parser(
        "verify",
        help="check every cached byte",
        description="Hash every cached span and compare it with the layer's index; what is wrong is fetched again when "
        "it is read next. Containers may run meanwhile. Exit code 1 if anything was wrong.",
    )
    parser.add_argument("--dry-run", action="store_true", help="only say what is wrong")
    parser.add_argument("--json", action="store_true", help="machine-readable output")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from shim import settings

    loaded = settings.load()
    with _mender(loaded, dry=args.dry_run) as distrust:
        rows = check(loaded.state_dir, distrust, quiet=args.json)
    ok = not any(row["problems"] for row in rows)
    if args.json:
        json.dump({"cache": str(loaded.state_dir / "cache"), "ok": ok, "layers": rows}, sys.stdout, indent=2)
        print()
        return 0 if ok else 1
    from shim.cli.progress import human

    for row in rows:
        for problem in row["problems"]:
            print(f"{row['diff_id']}: {problem}")
    checked = [row for row in rows if row["checked"]]
    total = sum(row["checked_bytes"] for row in checked)
    print(f"{len(checked)} layers checked, {human(total)}; {'all right' if ok else _verdict(rows, args.dry_run)}")
    if len(checked) < len(rows):
        print(f"{len(rows) - len(checked)} not checked: no index of them is kept, so they are in nobody's use")
    return 0 if ok else 1


def _verdict(rows: list[dict[str, Any]], dry: bool) -> str:
    wrong = sum(row["wrong_spans"] for row in rows)
    said = f"{wrong} spans wrong in {sum(bool(row['problems']) for row in rows)} layers"
    return said if dry else f"{said}: they are fetched again when they are read"


def check(state: Path, distrust: Distrust | None, *, quiet: bool) -> list[dict[str, Any]]:
    """The rows of `cache verify --json`. distrust(layer name, spans): mends; None for a dry run."""
    from shim.cache.check import check_layer, claimed
    from shim.cache.store import entries
    from shim.cli.progress import Progress
    from shim.daemon.kept import Kept, kept_layers

    kept = kept_layers(state / "trees")
    found = [(entry, kept.get(entry.name, Kept()).open(entry.name)) for entry in entries(state / "cache")]
    total = sum(claimed(state / "cache" / entry.name, spans) for entry, spans in found if spans is not None)
    done = 0
    rows = []
    with Progress("checking the cache", quiet=quiet) as bar:

        def hashed(size: int) -> None:
            nonlocal done
            done += size
            bar.update(0, done, total)

        for entry, spans in found:
            row: dict[str, Any] = {
                "name": entry.name,
                "diff_id": f"sha256:{entry.name.partition('-')[0]}",
                "checked": spans is not None,
                "checked_bytes": 0,
                "wrong_spans": 0,
                "mended": False,
                "problems": [],
            }
            rows.append(row)
            if spans is None:
                continue
            with spans:
                result = check_layer(state / "cache" / entry.name, spans, hashed)
            row |= {"checked_bytes": result.bytes, "wrong_spans": len(result.wrong), "problems": result.problems}
            if distrust is not None and (result.wrong or result.torn):
                parts = range(0, max(1, len(result.wrong)), _AT_ONCE)
                row["mended"] = bool(sum(distrust(entry.name, result.wrong[i : i + _AT_ONCE]) for i in parts))
                row["mended"] |= result.torn
    return rows


@contextmanager
def _mender(loaded: Settings, *, dry: bool) -> Iterator[Distrust | None]:
    """How wrong spans are given up: by the daemon if one runs, else here, with the cache's lock held."""
    from shim.cache.store import LayerCache
    from shim.cli.client import ask
    from shim.errors import DaemonError

    if dry or not (loaded.state_dir / "cache").is_dir():
        yield None
        return
    try:
        ask({"v": 1, "op": "ping"})
    except DaemonError:
        cache = LayerCache(loaded.state_dir / "cache")
        try:
            yield cache.distrust
        finally:
            cache.close()
        return
    yield lambda name, spans: int(ask({"v": 1, "op": "distrust", "layer": name, "spans": spans})["refetched"])
