"""`clip-shim mount INDEX DIR`."""

from __future__ import annotations

import argparse
from pathlib import Path


def add_parser(sub: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = sub.add_parser(
        "mount",
        help="mount an image's tree on a directory",
        description="Mount the tree of an index file, read-only, on a directory. Bytes are fetched when they are read.",
    )
    parser.add_argument("index", metavar="INDEX", help="index or archive file, image://REF, oci:// or s3:// URL")
    parser.add_argument("directory", type=Path, metavar="DIR", help="where; it must exist")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from shim.attach import mount

    mount(args.index, args.directory)
    return 0
