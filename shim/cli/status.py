"""`clip-shim status`."""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any

from shim.cli.client import ask
from shim.cli.progress import human


def add_parser(sub: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = sub.add_parser(
        "status",
        help="show images, containers and layers in use",
        description="Show what the daemon serves: images, containers, layers with their cached part, waiting reads.",
    )
    parser.add_argument("--waiting", action="store_true", help="list the reads that wait for the registry")
    parser.add_argument("--json", action="store_true", help="machine-readable output")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    answer = ask({"v": 1, "op": "status", "files": args.waiting})
    answer.pop("ok", None)
    if args.json:
        json.dump(answer, sys.stdout, indent=2)
        print()
    elif args.waiting:
        _waiting(answer["waiting"])
    else:
        _table(answer)
    return 0


def _table(answer: dict[str, Any]) -> None:
    daemon = answer["daemon"]
    print(f"daemon   pid {daemon['pid']}, version {daemon['version']}, trees by {daemon['tier']}")
    print(f"images   {len(answer['images'])}")
    for image in answer["images"]:
        print(f"  {image['image']}  {image['index'][:19]}  {image['overlays']} overlays, {image['tier']}")
    print(f"layers   {len(answer['layers'])}")
    for layer in answer["layers"]:
        part = 100 * layer["cached_bytes"] / layer["size"] if layer["size"] else 100.0
        open_ = "open" if layer["open"] else "idle"
        print(
            f"  {layer['diff_id'][:19]}  {human(layer['size']):>9}  {part:5.1f} % cached  "
            f"{human(layer['fetched_bytes']):>9} fetched  {open_}"
        )
    print(f"containers {len(answer['containers'])}")
    for container in answer["containers"]:
        print(f"  {container['id'] or '-'}  {container['rootfs']}  {container['index'][:19]}")
    if answer["waiting"]:
        print(f"{len(answer['waiting'])} reads wait for the registry: see `clip-shim status --waiting`")


def _waiting(rows: list[dict[str, Any]]) -> None:
    if not rows:
        print("no read is waiting")
    for row in rows:
        print(
            f"pid {row['pid']}  {row['container'] or row['process'] or '-'}  {row['file'] or '-'}  "
            f"layer {row['layer'].removeprefix('sha256:')[:12]}  offset {row['offset']}  {row['size']} bytes  "
            f"{row['age']:.1f} s  {row['trouble'] or 'waiting'}"
        )
