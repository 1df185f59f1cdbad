"""`clip-shim uninstall ENGINE`."""

from __future__ import annotations

import argparse
import sys

from shim.cli import install


def add_parser(sub: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = sub.add_parser(
        "uninstall",
        help="undo `install`",
        description="Take the runtime out of an engine's configuration. Refused while containers need it.",
    )
    install.options(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from shim import settings
    from shim.errors import InstallError
    from shim.install.engines import ENGINES, users
    from shim.install.plan import Runtime
    from shim.runtime_path import runtime_path

    engine = ENGINES[args.engine]
    config = (args.config or engine.config).absolute()
    runtime = Runtime(args.runtime_name, args.runtime_path or str(runtime_path()))
    plan = engine.uninstall(config, runtime, force=args.force)
    if not plan.changes:
        print(f"{engine.title}: nothing of ours: {config}")
        return 0
    names = users(engine, config, runtime, settings.load().run_dir)
    if names and not args.force and not args.dry_run:
        raise InstallError(
            f"{len(names)} containers of {engine.title} need the runtime {args.runtime_name}: {install.shown(names)}",
            hint="remove them first; with --force they can be neither started nor stopped as usual any more",
        )
    if names:
        print(f"note: containers still need the runtime: {install.shown(names)}", file=sys.stderr)
    install.perform(plan, dry_run=args.dry_run)
    if not args.dry_run and plan.reload:
        print(f"now:  {plan.reload}")
    return 0
