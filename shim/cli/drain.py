"""`clip-shim drain`."""

from __future__ import annotations

import argparse
import json
import sys
import time
from contextlib import closing
from typing import Any

_EVERY = 0.2  # seconds between questions
_LONG = 365 * 86400.0


def add_parser(sub: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = sub.add_parser(
        "drain",
        help="complete what is in use; say who depends on the registry",
        description="Fetch now whatever the images in use still lack, and say which containers depend on a registry "
        "after that. Exit code 0 only if none does: then registries may go away.",
    )
    parser.add_argument("--timeout", metavar="D", help="give up after so long: 90s, 10m")
    parser.add_argument("--json", action="store_true", help="machine-readable output")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    rows = _drain(_parse(args.timeout), quiet=args.json)
    depending = [row for row in rows if row["missing_bytes"] != 0]
    if args.json:
        json.dump({"independent": not depending, "images": rows}, sys.stdout, indent=2)
        print()
    else:
        print("\n".join(_text(rows, depending)))
    return 1 if depending else 0


def _parse(timeout: str | None) -> float:
    from shim.errors import UsageError
    from shim.settings import BY_KEY

    if timeout is None:
        return _LONG
    try:
        seconds: float = BY_KEY["background.after"].parse(timeout)
    except ValueError as error:
        raise UsageError(f"--timeout is {timeout!r}, it must be {error}") from None
    return seconds


def _drain(timeout: float, *, quiet: bool) -> list[dict[str, Any]]:
    from shim import settings
    from shim.cli.progress import Progress
    from shim.runtime import client

    run_dir = settings.load().run_dir
    end = time.monotonic() + timeout
    connection = client.try_connect(str(run_dir), time.monotonic() + max(timeout, 1) + 10)
    if connection is None:
        from shim.daemon import who
        from shim.daemon.drain import lost

        return lost(list(who.containers(run_dir).values()), set())
    with closing(connection), Progress("completing", quiet=quiet) as bar:
        while True:
            rows: list[dict[str, Any]] = connection.request({"v": 1, "op": "drain"})["images"]
            size = sum(row["size"] or 0 for row in rows)
            bar.update(0, size - sum(row["missing_bytes"] or 0 for row in rows), size)
            if not any(row["pending"] for row in rows) or time.monotonic() >= end:
                return rows
            time.sleep(_EVERY)


def _text(rows: list[dict[str, Any]], depending: list[dict[str, Any]]) -> list[str]:
    from shim.cli.progress import human
    from shim.cli.table import table

    if not depending:
        return [f"nothing depends on a registry: {len(rows)} images in use, all of them complete"]
    lines = [
        (
            row["image"] or row["index"][7:19],
            "?" if row["missing_bytes"] is None else human(row["missing_bytes"]),
            ", ".join(row["containers"]) or "-",
            "; ".join(row["errors"]) or "not done yet",
        )
        for row in depending
    ]
    head = ("IMAGE", "MISSING", "CONTAINERS", "WHY")
    return [*table(head, lines, right=".r"), f"{len(depending)} of {len(rows)} images depend on a registry"]
