"""`clip-shim archive (REF | --rootfs DIR) -o FILE`."""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import asdict
from pathlib import Path


def add_parser(sub: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = sub.add_parser(
        "archive",
        help="make an archive, all data in one file, of an image or a directory",
        description="Make a v1 archive: an image's whole tree, data and all, in one file that Go clip mounts too."
        " Layers are streamed once; nothing is unpacked.",
    )
    parser.add_argument(
        "ref", metavar="REF", nargs="?", help="registry reference, for example docker.io/library/redis:7"
    )
    parser.add_argument("--rootfs", metavar="DIR", type=Path, help="archive this directory instead of an image")
    parser.add_argument("-o", "--output", metavar="FILE", type=Path, required=True, help="the archive")
    parser.add_argument("--platform", metavar="P", help="os/arch[/variant] of a multi-platform image (default: ours)")
    parser.add_argument(
        "--push",
        metavar="URL",
        help="s3://BUCKET/KEY: put it there too, and write a small index of it beside FILE, named .rclip: mount that",
    )
    parser.add_argument("--json", action="store_true", help="machine-readable output")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from shim import api
    from shim.cli.index import check_output
    from shim.cli.progress import Progress, human
    from shim.errors import UsageError

    if (args.ref is None) == (args.rootfs is None):
        raise UsageError("give either an image reference or --rootfs DIR", hint="see `clip-shim archive --help`")
    check_output(args.output)
    started = time.monotonic()
    with Progress(f"archiving {args.ref or args.rootfs}") as progress:
        info = api.create_archive(
            args.output,
            args.ref,
            rootfs=args.rootfs,
            platform=args.platform,
            progress=lambda done, total: progress.update(0, done, total),
            warn=_warn,
        )
    facts: dict[str, object] = {**asdict(info), "file": str(args.output)}
    if args.push is not None:
        pointer = args.output.with_suffix(".rclip")
        with Progress(f"pushing {args.output.name}") as progress:
            facts["url"] = api.push_archive(
                args.output, args.push, pointer, progress=lambda done, total: progress.update(0, done, total)
            )
        facts["pointer"] = str(pointer)
    facts["seconds"] = round(time.monotonic() - started, 2)
    if args.json:
        json.dump(facts, sys.stdout, indent=2)
        print()
        return 0
    if info.left_out:
        _warn(f"Go clip will not see {info.left_out} of the names: devices, fifos and sockets")
    size = human(info.archive_bytes)
    print(f"{args.output}: {info.image} {info.platform}, {info.entries} entries, {size}, {facts['seconds']} s")
    if args.push is not None:
        print(f"{facts['pointer']}: its index, data in {facts['url']}")
    return 0


def _warn(line: str) -> None:
    print(f"warning: {line}", file=sys.stderr, flush=True)
