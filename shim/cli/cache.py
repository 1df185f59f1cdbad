"""`clip-shim cache ls|verify|clean|pin|unpin`: each is a module of its own."""

from __future__ import annotations

import argparse
import importlib

# its module has add_parser(sub), as a verb's has
SUBVERBS: dict[str, str] = {
    "ls": "shim.cli.cache_ls",
    "verify": "shim.cli.cache_verify",
    "clean": "shim.cli.cache_clean",
    "pin": "shim.cli.cache_pin",
    "unpin": "shim.cli.cache_unpin",
}


def add_parser(sub: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = sub.add_parser(
        "cache", help="list, check and clean the layer cache", description="List, check and clean the layer cache."
    )
    verbs = parser.add_subparsers(metavar="|".join(SUBVERBS), required=True)
    for module in SUBVERBS.values():
        importlib.import_module(module).add_parser(verbs)
