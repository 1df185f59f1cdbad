"""`clip-shim index REF`."""

from __future__ import annotations

import argparse
import gc
import json
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from shim.registry.ref import ImageRef


def add_parser(sub: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = sub.add_parser(
        "index",
        help="make an index of an image, straight from its registry",
        description="Stream an image's layers from its registry, once, and write the index. No layer is stored.",
    )
    parser.add_argument("ref", metavar="REF", help="registry reference, for example docker.io/library/python:3.12")
    parser.add_argument("-o", "--output", metavar="FILE", type=Path, help="index file (default: NAME_TAG.clip, here)")
    parser.add_argument("--platform", metavar="P", help="os/arch[/variant] of a multi-platform image (default: ours)")
    parser.add_argument(
        "--checkpoint-mib", metavar="N", type=int, default=2, help="MiB between restart points, 1 to 64 (default 2)"
    )
    parser.add_argument(
        "--format",
        choices=("native", "clip"),
        default="native",
        help="clip: a file that Go clip mounts too, its own index before ours (default: native)",
    )
    parser.add_argument("--push", metavar="URL", help="store the index too (without -o: only there)")
    parser.add_argument("--json", action="store_true", help="machine-readable output")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from shim.errors import UsageError
    from shim.registry.ref import ImageRef

    if not 1 <= args.checkpoint_mib <= 64:
        raise UsageError(f"--checkpoint-mib {args.checkpoint_mib} is not in 1 to 64")
    ref = ImageRef.parse(args.ref)
    if args.push is not None:
        from shim.stores import urls

        urls.parse(args.push)  # before any byte is fetched
    # What is made here is kept to the end, and looking for cycles in it would take a twentieth of the time.
    gc.set_threshold(100_000)
    started = time.monotonic()
    with _output(args, ref) as output:
        facts = _index(args, output)
        facts |= {"file": str(output)} if args.output is not None or args.push is None else {}
        if args.push is not None:
            from shim import api

            facts["url"] = api.push(output, args.push)
    facts["seconds"] = round(time.monotonic() - started, 2)
    if args.json:
        json.dump(facts, sys.stdout, indent=2)
        print()
    else:
        print(_line(facts))
    return 0


@contextmanager
def _output(args: argparse.Namespace, ref: ImageRef) -> Iterator[Path]:
    """The file to write: what -o says, or a name of our own; with --push alone, one that goes again."""
    if args.push is not None and args.output is None:
        with tempfile.TemporaryDirectory(prefix="clip-shim-") as directory:
            yield Path(directory) / default_name(ref)
        return
    output = args.output if args.output is not None else Path(default_name(ref))
    check_output(output)
    yield output


def _index(args: argparse.Namespace, output: Path) -> dict[str, object]:
    from dataclasses import asdict

    from shim import api
    from shim.cli.progress import Progress

    with Progress(f"indexing {args.ref}") as progress:
        info = api.create_from_oci_image(
            args.ref,
            output,
            args.checkpoint_mib,
            platform=args.platform,
            format=args.format,
            progress=lambda done, total: progress.update(0, done, total),
            warn=print_warning,
        )
    return asdict(info)


def print_warning(line: str) -> None:
    print(f"warning: {line}", file=sys.stderr, flush=True)


def default_name(ref: ImageRef) -> str:
    """`python_3.12.clip` for docker.io/library/python:3.12; the digest's beginning where there is no tag."""
    name = ref.repository.rpartition("/")[2]
    return f"{name}_{ref.tag or (ref.digest or '').partition(':')[2][:12]}.clip"


def check_output(output: Path) -> None:
    """Before any byte is fetched: can the file be written there?"""
    from shim.errors import UsageError

    if output.is_dir():
        raise UsageError(f"{output} is a directory", hint="give a file name: -o FILE")
    if output.exists() and not output.is_file():
        raise UsageError(f"{output} is not a regular file", hint="give the name of a new file: -o FILE")
    if not output.parent.is_dir():
        raise UsageError(f"there is no directory {output.parent}", hint="make it first, or give another -o FILE")
    if not os.access(output.parent, os.W_OK):
        raise UsageError(f"the directory {output.parent} cannot be written to", hint="give another -o FILE")


def _line(facts: dict[str, object]) -> str:
    from shim.cli.progress import human

    image_bytes, index_bytes = int(str(facts["image_bytes"])), int(str(facts["index_bytes"]))
    part = f"{100 * index_bytes / image_bytes:.2f} %" if image_bytes else "all"
    where = facts.get("url") or facts["file"]
    return (
        f"{where}: {facts['image']} {facts['platform']}, {facts['entries']} entries, {facts['layers']} layers, "
        f"{human(image_bytes)}; index {human(index_bytes)} ({part} of the image), {facts['seconds']} s"
    )
