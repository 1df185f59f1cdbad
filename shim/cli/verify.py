"""`clip-shim verify FILE`."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from shim.index.model import Index


def add_parser(sub: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = sub.add_parser(
        "verify",
        help="check an index file against the registry, an archive against its data",
        description="Fetch the image's manifest, config and layers again and compare all with the index, to the byte."
        " Of an archive, or a pointer to one in S3, the data are read and compared.",
    )
    parser.add_argument("file", metavar="FILE", type=Path, help="index or archive")
    parser.add_argument("--json", action="store_true", help="machine-readable output: image, digest, ok, differences")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from shim import api, settings
    from shim.cli.progress import Progress
    from shim.errors import IntegrityError, LayerError, NotFoundError
    from shim.index import codec
    from shim.index.verify import verify_index
    from shim.registry.client import RegistryClient

    index = codec.read_index(args.file)
    if index.archive is not None:
        with Progress(f"verifying {args.file.name}") as progress:
            wrong = api.verify_archive(args.file, progress=lambda done, total: progress.update(0, done, total))
        return _say(args, index, wrong or [], "whole")
    client = RegistryClient(settings.load()["registries"])
    try:
        with Progress(f"verifying {index.image}") as progress:
            differences = verify_index(index, client, progress=progress.update)
    except (IntegrityError, LayerError, NotFoundError) as error:
        differences = [str(error)]
    finally:
        client.close()
    return _say(args, index, differences, f"equal to {index.image}@{index.digest} in the registry")


def _say(args: argparse.Namespace, index: Index, differences: list[str], good: str) -> int:
    ok = not differences
    if args.json:
        facts = {"image": index.image, "digest": index.digest, "ok": ok, "differences": differences}
        json.dump(facts, sys.stdout, indent=2)
        print()
    elif ok:
        print(f"{args.file}: {good}")
    else:
        for line in differences:
            print(f"{args.file}: {line}")
    return 0 if ok else 1
