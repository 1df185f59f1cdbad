"""`clip-shim status`."""

from __future__ import annotations

import argparse
import json
import sys
import time
from typing import Any

from shim.cli.client import ask
from shim.cli.progress import human
from shim.cli.table import ago, table
from shim.errors import DaemonError

_CLEAR = "\x1b[H\x1b[2J"  # ECMA-48: cursor home, erase the display


def add_parser(sub: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = sub.add_parser(
        "status",
        help="show images, containers and layers in use",
        description="Show what the daemon serves: images, containers, layers with their cached part, waiting reads.",
    )
    parser.add_argument("--waiting", action="store_true", help="list the reads that wait for the registry")
    parser.add_argument(
        "--watch",
        nargs="?",
        const=2.0,
        type=_seconds,
        metavar="SECONDS",
        help="show it again every 2 (or SECONDS) seconds, until Ctrl-C; with --json one object a line",
    )
    parser.add_argument("--json", action="store_true", help="machine-readable output")
    parser.set_defaults(run=run)


def _seconds(text: str) -> float:
    seconds = float(text)
    if not 0.1 <= seconds <= 3600:
        raise argparse.ArgumentTypeError("from 0.1 to 3600 seconds")
    return seconds


def run(args: argparse.Namespace) -> int:
    while True:
        try:
            text = _show(args)
        except DaemonError as error:
            if args.watch is None:
                raise
            text = f"{error}\n"
        clear = _CLEAR if args.watch is not None and not args.json and sys.stdout.isatty() else ""
        print(clear + text, end="", flush=True)
        if args.watch is None:
            return 0
        time.sleep(args.watch)


def _show(args: argparse.Namespace) -> str:
    answer = ask({"v": 1, "op": "status", "files": args.waiting})
    answer.pop("ok", None)
    if args.json:
        return json.dumps(answer, indent=None if args.watch is not None else 2) + "\n"
    return "\n".join(_waiting(answer["waiting"]) if args.waiting else _tables(answer)) + "\n"


def _tables(answer: dict[str, Any]) -> list[str]:
    daemon = answer["daemon"]
    layers = {layer["diff_id"]: layer for layer in answer["layers"]}
    lines = [
        f"daemon  pid {daemon['pid']}, version {daemon['version']}, up {ago(daemon['uptime'])}",
        f"trees   by {daemon['tier']} ({daemon['tier_reason']})",
        f"health  {_health(answer)}",
        "",
    ]
    rows: list[tuple[object, ...]] = []
    for image in answer["images"]:
        mine = [layers[diff_id] for diff_id in dict.fromkeys(image["layers"]) if diff_id in layers]
        size, cached, fetched = (sum(layer[key] for layer in mine) for key in ("size", "cached_bytes", "fetched_bytes"))
        digest = image["index"][7:19]
        rows.append(
            (image["image"], digest, image["overlays"], len(mine), human(size), _part(cached, size), human(fetched))
        )
    lines += [
        *table(("IMAGE", "INDEX", "CONTAINERS", "LAYERS", "SIZE", "CACHED", "FETCHED"), rows, right="..rrrrr"),
        "",
    ]
    for image in answer["images"]:
        if image["reason"]:
            lines += [f"{image['image']} was mounted by the step {image['step']} of `fallback`: {image['reason']}", ""]
    names = {image["index"]: image["image"] for image in answer["images"]}
    containers = [(c["id"] or "-", names.get(c["index"], c["index"][7:19]), c["rootfs"]) for c in answer["containers"]]
    lines += [*table(("CONTAINER", "IMAGE", "ROOTFS"), containers), ""]
    rows = [
        (
            layer["diff_id"][7:19],
            human(layer["size"]),
            _part(layer["cached_bytes"], layer["size"]),
            human(layer["fetched_bytes"]),
            layer["hits"],
            layer["misses"],
            layer["failures"],
            "open" if layer["open"] else "idle",
        )
        for layer in answer["layers"]
    ]
    head = ("LAYER", "SIZE", "CACHED", "FETCHED", "HITS", "MISSES", "FAILURES", "STATE")
    return lines + table(head, rows, right=".rrrrrr")


def _health(answer: dict[str, Any]) -> str:
    said = []
    if answer["daemon"]["tier"] == "none":
        said.append("no tree can be mounted here")
    if answer["waiting"]:
        oldest = max(read["age"] for read in answer["waiting"])
        said.append(f"{len(answer['waiting'])} reads wait, the oldest {oldest:.1f} s: see `clip-shim status --waiting`")
    if answer["daemon"]["handover"]:
        said.append(f"should the daemon be killed, reads of running containers fail: {answer['daemon']['handover']}")
    if answer["daemon"]["read_failures"]:
        said.append(f"{answer['daemon']['read_failures']} reads failed since its start: the log names the files")
    return "; ".join(said) or "good"


def _part(cached: int, size: int) -> str:
    return f"{100 * cached / size:.1f} %" if size else "100 %"


def _waiting(rows: list[dict[str, Any]]) -> list[str]:
    if not rows:
        return ["no read is waiting"]
    head = ("PID", "CONTAINER", "FILE", "LAYER", "OFFSET", "BYTES", "WAITS", "TROUBLE")
    lines = [
        (
            row["pid"],
            row["container"] or row["process"] or "-",
            row["file"] or "-",
            row["layer"].removeprefix("sha256:")[:12],
            row["offset"],
            row["size"],
            f"{row['age']:.1f} s",
            row["trouble"] or "waiting",
        )
        for row in rows
    ]
    return table(head, lines, right="r...rrr")
