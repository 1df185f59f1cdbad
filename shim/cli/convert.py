"""`clip-shim convert REF THIN_REF`."""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shim.cli.index import print_warning

if TYPE_CHECKING:
    from shim.registry.ref import ImageRef
    from shim.thin.convert import Converted


def add_parser(sub: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = sub.add_parser(
        "convert",
        help="push a thin image: an index that any engine can run",
        description="Index an image and push its thin image: one small layer with the index, the directories, and what"
        " engines read by themselves; the original's config. Run it with `docker run --runtime=clip THIN_REF`."
        " The original must stay in its registry: what the container reads comes from there.",
    )
    parser.add_argument("ref", metavar="REF", help="the image, for example docker.io/library/python:3.12")
    parser.add_argument("thin", metavar="THIN_REF", help="where its thin image goes: registry/repository:tag")
    parser.add_argument(
        "--platform", metavar="P", help="os/arch[/variant], several with commas between, or all (default: ours)"
    )
    parser.add_argument(
        "--volume",
        metavar="DIR",
        action="append",
        default=[],
        help="a directory whose content goes into the thin image, as that of declared volumes does: for new named"
        " volumes mounted there (may be repeated)",
    )
    parser.add_argument(
        "--max-volume-mib", metavar="N", type=int, default=256, help="MiB of such content allowed (default 256)"
    )
    parser.add_argument(
        "--index",
        metavar="FILE",
        type=Path,
        help="the image's index, made before and perhaps with a start profile: it is not indexed again",
    )
    parser.add_argument(
        "--json",
        action="store_true",
        help="machine-readable output: image, thin, digest (of what THIN_REF names now), seconds, and images: for each"
        " platform what `index --json` says, thin_digest, thin_bytes, skeleton_entries, content_bytes",
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from shim import settings
    from shim.cli.progress import Progress
    from shim.errors import UsageError
    from shim.index import codec
    from shim.registry.client import RegistryClient
    from shim.registry.hooks import Hooks
    from shim.registry.ref import ImageRef
    from shim.thin.convert import convert

    if args.max_volume_mib < 0:
        raise UsageError("--max-volume-mib is negative")
    if relative := [path for path in args.volume if not path.startswith("/")]:
        raise UsageError(f"--volume {relative[0]}: the path of a directory in the image begins with /")
    given = codec.read_file(args.index) if args.index is not None else None
    ref, target = ImageRef.parse(args.ref), ImageRef.parse(args.thin)
    started = time.monotonic()
    client = RegistryClient(settings.load()["registries"], hooks=Hooks(warn=print_warning))
    try:
        with Progress(f"indexing {ref}") as progress:
            made = convert(
                ref,
                target,
                client,
                platform=args.platform,
                volumes=args.volume,
                max_volume_bytes=args.max_volume_mib << 20,
                index_file=given,
                progress=progress.update,
                warn=print_warning,
            )
    finally:
        client.close()
    facts = _facts(ref, target, made) | {"seconds": round(time.monotonic() - started, 2)}
    if args.json:
        json.dump(facts, sys.stdout, indent=2)
        print()
    else:
        for image in facts["images"]:
            print(_line(image))
        print(f"{target}@{made.digest}: run it with docker run --runtime=clip {target} ({facts['seconds']} s)")
    return 0


def _facts(ref: ImageRef, target: ImageRef, made: Converted) -> dict[str, Any]:
    images = [
        {
            **image.index,
            "thin_digest": image.digest,
            "thin_bytes": image.layer.size,
            "skeleton_entries": image.skeleton_entries,
            "content_bytes": image.content_bytes,
        }
        for image in made.images
    ]
    return {"image": ref.image, "thin": target.image, "digest": made.digest, "images": images}


def _line(image: dict[str, Any]) -> str:
    from shim.cli.progress import human

    return (
        f"{image['image']} {image['platform']}: {image['entries']} entries, {human(image['image_bytes'])};"
        f" thin image {human(image['thin_bytes'])}, of it index {human(image['index_bytes'])}"
    )
