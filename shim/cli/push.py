"""`clip-shim push FILE URL`."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path


def add_parser(sub: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    from shim.stores.urls import FORMS

    parser = sub.add_parser(
        "push",
        help="store an index or archive: directory, S3, registry",
        description="Store an index or archive, so that other nodes find it.",
        epilog=f"URL: {FORMS}.",
    )
    parser.add_argument("file", metavar="FILE", type=Path, help="index or archive")
    parser.add_argument("url", metavar="URL", help="where to, for example s3://bucket/indexes/ or oci://registry/repo")
    parser.add_argument("--json", action="store_true", help="machine-readable output: file, url, bytes")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from shim import api
    from shim.cli.progress import Progress

    with Progress(f"pushing {args.file.name}") as progress:
        url = api.push(args.file, args.url, progress=lambda done, total: progress.update(0, done, total))
    if args.json:
        json.dump({"file": str(args.file), "url": url, "bytes": args.file.stat().st_size}, sys.stdout, indent=2)
        print()
    else:
        print(url)
    return 0
