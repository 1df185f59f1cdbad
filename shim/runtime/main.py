"""The wrapper behind the launcher's fast path, and `clip-shim <runc's command line>`.

Most creates end here: no reference, so the runtime is executed. Only one with a reference imports `create.py`.
"""

from __future__ import annotations

import os
import sys

from shim.errors import BundleError, ConfigError, MountError, ShimError
from shim.runtime.argv import Invocation, is_valid_id, parse, runtime_root
from shim.runtime.bundle import Bundle
from shim.runtime.config import DEFAULT_RUNTIMES, Config, load
from shim.runtime.fastpath import POSTSTOP, execute, original_environ
from shim.runtime.reference import ANNOTATION, BUNDLE_FILE, SOURCE_ANNOTATION, find
from shim.runtime.rootfs import Rootfs

TYPE_CHECKING = False
if TYPE_CHECKING:
    from shim.runtime.create import Creation
    from shim.runtime.records import Record

_REASON_MAX = 200


def run(words: list[str], environ: dict[bytes, bytes], settings_file: str) -> int:
    """Do what `words` (a runtime's command line without argv[0]) asks for. Returns an exit code only on failure."""
    try:
        config = load(settings_file, environ)
    except ConfigError as error:
        return _run_without(words, environ, error)
    return run_with(words, environ, config)


def _run_without(words: list[str], environ: dict[bytes, bytes], error: ConfigError) -> int:
    """There are no settings, for this reason."""
    if parse(words).verb is None and words[:1] != [POSTSTOP]:
        execute(DEFAULT_RUNTIMES, words, environ)  # kill and delete must work whatever is wrong with us
    return _fail(error, parse(words))


def main(args: list[str]) -> int:
    """`clip-shim ARGS`, from the command line: as `run`, with the settings read from their source."""
    from pathlib import Path

    from shim.runtime.launcher import compile_settings
    from shim.settings import DEFAULT_CONFIG
    from shim.settings import load as load_settings

    environ = original_environ()
    file = Path(os.environ.get("CLIP_SHIM_CONFIG", DEFAULT_CONFIG))
    package = Path(__file__).resolve().parent.parent
    command = [sys.executable, "-m", "shim"]
    try:
        compiled = compile_settings(load_settings(), file, command, Path(os.path.realpath(sys.argv[0])), package)
        config = Config(compiled, environ)
    except ConfigError as error:
        return _run_without(args, environ, error)
    config.hook = [os.path.realpath(sys.executable) if sys.prefix == sys.base_prefix else sys.executable, "-m", "shim"]
    return run_with(args, environ, config)


def run_with(words: list[str], environ: dict[bytes, bytes], config: Config) -> int:
    """As `run`, with given settings. The outermost place of the wrapper: every error ends here."""
    if words[:1] == [POSTSTOP]:
        from shim.runtime.cleanup import poststop

        return poststop(words[1:], config)
    invocation = parse(words, config.style)
    creation = None
    try:
        if invocation.verb is not None:
            creation = prepare(invocation, config, environ)
        problem: ShimError = ConfigError(
            execute(config.runtimes, words, environ), hint="install runc, or set `runtimes` to where it is"
        )
    except ShimError as error:
        problem = error
    except Exception as error:  # noqa: BLE001  # the engine must get one line whatever happened
        problem = ShimError(f"unexpected {type(error).__name__}: {error}")
    if creation is not None:
        creation.undo()
    return _fail(problem, invocation)


def _fail(error: ShimError, invocation: Invocation) -> int:
    from shim.runtime.report import report

    report(error, invocation)
    return 1


def prepare(invocation: Invocation, config: Config, environ: dict[bytes, bytes]) -> Creation | None:
    """Make the container's root ready if its bundle has a reference. Raises ShimError with everything undone.

    What the runtime refuses anyway (no ID, a live one, no bundle) is left to it, and so is every bundle of no concern.
    """
    if not is_valid_id(invocation.container):
        return None
    root = os.path.abspath(runtime_root(invocation.root, config.style))
    if os.path.lexists(os.path.join(root, invocation.container)):
        return None
    try:
        bundle = Bundle(invocation.bundle, invocation.config)
    except (OSError, BundleError):
        return None
    places = _Places(bundle, config, root, invocation.container)
    try:
        put_back(bundle, config)
        reference = find(bundle, config, lambda: places.rootfs.lowers())  # noqa: PLW0108  # looked at when needed
    except BundleError:
        if ANNOTATION.encode() in bundle.data or os.path.lexists(os.path.join(bundle.directory, BUNDLE_FILE)):
            raise
        return None
    if reference is None:
        return None
    _refuse_if_disabled(config)
    from shim.runtime.create import Creation

    creation = Creation(config, bundle, places.rootfs, places.record)
    if not creation.run(reference, root, invocation.container, environ):
        return None
    return creation


class _Places:
    """The container's rootfs and our record of it, looked at when they are needed."""

    def __init__(self, bundle: Bundle, config: Config, root: str, container: str) -> None:
        self._arguments = (config, root, container)
        self._bundle = bundle
        self._rootfs: Rootfs | None = None
        self._record: Record | None = None

    @property
    def rootfs(self) -> Rootfs:
        if self._rootfs is None:
            self._rootfs = Rootfs(self._bundle.rootfs, lambda: self.record.state)
        return self._rootfs

    @property
    def record(self) -> Record:
        if self._record is None:
            from shim.runtime.records import Record

            self._record = Record(*self._arguments)
            self._record.load()
        return self._record


def put_back(bundle: Bundle, config: Config) -> None:
    """Undo what an earlier run did to config.json and no poststop hook undid: it lost power, or was killed.

    The annotation is believed only when root.path leads into our own directory: engines write that, never a user.
    """
    ours = os.path.join(config.run_dir, "containers") + "/"
    if ours.encode() not in bundle.data or not bundle.rootfs.startswith(ours):
        return
    source = bundle.annotations.pop(SOURCE_ANNOTATION, None)
    if not isinstance(source, str):
        raise BundleError(f"{bundle.path}: `root.path` leads into {ours}, which is not a rootfs to start from")
    bundle.section("root")["path"] = source
    bundle.drop_poststop(POSTSTOP)
    bundle.data = bundle.write()


def _refuse_if_disabled(config: Config) -> None:
    for path in config.kill_switches:
        if os.path.lexists(path):
            reason = ""
            try:
                with open(path, "rb") as file:
                    reason = " ".join(file.read(_REASON_MAX).decode("utf-8", "replace").split())
            except OSError:
                pass
            raise MountError(
                f"lazily loaded containers are switched off on this node: {path} exists"
                + (f" ({reason})" if reason else ""),
                hint="remove that file to switch them on again",
            )
    if config.problem is not None:
        raise config.problem
