"""`clip-shim doctor`."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from shim.doctor.node import Node
    from shim.doctor.result import Check, Result

_MARKS = {"ok": ("✓", "32"), "skipped": ("-", "2"), "warning": ("!", "33"), "failed": ("✗", "31")}


def add_parser(sub: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = sub.add_parser(
        "doctor",
        help="say what is wrong with this node, and the mend",
        description="Try everything that containers need on this node, and say what is wrong and how to mend it. "
        "Exit code: 0 all well, 1 warnings, 2 failures.",
    )
    parser.add_argument("--check", action="append", default=[], metavar="NAME", help="only this check (repeatable)")
    parser.add_argument("--list", action="store_true", help="name the checks")
    parser.add_argument("--bundle", type=Path, metavar="DIR", help="only: would this OCI bundle start, and if not why")
    parser.add_argument("--fix", action="store_true", help="do what is safe to do, and look again")
    parser.add_argument(
        "--support",
        type=Path,
        metavar="FILE",
        help="also write a bundle (.tar.gz, .zip) for whoever helps, without secrets",
    )
    parser.add_argument("--json", action="store_true", help="machine-readable output")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from shim.doctor import checks

    if args.list:
        width = max(len(check.name) for check in checks.CHECKS)
        for check in checks.CHECKS:
            print(f"{check.name:{width}}  {check.help}")
        return 0
    from shim.doctor import support
    from shim.doctor.node import why
    from shim.errors import ShimError

    if args.support:
        support.kind_of(args.support)  # before minutes of looking
    node = _node()
    chosen = [checks.bundle(args.bundle)] if args.bundle else checks.select(args.check)
    results: list[Result] = []
    for check in chosen:
        found = list(_run(check, node, quiet=args.json))
        if args.fix and (mends := [result.mend for result in found if result.mend is not None]):
            for mend in mends:
                try:
                    print(f"  mended: {mend()}", file=sys.stderr)
                except (ShimError, OSError) as error:
                    print(f"  not mended: {why(error)}", file=sys.stderr)
            node.forget()
            found = list(_run(check, node, quiet=args.json))
        results += found
    if args.json:
        json.dump({"checks": [result.to_json() for result in results]}, sys.stdout, indent=2)
        print()
    else:
        _summary(results)
    if args.support:
        names = support.write(args.support, node, results)
        print(f"{args.support}: {len(names)} files; look through them before you send it", file=sys.stderr)
    return checks.exit_code(results)


def _run(check: Check, node: Node, *, quiet: bool) -> Iterator[Result]:
    from shim.doctor import checks

    for result in checks.run(check, node):
        if not quiet:
            _print(result)
        yield result


def _node() -> Node:
    from shim import settings
    from shim.doctor.node import Node
    from shim.errors import ConfigError
    from shim.runtime_path import daemon_command, ensure_launcher, runtime_path

    problem = None
    try:
        loaded = settings.load()
    except ConfigError as error:
        problem, loaded = error, settings.load(env={"CLIP_SHIM_CONFIG": os.devnull})
    return Node(loaded, runtime_path(), lambda: ensure_launcher(loaded), problem, daemon_command())


def _print(result: Result) -> None:
    mark, colour = _MARKS[result.status]
    if sys.stdout.isatty():
        mark = f"\x1b[{colour}m{mark}\x1b[0m"
    print(f"{mark} {result.check}: {result.found}", flush=True)
    if result.status in ("warning", "failed"):
        print(f"    expected: {result.expected}")
        if result.fix:
            print(f"    fix: {result.fix}", flush=True)


def _summary(results: list[Result]) -> None:
    count = {status: sum(result.status == status for result in results) for status in _MARKS}
    text = f"{count['ok']} ok, {count['skipped']} skipped, {count['warning']} warnings, {count['failed']} failed"
    print(f"\n{text}")
