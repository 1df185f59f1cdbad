"""`clip-shim install ENGINE`; `uninstall` shares it."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from shim.install.plan import Plan

_NAMES = ("docker", "containerd", "podman", "crio", "podman-hooks")
_SHOWN = 5


def add_parser(sub: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = sub.add_parser(
        "install",
        help="make the runtime known to an engine",
        description="Add the runtime to an engine's configuration. The file is merged with, never replaced; what was "
        "there before is kept beside it, and the reload that the engine needs is named, not done.",
    )
    options(parser)
    parser.set_defaults(run=run)


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("engine", choices=_NAMES, metavar="|".join(_NAMES), help="which engine")
    parser.add_argument("--config", type=Path, metavar="FILE", help="its configuration, instead of the usual one")
    parser.add_argument("--runtime-name", default="clip", metavar="NAME", help="what the runtime is called (clip)")
    parser.add_argument(
        "--runtime-path", metavar="FILE", help="the file that the engine runs, instead of `config show`'s runtime_path"
    )
    parser.add_argument("--dry-run", action="store_true", help="only show what would change")
    parser.add_argument("--force", action="store_true", help="also where another runtime or containers are in the way")


def run(args: argparse.Namespace) -> int:
    from shim import settings
    from shim.errors import InstallError
    from shim.install.engines import ENGINES
    from shim.install.plan import Runtime
    from shim.runtime_path import ensure_launcher

    path = args.runtime_path or str(ensure_launcher(settings.load()))
    if not path.startswith("/"):
        raise InstallError(f"{path} is not an absolute path", hint="engines call runtimes without a PATH")
    engine = ENGINES[args.engine]
    config = args.config or engine.config
    plan = engine.install(config.absolute(), Runtime(args.runtime_name, path), force=args.force)
    if not os.access(path, os.X_OK):
        plan.notes.append(f"{path} is not there, or cannot be executed: some engines do not start with such a runtime")
    if not plan.changes:
        print(f"{engine.title}: already as it should be: {config}")
    perform(plan, dry_run=args.dry_run)
    if plan.changes and not args.dry_run and plan.reload:
        print(f"now:  {plan.reload}")
    if not args.dry_run:
        print(f"then: {plan.usage}")
    return 0


def perform(plan: Plan, *, dry_run: bool) -> None:
    """Show or do the changes of a plan."""
    for note in plan.notes:
        print(f"note: {note}", file=sys.stderr)
    for change in plan.changes:
        if dry_run:
            print(change.diff(), end="")
            continue
        backup = change.apply()
        what = "removed" if change.after is None else "changed" if change.before is not None else "written"
        print(f"{what} {change.path}" + (f" (before: {backup})" if backup else ""))


def shown(names: list[str]) -> str:
    """A few names."""
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more
