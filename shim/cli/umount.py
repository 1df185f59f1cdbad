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

    path = os.path.realpath(args.directory)  # as `mount` did
    entry = mountinfo.at(path)
    if entry is None or not _is_tree(entry.fs_type, entry.source):
        raise MountError(f"no image is mounted on {args.directory}", hint="see /proc/self/mountinfo")
    try:
        syscalls.umount2(path, syscalls.UMOUNT_NOFOLLOW)
    except OSError as error:
        raise MountError(
            f"cannot unmount {args.directory}: {error.strerror}", hint="a program still uses it: see `fuser -vm`"
        ) from error
    return 0


def _is_tree(fs_type: bytes, source: bytes) -> bool:
    """Whether a mount looks like one of ours: other EROFS and FUSE mounts are not for us to undo."""
    if fs_type == b"erofs":
        return source.endswith(b"/image.erofs") or source.startswith((b"/proc/self/fd/", b"/dev/loop"))
    return fs_type == b"fuse.clip-shim-tree"
