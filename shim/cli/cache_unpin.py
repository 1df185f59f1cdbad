"""`clip-shim cache unpin`."""

from __future__ import annotations

import argparse

from shim.cli.cache_pin import add_images, digests


def add_parser(sub: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = sub.add_parser(
        "unpin",
        help="undo `pin`",
        description="Let the cleaner have these images again. Exit code 1 if one of them was not pinned.",
    )
    add_images(parser, nargs="+")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from shim import settings
    from shim.cache.pins import Pins

    state = settings.load().state_dir
    pins = Pins(state)
    code = 0
    for image in args.images:
        named = [digest for digest, name in pins.read().items() if name == image]
        for digest in named or [digest for digest, _ in digests(image, state)]:
            if pins.remove(digest):
                print(f"unpinned {digest}")
            else:
                print(f"not pinned: {digest}")
                code = 1
    return code
