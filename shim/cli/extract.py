"""`clip-shim extract FILE DIR`."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path


def add_parser(sub: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = sub.add_parser(
        "extract",
        help="unpack an archive into a directory",
        description="Unpack an archive into a new directory, every file's checksum compared. Go clip's archives too.",
    )
    parser.add_argument("file", metavar="FILE", type=Path, help="archive")
    parser.add_argument("directory", metavar="DIR", type=Path, help="a directory that is empty, or not there yet")
    parser.add_argument("--json", action="store_true", help="machine-readable output: file, directory, entries")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from shim import api
    from shim.cli.progress import Progress

    with Progress(f"extracting {args.file.name}") as progress:
        entries = api.extract_archive(
            args.file,
            args.directory,
            progress=lambda done, total: progress.update(0, done, total),
            warn=lambda line: print(f"warning: {line}", file=sys.stderr, flush=True),
        )
    if args.json:
        json.dump({"file": str(args.file), "directory": str(args.directory), "entries": entries}, sys.stdout, indent=2)
        print()
    else:
        print(f"{args.directory}: {entries} entries")
    return 0
