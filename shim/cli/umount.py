"""`clip-shim umount DIR`."""

from __future__ import annotations

import argparse
import os
from pathlib import Path


def add_parser(sub: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = sub.add_parser("umount", help="undo `mount`", description="Unmount what `clip-shim mount` mounted.")
    parser.add_argument("directory", type=Path, metavar="DIR")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from shim.errors import MountError
    from shim.mount import mountinfo, syscalls

    path = os.fsencode(args.directory.absolute())
    entry = mountinfo.at(os.path.normpath(path))
    if entry is None or entry.fs_type not in (b"erofs", b"fuse", b"fuse.clip-shim-tree"):
        raise MountError(f"no image is mounted on {args.directory}", hint="see /proc/self/mountinfo")
    try:
        syscalls.umount2(os.fsdecode(path), syscalls.UMOUNT_NOFOLLOW)
    except OSError as error:
        raise MountError(
            f"cannot unmount {args.directory}: {error.strerror}", hint="a program still uses it: see `fuser -vm`"
        ) from error
    return 0
