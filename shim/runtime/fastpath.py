"""What every call pays for: find the verb, and exec the low-level runtime at once unless the verb needs a rootfs.

`launcher.py` copies this file's text into the launcher, so it imports next to nothing: a bare `python3 -IS` has `posix`
and `_signal` in memory already, `os` would cost two milliseconds and `signal` six.
"""

from __future__ import annotations

import gc
import posix
import sys
from _signal import SIG_DFL, SIGPIPE, SIGXFSZ, signal  # type: ignore[import-not-found]  # not in typeshed

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

# Flags before the verb, without dashes, that take a value or none: runc 1.0 to 1.4 and crun (--criu left runc in 1.4)
GLOBAL_VALUES = frozenset(("log", "log-format", "log-level", "root", "criu", "rootless", "cgroup-manager"))
GLOBAL_SWITCHES = frozenset(("debug", "systemd-cgroup"))
HANDLED = frozenset(("create", "run", "restore"))  # the verbs that need the root filesystem
POSTSTOP = "clip-poststop"  # our own: a hook in config.json calls it, no runtime has it
# what Python puts into the environment where no locale is set (PEP 538)
COERCED = (b"C.UTF-8", b"C.utf8", b"UTF-8")


def find_verb(words: list[str], values: dict[str, str]) -> int:
    """Position of the verb in a runtime's command line, -1 if there is none or a flag before it is unknown.

    Fills `values` with what those flags say. Go's flag package: one dash or two, "=" or the next word, "--" ends them.
    """
    at = 0
    while at < len(words):
        word = words[at]
        if len(word) < 2 or word[0] != "-":
            return at
        at += 1
        if word == "--":
            return at if at < len(words) else -1
        name, equals, value = word[2 if word[1] == "-" else 1 :].partition("=")
        if name in GLOBAL_VALUES:
            if not equals:
                if at >= len(words):
                    return -1
                value = words[at]
                at += 1
            values[name] = value
        elif name not in GLOBAL_SWITCHES:
            return -1
    return -1


def original_environ() -> dict[bytes, bytes]:
    """The environment as we got it, without what Python added."""
    environ = dict(posix.environ)
    if environ.get(b"LC_CTYPE") in COERCED:
        # the kernel still shows the environment that we were started with
        before = b""
        try:
            fd = posix.open("/proc/self/environ", posix.O_RDONLY | posix.O_CLOEXEC)
            while part := posix.read(fd, 1 << 20):
                before += part
            posix.close(fd)
        except OSError:
            return environ
        given = [item[9:] for item in before.split(b"\0") if item[:9] == b"LC_CTYPE="]
        if not given:
            del environ[b"LC_CTYPE"]
        else:
            environ[b"LC_CTYPE"] = given[0]
    return environ


def execute(runtimes: list[str], words: list[str], environ: dict[bytes, bytes]) -> str:
    """Become the first runtime that can be executed; returns only when none can: a text that says why."""
    # Python ignores both, and what is ignored stays so over execve(2)
    signal(SIGPIPE, SIG_DFL)
    signal(SIGXFSZ, SIG_DFL)
    tried = []
    for runtime in runtimes:
        try:
            posix.execve(runtime, [runtime, *words], environ)
        except OSError as error:
            tried.append(f"{runtime} (errno {error.errno})")
    return "no low-level runtime can be executed: tried " + (", ".join(tried) or "none")


class Scanner:
    """What _json.make_scanner wants to know: plain values, as `json` makes them without being told anything."""

    strict = True
    object_hook = object_pairs_hook = None
    parse_float, parse_int, parse_constant = float, int, float

    def __init__(self) -> None:
        self.memo: dict[str, str] = {}


def read_settings(path: str) -> dict[str, Any]:
    """The wrapper's compiled settings. OSError, ValueError or StopIteration when they cannot be read."""
    from _json import make_scanner

    fd = posix.open(path, posix.O_RDONLY | posix.O_CLOEXEC)
    try:
        text = posix.read(fd, 1 << 20)
    finally:
        posix.close(fd)
    try:
        settings = make_scanner(Scanner())(text.decode(), 0)[0]  # type: ignore[arg-type]  # duck-typed in C
    except SystemError:  # what the scanner makes of its error while json.decoder is not imported (Python 3.11)
        raise ValueError("not JSON") from None
    if not isinstance(settings, dict) or settings.get("version") != 1:
        raise ValueError("not this version's settings")
    return settings


def is_stale(settings: dict[str, Any]) -> bool:
    """Whether the configuration file is not the one these settings were compiled from."""
    try:
        status = posix.stat(settings["config_file"])
        return bool(settings["config_stamp"] != [status.st_mtime_ns, status.st_size])
    except FileNotFoundError:
        return settings["config_stamp"] is not None
    except OSError:
        return False


def launch(package: str, settings_file: str) -> int:
    """The launcher's whole work. `package` is the directory of `shim`; returns an exit code only on failure."""
    words = sys.argv[1:]
    verb = find_verb(words, {})
    if verb < 0 or (words[verb] not in HANDLED and words[verb] != POSTSTOP):
        environ = original_environ()
        try:
            settings = read_settings(settings_file)
            if b"CLIP_SHIM_RUNTIMES" not in environ and not is_stale(settings):
                execute(settings["runtimes"], words, environ)
        except (OSError, ValueError, StopIteration, KeyError):
            pass  # the slow way finds out what is wrong and says it
    # packages that are found at this place and nowhere else: no search path, nothing to shadow
    for name in ("shim", "shim.runtime", "shim.mount"):
        module = sys.modules[name] = type(sys)(name)
        module.__path__ = [package + name[4:].replace(".", "/")]
    sys.modules["shim.runtime.fastpath"] = sys.modules["__main__"]  # this very text
    gc.disable()  # what lives for milliseconds needs none
    from shim.runtime.main import run

    return run(words, original_environ(), settings_file)
