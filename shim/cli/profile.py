"""`clip-shim profile INDEX`."""

from __future__ import annotations

import argparse
from pathlib import Path


def add_parser(sub: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = sub.add_parser(
        "profile",
        help="put into an index what its containers read when they start",
        description="Put a start profile into an index: which parts of the image the first container started from it "
        "here has read so far, up to half a minute. Wherever the index with its profile is used, a cold start has "
        "these parts fetched ahead, in that order, and hardly waits. Start a container from INDEX, let it get as far "
        "as should be fast elsewhere, then run this.",
    )
    parser.add_argument("index", type=Path, metavar="INDEX", help="the index file that the container was started from")
    parser.add_argument("-o", "--output", type=Path, metavar="FILE", help="where the new index goes (default: INDEX)")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from dataclasses import replace

    from shim.cli.client import ask
    from shim.cli.progress import human
    from shim.errors import UsageError
    from shim.index import codec

    data = codec.read_file(args.index)
    index = codec.decode(data)
    answer = ask({"v": 1, "op": "profile", "index": codec.index_digest(data)})
    profile = tuple((layer, span) for layer, span in answer["spans"])
    if not profile:
        raise UsageError(
            f"nothing is known of how containers of {args.index} start",
            hint="start one from this very file first; its tree must not have been mounted for longer than the daemon "
            "remembers (`clip-shim status` lists what is mounted)",
        )
    output = args.output or args.index
    digest = codec.write_index(output, replace(index, profile=profile))
    size = sum(
        index.layers[layer].spans.ustart(span + 1) - index.layers[layer].spans.ustart(span) for layer, span in profile
    )
    print(f"{output}: {digest}, start profile of {len(profile)} spans ({human(size)} of the unpacked image)")
    return 0
