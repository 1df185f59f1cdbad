"""`clip-shim pull URL`."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path


def add_parser(sub: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    from shim.stores.urls import FORMS

    parser = sub.add_parser(
        "pull",
        help="fetch an index or archive from a store",
        description="Fetch an index or archive that was pushed, or the index beside an image: oci://REGISTRY/REPO:TAG.",
        epilog=f"URL: {FORMS}.",
    )
    parser.add_argument("url", metavar="URL", help="where from")
    parser.add_argument("-o", "--output", metavar="FILE", type=Path, help="file to write (default: NAME.clip, here)")
    parser.add_argument("--json", action="store_true", help="machine-readable output: url, file, bytes, kind")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from shim import api
    from shim.cli.index import check_output

    output = args.output if args.output is not None else Path(default_name(args.url))
    check_output(output)
    facts = api.pull(args.url, output)
    if args.json:
        found = {"url": args.url, "file": str(output), "bytes": facts.size, "kind": facts.kind}
        json.dump(found, sys.stdout, indent=2)
        print()
    else:
        from shim.cli.progress import human

        what = f"{facts.kind} of {facts.image}" if facts.image is not None else facts.kind
        print(f"{output}: {what}, {human(facts.size)}")
    return 0


def default_name(url: str) -> str:
    """`python.clip` for s3://bucket/team/python.clip, `python_3.12.clip` for oci://docker.io/library/python:3.12."""
    name = url.rstrip("/").rpartition("/")[2].partition("@")[0].replace(":", "_")
    return name if name.endswith(".clip") else f"{name}.clip"
