"""The command line: one table of verbs. What is no verb of ours is runc's, and goes to the wrapper as it is."""

from __future__ import annotations

import argparse
import atexit
import errno
import gc
import importlib
import os
import sys
from typing import NoReturn

from shim import __version__
from shim.errors import ShimError, UsageError

# verb -> (module, line of help); the module has add_parser(sub) and is imported only for its own verb
VERBS: dict[str, tuple[str, str]] = {
    "index": ("shim.cli.index", "make an index of an image, straight from its registry"),
    "build": ("shim.cli.build", "index an image and store it; an archive if it cannot be indexed"),
    "inspect": ("shim.cli.inspect", "say what an index file holds"),
    "push": ("shim.cli.push", "store an index or archive: directory, S3, registry"),
    "pull": ("shim.cli.pull", "fetch an index or archive from a store"),
    "verify": ("shim.cli.verify", "check an index file against the registry, an archive against its data"),
    "convert": ("shim.cli.convert", "push a thin image: an index that any engine can run"),
    "profile": ("shim.cli.profile", "put into an index what its containers read when they start"),
    "archive": ("shim.cli.archive", "make an archive, all data in one file, of an image or a directory"),
    "extract": ("shim.cli.extract", "unpack an archive into a directory"),
    "mount": ("shim.cli.mount", "mount an image's tree on a directory"),
    "umount": ("shim.cli.umount", "undo `mount`"),
    "daemon": ("shim.cli.daemon", "serve lazily loaded trees"),
    "drain": ("shim.cli.drain", "complete what is in use; say who depends on the registry"),
    "status": ("shim.cli.status", "show images, containers and layers in use"),
    "report": ("shim.cli.report", "show what a container's start read, and when"),
    "doctor": ("shim.cli.doctor", "say what is wrong with this node, and the mend"),
    "cache": ("shim.cli.cache", "list, check and clean the layer cache"),
    "install": ("shim.cli.install", "make the runtime known to an engine"),
    "uninstall": ("shim.cli.uninstall", "undo `install`"),
    "config": ("shim.cli.config", "show or check the configuration"),
}


# runc(8), crun(1); what is on neither list is handed on too, unless it is nearly a verb of ours
_RUNTIMES_VERBS = (
    "checkpoint", "create", "delete", "events", "exec", "features", "help", "init", "kill", "list", "mounts",
    "pause", "ps", "restore", "resume", "run", "spec", "start", "state", "update", "version",
)  # fmt: skip
_HINTS = {
    errno.ENOENT: "check the name, and that its directory is there",
    errno.ENOTDIR: "check the name: a file stands where a directory is meant",
    errno.EISDIR: "name a file, not a directory",
    errno.EACCES: "run this as root, or give another file",
    errno.EPERM: "run this as root, or give another file",
    errno.ENOSPC: "free space there, or give another place",
    errno.EROFS: "give a place that can be written to",
}


class _Parser(argparse.ArgumentParser):
    """argparse whose errors look like all our others: one line and a hint, exit code 2."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(message, hint=f"see `{self.prog} --help`")


class _Help(argparse.HelpFormatter):
    """Room for the verbs' own indentation, which argparse forgets: the longest would get a line of its own."""

    def add_argument(self, action: argparse.Action) -> None:
        super().add_argument(action)
        self._action_max_length = max(self._action_max_length, 4 + max(map(len, VERBS)))


def build_parser(only: str | None = None) -> argparse.ArgumentParser:
    """The parser of all verbs, or (faster to make) of verb `only`."""
    parser = _Parser(
        prog="clip-shim",
        formatter_class=_Help,
        description="Start any OCI image in about a second: an OCI runtime over lazily loaded trees.",
        epilog="`clip-shim version` says which this is. Anything else is runc's command line and is handed to the "
        "runtime as it is.",
    )
    parser.add_argument("--debug", action="store_true", help="show a traceback when something fails")
    sub = parser.add_subparsers(metavar="VERB", required=True, parser_class=_Parser)
    for verb, (module, _) in VERBS.items():
        if only is None or verb == only:
            importlib.import_module(module).add_parser(sub)
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run one command; returns its exit code: 0, 1 failed, 2 usage."""
    args = sys.argv[1:] if argv is None else argv
    words = [word for word in args if word != "--debug"] if args[:1] == ["--debug"] else args
    verb = words[0] if words else "--help"
    near = _meant(verb)
    if verb not in VERBS and verb not in ("-h", "--help", "help", "version") and near is None:
        from shim.runtime.main import main as runtime_main

        return runtime_main(args)
    atexit.register(gc.freeze)  # an end that looks for no cycles in all that was imported: 20 ms
    debug = "--debug" in args
    words = [word for word in args if word != "--debug"]
    try:
        if near is not None:
            raise UsageError(f"there is no verb {verb!r}", hint=f"did you mean `clip-shim {near}`?")
        if verb not in VERBS:
            print(version()) if verb == "version" else build_parser().print_help()
            return 0
        namespace = build_parser(verb).parse_args(words)
        code = int(namespace.run(namespace))
        sys.stdout.flush()  # a full disk or a closed pipe is noticed here, not at exit
        return code
    except ShimError as error:
        return report(error, debug)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # `clip-shim … | head`: the reader has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        where = f"{error.filename}: " if isinstance(error.filename, str) else ""  # else a descriptor's number
        return report(ShimError(f"{where}{error.strerror or error}", hint=_HINTS.get(error.errno or 0)), debug)
    except Exception as error:  # noqa: BLE001  a defect: people get one line too, and the way to the rest
        hint = "this is a defect in clip-shim: the same with --debug shows where"
        return report(ShimError(f"{type(error).__name__}: {error}", hint=hint), debug, error)


def _meant(verb: str) -> str | None:
    """The verb of ours that somebody has mistyped, None for what is one, or may be the runtime's."""
    if verb in VERBS or verb in _RUNTIMES_VERBS or verb.startswith("-"):
        return None
    import difflib

    return next(iter(difflib.get_close_matches(verb, VERBS, n=1, cutoff=0.75)), None)


def report(error: ShimError, debug: bool, cause: BaseException | None = None) -> int:
    """Print an error as people see all of ours, and give its exit code. cause: what the traceback is of, if another."""
    if debug:
        import traceback

        traceback.print_exception(cause or error)
    print(f"error: {error}", file=sys.stderr)
    if error.hint:
        print(f"hint: {error.hint}", file=sys.stderr)
    return error.exit_code


def version() -> str:
    return f"clip-shim version {__version__}"
