"""`clip-shim inspect FILE`."""

from __future__ import annotations

import argparse
import json
import os
import stat
import sys
from collections.abc import Iterator
from datetime import UTC, datetime
from io import TextIOWrapper
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from shim.index.model import Node, Tree


def add_parser(sub: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = sub.add_parser(
        "inspect",
        help="say what an index file holds",
        description="Say what an index file holds. Nothing is fetched.",
    )
    parser.add_argument("file", metavar="FILE", type=Path, help="index or archive")
    parser.add_argument("--tree", action="store_true", help="list the merged tree, one line for each name")
    parser.add_argument("--json", action="store_true", help="machine-readable output")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from shim.errors import UsageError
    from shim.index import codec

    if args.tree and args.json:
        raise UsageError("--tree and --json do not go together")
    foreign = _foreign(args.file)
    if foreign is not None:
        if args.tree:
            raise UsageError(
                "--tree is for our own indexes", hint="leave it out, or index the image: `clip-shim index`"
            )
        return _show(foreign, as_json=args.json)
    data = codec.read_file(args.file)
    if args.tree:
        if isinstance(sys.stdout, TextIOWrapper):
            sys.stdout.reconfigure(errors="backslashreplace")  # a terminal that is not UTF-8
        sys.stdout.writelines(line + "\n" for line in list_tree(codec.decode_tree(data)))
        return 0
    return _show(codec.summary(data), as_json=args.json)


def _foreign(path: Path) -> dict[str, Any] | None:
    """What a Go clip file is about that has no index of ours behind it; None for all other files."""
    from shim.goclip import files
    from shim.index import container

    with open(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
        info = os.fstat(file.fileno())
        if not stat.S_ISREG(info.st_mode) or not files.is_go(file.read(len(files.MAGIC))):
            return None

        def read(offset: int, length: int) -> bytes:
            return os.pread(file.fileno(), length, offset)

        return None if container.start_of_part(read, info.st_size) else files.describe(read, info.st_size)


def _show(facts: dict[str, Any], *, as_json: bool) -> int:
    if as_json:
        json.dump(facts, sys.stdout, indent=2)
        print()
        return 0
    from shim.cli.progress import human

    lacks = facts.pop("lacks", [])
    index_part = f" ({100 * facts['index_bytes'] / facts['image_bytes']:.2f} %)" if facts["image_bytes"] else ""
    facts["image_bytes"] = f"{facts['image_bytes']} ({human(facts['image_bytes'])})"
    facts["index_bytes"] = f"{facts['index_bytes']}{index_part}"
    for key, value in facts.items():
        print(f"{key.replace('_', ' '):<12} {value}")
    for number, line in enumerate(lacks):
        print(f"{'' if number else 'lacks':<12} {line}")
    return 0


def list_tree(tree: Tree) -> Iterator[str]:
    """Lines as of `ls -l`: mode, links, owner, size or device, time (UTC, to the nanosecond), path, target, xattrs.

    Bytes that a terminal would act on, and what is not UTF-8, are shown as escapes; a backslash as two.
    """
    for path, node in tree.walk():
        size = f"{node.rdev[0]},{node.rdev[1]}" if stat.S_ISCHR(node.mode) or stat.S_ISBLK(node.mode) else node.size
        line = (
            f"{stat.filemode(node.mode)} {node.nlink:>3} {node.uid}:{node.gid} {size:>10} {_time(node)} {escape(path)}"
        )
        if node.is_symlink:
            line += f" -> {escape(node.target)}"
        if node.xattrs:
            line += " [" + ", ".join(f"{escape(key)}={value[:64].hex()}" for key, value in node.xattrs) + "]"
        yield line


def _time(node: Node) -> str:
    seconds, rest = divmod(node.mtime, 1_000_000_000)
    try:
        text = datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%dT%H:%M:%S")
    except (ValueError, OverflowError, OSError):
        text = f"@{seconds}"
    return f"{text}.{rest:09d}"


def escape(data: bytes) -> str:
    """Printable text that stands for exactly these bytes."""
    return "".join(_char(char) for char in data.decode("utf-8", "surrogateescape"))


def _char(char: str) -> str:
    if char == "\\":
        return "\\\\"
    if char.isprintable():
        return char
    if "\udc80" <= char <= "\udcff":
        return f"\\x{ord(char) - 0xDC00:02x}"
    return char.encode("unicode_escape").decode("ascii")
