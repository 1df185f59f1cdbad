"""`clip-shim daemon`."""

from __future__ import annotations

import argparse
from pathlib import Path


def add_parser(sub: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = sub.add_parser(
        "daemon",
        help="serve lazily loaded trees",
        description="Serve lazily loaded trees. The wrapper starts a daemon by itself when none runs.",
    )
    parser.add_argument("--supervise", action="store_true", help="stay as a small parent that restarts the server")
    parser.add_argument(
        "--config", type=Path, metavar="FILE", help="configuration instead of /etc/clip-shim/config.yaml"
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    arguments = ["--config", str(args.config)] if args.config else []
    from shim import settings

    loaded = settings.load(args.config)
    if args.supervise:
        from shim.daemon.supervise import supervise

        return supervise(arguments, loaded.run_dir)
    from shim.daemon.server import serve

    return serve(loaded)
