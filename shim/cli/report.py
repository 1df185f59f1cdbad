"""`clip-shim report`: what a container's start read, as one self-contained page or as text."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from shim.cli.client import ask
from shim.cli.progress import human
from shim.cli.table import table
from shim.errors import IndexFormatError

_SHOWN = 15  # files and reads in the text


def add_parser(sub: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = sub.add_parser(
        "report",
        help="show what a container's start read, and when",
        description="Show what a container's start read: when, how long it waited, bytes needed against bytes fetched. "
        "The daemon remembers its last 32 starts, each for `report.seconds`.",
    )
    parser.add_argument("container", metavar="CONTAINER", help="a container's ID, or how it begins")
    parser.add_argument("-o", "--output", type=Path, metavar="FILE.html", help="write one self-contained HTML page")
    parser.add_argument("--json", action="store_true", help="machine-readable output")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from shim import settings
    from shim.index.codec import write_file

    record = ask({"v": 1, "op": "report", "container": args.container})
    record.pop("ok", None)
    index = settings.load().state_dir / "trees" / record["index"].removeprefix("sha256:") / "index.clip"
    record |= resolve(index, record["events"], len(record["layers"]))
    if args.output is not None:
        write_file(args.output, page(record).encode())
    if args.json:
        print(json.dumps(record, indent=2))
    elif args.output is not None:
        print(f"{args.output}: {record['reads']} reads of {len(record['files'])} files")
    else:
        print("\n".join(_text(record)))
    return 0


def resolve(index: Path, events: list[list[float]], layers: int) -> dict[str, Any]:
    """Which files the reads were for. events: [layer, offset, size, …].

    Gives `files`: [path, bytes in the image], and `file_of`: for each event the number of the first file that has bytes
    there, -1 for what is no file's (tar headers, padding) or not known because the index is gone. And `layer_sizes`.
    """
    from shim.index import codec

    try:
        decoded = codec.decode(codec.read_file(index), spans=False)
    except (OSError, IndexFormatError):
        return {"files": [], "file_of": [-1] * len(events), "layer_sizes": [0] * layers, "layer_bytes": [0] * layers}
    extents: list[list[tuple[int, int, bytes, int]]] = [[] for _ in decoded.layers]
    for path, node in decoded.tree.walk():
        for extent in node.extents or ():
            extents[extent.layer].append((extent.offset, extent.length, path, node.size))
    files: list[list[object]] = []
    numbers: dict[bytes, int] = {}
    file_of = [-1] * len(events)
    order = sorted(range(len(events)), key=lambda i: (events[i][0], events[i][1]))
    for items in extents:
        items.sort()
    places = [0] * len(extents)
    for i in order:
        layer, offset, size = int(events[i][0]), events[i][1], events[i][2]
        items = extents[layer] if layer < len(extents) else []
        at = places[layer] if layer < len(extents) else 0
        while at < len(items) and items[at][0] + items[at][1] <= offset:
            at += 1
        if layer < len(extents):
            places[layer] = at
        if at < len(items) and items[at][0] < offset + size:
            path = items[at][2]
            if path not in numbers:
                numbers[path] = len(files)
                files.append([path.decode("utf-8", "backslashreplace"), items[at][3]])
            file_of[i] = numbers[path]
    return {
        "files": files,
        "file_of": file_of,
        "layer_sizes": [layer.uncompressed_size for layer in decoded.layers],
        "layer_bytes": [layer.size for layer in decoded.layers],
    }


def page(record: dict[str, Any]) -> str:
    """The page: the template with the record in it. Names of files are an image's: `<` cannot end the script."""
    text = (Path(__file__).parent / "report.html").read_text(encoding="utf-8")
    data = json.dumps(record, separators=(",", ":")).replace("<", "\\u003c").replace("\u2028", "").replace("\u2029", "")
    return text.replace("/*RECORD*/null", data)


def _text(record: dict[str, Any]) -> list[str]:
    steps = record["timings_ms"]
    lines = [
        f"container {record['container']} of {record['image']}, started {record['started']}",
        "start      "
        + (", ".join(f"{name} {ms:.1f} ms" for name, ms in steps.items()) if steps else "the wrapper did not finish")
        + (f", together {sum(steps.values()):.1f} ms" if steps else ""),
        f"reads      {record['reads']} in {record['seconds']:.0f} s; {record['waited']} waited for the registry, "
        f"at most {record['slowest_ms']:.0f} ms",
        f"bytes      {human(record['needed_bytes'])} needed; {human(record['demand_bytes'])} fetched for them, "
        f"{human(record['ahead_bytes'])} ahead; {human(record['fetched_bytes'])} over the network "
        f"in {record['requests']} requests",
    ]
    if record["lost"]:
        lines.append(f"           {record['lost']} later reads are counted, but not shown")
    if record["shared"]:
        lines.append(
            "           another container with the same layers was started meanwhile: its reads are among them"
        )
    slow = sorted(zip(record["events"], record["file_of"], strict=True), key=lambda pair: -pair[0][4])[:_SHOWN]
    rows = [
        (f"{wait:.1f} ms", f"{after:.0f} ms", human(size), record["files"][number][0] if number >= 0 else "-")
        for (_, _, size, after, wait), number in slow
        if wait
    ]
    if rows:
        lines += ["", *table(("WAITED", "AT", "BYTES", "FILE"), rows, right="rrr")]
    return lines
