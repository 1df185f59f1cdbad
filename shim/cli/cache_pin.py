"""`clip-shim cache pin`: what the cleaner leaves alone."""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

_DIGEST = re.compile(r"sha256:[0-9a-f]{64}")


def add_parser(sub: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = sub.add_parser(
        "pin",
        help="keep images out of the cleaner's reach",
        description="Keep what the cache has of these images. Without an IMAGE, list what is pinned.",
    )
    add_images(parser, nargs="*")
    parser.set_defaults(run=run)


def add_images(parser: argparse.ArgumentParser, nargs: str) -> None:
    parser.add_argument(
        "images",
        nargs=nargs,
        metavar="IMAGE",
        help="an index file, a digest (sha256:…) of an index or image, or the reference of an image that was started",
    )


def run(args: argparse.Namespace) -> int:
    from shim import settings
    from shim.cache.pins import Pins

    state = settings.load().state_dir
    pins = Pins(state)
    if not args.images:
        for digest, name in pins.read().items():
            print(f"{digest}  {name}".rstrip())
        return 0
    found = [pair for image in args.images for pair in digests(image, state)]
    for digest, name in found:
        print(f"{'pinned' if pins.add(digest, name) else 'pinned already:'} {digest}  {name}".rstrip())
    return 0


def digests(image: str, state: Path) -> Iterator[tuple[str, str]]:
    """(digest, name) of what a person means. Raises UsageError: there is no such file, and no such image is kept."""
    from shim.daemon.prepare import read_meta
    from shim.errors import UsageError
    from shim.index import codec

    if _DIGEST.fullmatch(image):
        yield image, ""
        return
    if Path(image).is_file():
        data = codec.read_file(Path(image))
        yield codec.index_digest(data), codec.decode(data).image  # raises IndexFormatError: it is none
        return
    found = False
    for directory in sorted((state / "trees").glob("?" * 64)):
        meta = read_meta(directory)
        if meta is not None and meta["image"] == image:
            found = True
            yield f"sha256:{directory.name}", image
    if not found:
        raise UsageError(
            f"{image} is no index file, and no image of that name is in the cache",
            hint="`clip-shim cache ls` shows the images; or give an index file, or sha256:…",
        )
