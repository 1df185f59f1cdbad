"""`clip-shim config show|default|check|compile`."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from shim.settings import Settings


def add_parser(sub: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = sub.add_parser(
        "config", help="show or check the configuration", description="Show or check the configuration."
    )
    verbs = parser.add_subparsers(metavar="show|default|check", required=True, dest="what")
    show = verbs.add_parser("show", help="every setting, where it came from, and the runtime's path")
    show.add_argument("--json", action="store_true", help="machine-readable output")
    verbs.add_parser("default", help="a configuration file with every key, its default and what it does")
    check = verbs.add_parser("check", help="read a configuration file and say what is wrong with it")
    check.add_argument("file", type=Path, nargs="?", metavar="FILE")
    verbs.add_parser("compile", help="write the launcher and its settings again (after a change by hand)")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from shim import settings

    if args.what == "default":
        print(default_yaml(), end="")
        return 0
    loaded = settings.load(args.file if args.what == "check" else None)
    if args.what == "check":
        _check(loaded)
        print("the configuration is valid")
        return 0
    from shim.doctor.support import redact_value
    from shim.runtime_path import ensure_launcher

    runtime_path = str(ensure_launcher(loaded))
    if args.what == "compile":
        print(f"runtime_path: {runtime_path}")
        return 0
    if args.json:
        values = {key: redact_value(_plain(loaded[key])) for key in settings.BY_KEY}
        json.dump(
            {"runtime_path": runtime_path, "settings": values, "source": dict(loaded.source)}, sys.stdout, indent=2
        )
        print()
    else:
        print(f"runtime_path: {runtime_path}")
        for key in settings.BY_KEY:
            print(f"{key}: {_scalar(redact_value(_plain(loaded[key])))}  # {loaded.source[key]}")
    return 0


def _check(loaded: Settings) -> None:
    """What the settings table cannot see."""
    from shim.daemon.trust import Trust
    from shim.registry.hosts import Hosts
    from shim.stores.transfer import Stores

    Hosts(loaded["registries"])
    Trust(loaded)
    with Stores(loaded) as stores:
        for url in (*loaded["stores.lookup"], *loaded["stores.write"]):
            stores.store(url)


def default_yaml() -> str:
    """A whole configuration file, made from the settings table; `settings.load` reads it back to the defaults."""
    from shim.settings import SETTINGS

    lines = ["# clip-shim: every setting with its default. Remove what you do not change.\n"]
    group = ""
    for setting in SETTINGS:
        head, _, name = setting.key.rpartition(".")
        if head != group and head:
            lines.append(f"{head}:\n")
        group = head
        indent = "  " if head else ""
        lines.append(f"{indent}# {setting.help} ({setting.env})\n{indent}{name}: {_scalar(setting.default)}\n")
    return "".join(lines)


def _scalar(value: object) -> str:
    return json.dumps(value)  # JSON is YAML


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value
