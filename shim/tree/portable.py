"""The portable tree's process: `python -m shim.tree.portable --index FILE --blobs DIR --names A,B,… TARGET`.

Shows an index's tree at TARGET by FUSE, for kernels that cannot mount it as EROFS; the bytes come from the same blob
files. It runs until TARGET is unmounted and ignores other signals than SIGKILL: containers live on it. Killed, it
leaves a mount that answers ENOTCONN at once.

`--ready-fd N`: one line is written there, `READY` when the tree can be read, else `ERROR <why>`; then it is closed.
"""

from __future__ import annotations

import argparse
import gc
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from shim.errors import MountError, ShimError


def main(argv: Sequence[str] | None = None) -> int:
    """Serve until unmounted. Returns 0 then, 1 when it could not start."""
    parser = argparse.ArgumentParser(prog="shim.tree.portable", description="serve an index's tree by FUSE")
    parser.add_argument("--index", required=True, type=Path, help="native index file")
    parser.add_argument("--blobs", required=True, help="directory of the layers' blob files")
    parser.add_argument("--names", required=True, help="the layers' blob files, lowest first, comma between them")
    parser.add_argument("--ready-fd", type=int, help="descriptor to write READY or ERROR to")
    parser.add_argument("target", help="mount point")
    args = parser.parse_args(argv)
    report = _Report(args.ready_fd)
    for number in (signal.SIGHUP, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    if os.getpgrp() != os.getpid():
        os.setsid()  # libfuse and mfusepy want SIGINT for themselves: a terminal's must not come here
    try:
        _serve(args.index, args.blobs, [name for name in args.names.split(",") if name], args.target, report)
    except ShimError as error:
        report.say(f"ERROR {error}")
        return 1
    return 0


class _Report:
    """The one line for who started us."""

    def __init__(self, fd: int | None) -> None:
        self._fd = fd
        self.said = False

    def say(self, line: str) -> None:
        if self.said:
            return
        self.said = True
        if self._fd is None:
            print(line, file=sys.stderr)  # noqa: T201  run by hand
            return
        try:
            os.write(self._fd, line.encode(errors="replace")[:4000] + b"\n")
            os.close(self._fd)
        except OSError:
            pass  # who started us is gone; the mount is still what it is


def _serve(index_file: Path, blobs: str, names: list[str], target: str, report: _Report) -> None:
    from shim.index.codec import read_index
    from shim.tree.reader import BlobFiles, KillableReads
    from shim.tree.view import TreeView

    try:
        from shim.tree.fuseops import serve
    except OSError as error:
        raise MountError(f"libfuse 3 cannot be loaded: {error}", hint="install it: Debian's libfuse3-3") from error
    index = read_index(index_file)
    with BlobFiles(blobs, names, index.layers) as files:
        view = TreeView(index.tree)
        del index  # the span tables; the server of the blob files has its own
        gc.freeze()
        sys.setswitchinterval(0.0005)
        try:
            serve(view, KillableReads(files), target, lambda: report.say("READY"))
        except RuntimeError as error:
            raise MountError(f"libfuse cannot mount {target} (status {error})") from error
        if not report.said:
            raise MountError(f"libfuse cannot mount {target}")


if __name__ == "__main__":
    sys.exit(main())
