"""`clip-shim mount INDEX DIR`."""

from __future__ import annotations

import argparse
import os
from pathlib import Path


def add_parser(sub: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = sub.add_parser(
        "mount",
        help="mount an image's tree on a directory",
        description="Mount the tree of an index file, read-only, on a directory. Bytes are fetched when they are read.",
    )
    parser.add_argument("index", metavar="INDEX", help="index file made by `clip-shim index`, or image://REF")
    parser.add_argument("directory", type=Path, metavar="DIR", help="where; it must exist")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from contextlib import closing

    from shim.cli.client import connect_or_start
    from shim.errors import MountError, UsageError
    from shim.mount import mountinfo, syscalls

    if not args.directory.is_dir():
        raise UsageError(f"{args.directory} is not a directory", hint="make it first with mkdir")
    fd, value = -1, args.index
    if "://" not in value:
        value = os.path.abspath(value)
        fd = os.open(value, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    with closing(connect_or_start()) as connection:
        request = {"v": 1, "op": "acquire", "source": "mount", "value": value}
        answer = connection.request(request, fd)
        tree = answer["tree"]
        if mountinfo.at(tree) is None:
            raise MountError(
                f"the daemon mounted the tree at {tree}, which is not to be seen here",
                hint="daemon and command run in different mount namespaces: `nsenter -t 1 -m clip-shim mount …`",
            )
        # A clone has a life of its own: the daemon may unmount its tree, ours stays until `umount`.
        try:
            clone = syscalls.open_tree(tree, syscalls.OPEN_TREE_CLONE | syscalls.OPEN_TREE_CLOEXEC)
            syscalls.attach(clone, str(args.directory.resolve()))
            os.close(clone)
        except OSError as error:
            raise MountError(f"cannot mount on {args.directory}: {error.strerror}") from error
    return 0
