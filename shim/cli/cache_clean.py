"""`clip-shim cache clean`: by the daemon if one runs, else here."""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from shim.settings import Settings


def add_parser(sub: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = sub.add_parser(
        "clean",
        help="make the cache smaller",
        description="Delete what was used least recently, until the cache keeps to its limits: those of the "
        "configuration (cache.max_bytes, cache.max_age, cache.free_low and free_high), or those given here. What a "
        "container uses stays, but for data that can be fetched again. What is pinned stays.",
    )
    parser.add_argument("--max-bytes", metavar="N", help="make the cache at most this large: 10G")
    parser.add_argument("--max-age", metavar="D", help="delete what nobody has used for so long: 12h, 7d")
    parser.add_argument("--dry-run", action="store_true", help="only say what would be deleted")
    parser.add_argument("--json", action="store_true", help="machine-readable output")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from shim import settings

    loaded = settings.load()
    flags = {"max_bytes": args.max_bytes, "max_age": args.max_age}
    given = {name: _parse(name, value) for name, value in flags.items() if value is not None}
    answer = _clean(loaded, given, dry_run=args.dry_run)
    if args.json:
        json.dump(answer, sys.stdout, indent=2)
        print()
    else:
        print("\n".join(_text(answer)))
    return 0


def _parse(name: str, value: str) -> int:
    """A flag, read as the setting of the same name, in whole bytes or seconds."""
    from shim.errors import UsageError
    from shim.settings import BY_KEY

    try:
        number: float = BY_KEY[f"cache.{name}"].parse(value)
    except ValueError as error:
        raise UsageError(f"--{name.replace('_', '-')} is {value!r}, it must be {error}") from None
    return math.ceil(number)


def _clean(loaded: Settings, given: dict[str, int], *, dry_run: bool) -> dict[str, Any]:
    from shim.cli.client import ask_if_running

    answer = ask_if_running({"v": 1, "op": "clean", "dry_run": dry_run, **given})
    if answer is None:
        from shim.daemon.cleaner import as_json, clean_offline, limits

        return as_json(clean_offline(loaded, limits(loaded, given), dry_run=dry_run))
    answer.pop("ok")
    return answer


def _text(answer: dict[str, Any]) -> list[str]:
    from shim.cli.progress import human
    from shim.cli.table import ago, table

    now = time.time()
    lines = [
        (
            row["kind"],
            row["name"].rpartition("/")[2].removeprefix("sha256-")[:12],
            human(row["bytes"]) + (" of it" if row["part"] else ""),
            ago(max(0.0, now - row["last_used"])),
            row["reason"],
            row["what"] or "-",
        )
        for row in answer["removed"]
    ]
    rows = table(("KIND", "NAME", "FREED", "LAST USED", "BECAUSE OF", "IMAGE"), lines, right="..rr") if lines else []
    verb = "would free" if answer["dry_run"] else "freed"
    left = f"the cache takes {human(answer['cache_bytes'])}, {human(answer['free_bytes'])} of the disk are free"
    if answer["skipped"]:
        rows.append(f"{len(answer['skipped'])} could not be removed, or are in use by now")
    return [*rows, f"{verb} {human(answer['freed_bytes'])}; {left}"]
