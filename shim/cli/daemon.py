"""`clip-shim daemon`."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from shim.errors import ConfigError


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
    from shim import settings

    try:
        loaded = settings.load(args.config)
    except ConfigError as error:
        _refuse(error)
        raise
    arguments = ["--config", str(args.config.absolute())] if args.config else []
    if "CLIP_SHIM_CONFIG" in os.environ:
        os.environ["CLIP_SHIM_CONFIG"] = os.path.abspath(os.environ["CLIP_SHIM_CONFIG"])
    # A daemon keeps no directory busy; and what it starts (`python -m …`) would import from the current one first.
    os.chdir("/")
    if args.supervise:
        from shim.daemon.supervise import supervise

        return supervise(arguments, loaded.run_dir)
    from shim.daemon.server import serve

    code = serve(loaded)
    sys.stderr.flush()
    # Not the usual way out, which waits for jobs: one may be in a read that only our successor answers.
    os._exit(code)


def _refuse(error: ConfigError) -> None:
    """Whoever started us hears why there is no daemon; so do those that wait at the socket which systemd has for us:
    nobody else would answer them before their deadline."""
    from shim.daemon import notify
    from shim.daemon.control import refuse

    notify.failed(str(error))
    for listener in notify.inherited().get("control", [])[:1]:
        refuse(listener, error)
