"""`clip-shim build REF --store URL`."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict


def add_parser(sub: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    from shim.stores.urls import FORMS

    parser = sub.add_parser(
        "build",
        help="index an image and store it; an archive if it cannot be indexed",
        description="Index an image and store the index; if it cannot be indexed, make an archive with all its data and"
        " store that. For build workers: --json says which.",
        epilog=f"URL: {FORMS}.",
    )
    parser.add_argument("ref", metavar="REF", help="registry reference, for example docker.io/library/python:3.12")
    parser.add_argument("--store", metavar="URL", required=True, help="where to, for example s3://bucket/indexes/")
    parser.add_argument("--platform", metavar="P", help="os/arch[/variant] of a multi-platform image (default: ours)")
    parser.add_argument(
        "--checkpoint-mib", metavar="N", type=int, default=2, help="MiB between restart points, 1 to 64 (default 2)"
    )
    parser.add_argument(
        "--json",
        action="store_true",
        help="machine-readable output: kind (index or archive), url, image, digest, platform, bytes, reason, seconds",
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from shim import api
    from shim.cli.progress import Progress, human

    with Progress(f"building {args.ref}") as progress:
        built = api.build(
            args.ref,
            args.store,
            checkpoint_mib=args.checkpoint_mib,
            platform=args.platform,
            progress=lambda done, total: progress.update(0, done, total),
            warn=_warn,
        )
    if args.json:
        json.dump(asdict(built), sys.stdout, indent=2)
        print()
        return 0
    if built.reason:
        _warn(f"the image could not be indexed, so this is an archive: {built.reason}")
    print(f"{built.url}: {built.kind} of {built.image} {built.platform}, {human(built.bytes)}, {built.seconds} s")
    return 0


def _warn(line: str) -> None:
    print(f"warning: {line}", file=sys.stderr, flush=True)
