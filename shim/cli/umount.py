"""`clip-shim umount DIR`."""

from __future__ import annotations

import argparse
from pathlib import Path


def add_parser(sub: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = sub.add_parser("umount", help="undo `mount`", description="Unmount what `clip-shim mount` mounted.")
    parser.add_argument("directory", type=Path, metavar="DIR")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from shim.attach import umount

    umount(args.directory)
    return 0
