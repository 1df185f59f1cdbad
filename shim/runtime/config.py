"""The wrapper's settings: what `launcher.py` compiled, and the `CLIP_SHIM_*` variables over it.

The settings table itself (`shim/settings.py`) is too slow to import here.
"""

from __future__ import annotations

import os

from shim.errors import ConfigError, ShimError
from shim.runtime import jsontext
from shim.runtime.argv import style_of
from shim.runtime.fastpath import is_stale, read_settings

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

DEFAULT_RUNTIMES = ["/usr/sbin/runc", "/usr/bin/runc", "/usr/local/sbin/runc", "/usr/bin/crun"]
_UNITS = (("ms", 0.001), ("s", 1.0), ("m", 60.0), ("h", 3600.0), ("d", 86400.0))
_COMPILE_SECONDS = 20.0
_OUTPUT_MAX = 1 << 20


class Config:
    """run_dir, state_dir, trust_paths: absolute paths; sources: the places that may hold a reference ("annotation",
    "bundle", "marker", "env"); mount_deadline: seconds; daemon: command line that the words "daemon", "--supervise" are
    added to; environ: CLIP_SHIM_* for a daemon or hook started from here; hook: command line that runs the wrapper;
    kill_switches: files that switch references off while one of them exists; problem: what is wrong with the
    configuration, an error for containers with a reference."""

    __slots__ = (
        "daemon",
        "environ",
        "hook",
        "kill_switches",
        "mount_deadline",
        "problem",
        "run_dir",
        "runtimes",
        "sources",
        "state_dir",
        "trust_paths",
    )

    def __init__(self, compiled: dict[str, Any], environ: dict[bytes, bytes]) -> None:
        self.problem: ShimError | None = None
        self.run_dir: str = compiled["run_dir"]
        self.state_dir: str = compiled["state_dir"]
        self.runtimes: list[str] = list(compiled["runtimes"])
        self.sources: set[str] = {name for name, on in compiled["reference"].items() if on}
        self.trust_paths: list[str] = list(compiled["trust_paths"])
        self.mount_deadline: float = _number(compiled["mount_deadline"])
        self.daemon: list[str] = list(compiled["daemon_command"])
        self.hook: list[str] = [compiled["launcher"]]
        self.environ: dict[str, str] = {}
        config_file: str = compiled["config_file"]
        if compiled.get("config_stamp") is not None:
            self.environ["CLIP_SHIM_CONFIG"] = config_file
        self.kill_switches = [os.path.join(os.path.dirname(config_file), "disabled"), "/etc/clip-shim/disabled"]
        self._from_environ(environ)
        self.environ |= {"CLIP_SHIM_RUN_DIR": self.run_dir, "CLIP_SHIM_STATE_DIR": self.state_dir}

    @property
    def style(self) -> str:
        """The grammar of the runtime that will be executed: "runc" or "crun"."""
        for runtime in self.runtimes:
            if os.path.exists(runtime):
                return style_of(runtime)
        return "runc"

    def _from_environ(self, environ: dict[bytes, bytes]) -> None:
        for raw_name, raw_value in environ.items():
            if not raw_name.startswith(b"CLIP_SHIM_"):
                continue
            name = raw_name[10:].decode("ascii", "replace").lower()
            value = raw_value.decode("utf-8", "surrogateescape")
            try:
                self._set(name, value)
            except ValueError as error:
                what = raw_name.decode("ascii", "replace")
                self.problem = ConfigError(f"{what} is {value!r}, it must be {error}")

    def _set(self, name: str, value: str) -> None:
        if name in ("run_dir", "state_dir"):
            if not value.startswith("/"):
                raise ValueError("an absolute path")
            setattr(self, name, os.path.normpath(value))
        elif name == "runtimes":
            self.runtimes = [item for item in value.split(",") if item]
        elif name == "mount_deadline":
            self.mount_deadline = _seconds(value)
        elif name == "trust_paths":
            self.trust_paths = [item for item in value.split(":") if item]
            if not all(item.startswith("/") for item in self.trust_paths):
                raise ValueError("absolute paths with colons between")
        elif name.startswith("reference_") and name[10:] in ("annotation", "bundle", "marker", "env"):
            if _boolean(value):
                self.sources.add(name[10:])
            else:
                self.sources.discard(name[10:])


def load(settings_file: str, environ: dict[bytes, bytes]) -> Config:
    """The settings of this call, compiled anew if the configuration file was changed. Raises ConfigError when there are
    none at all; a configuration that cannot be compiled is the result's `problem`."""
    try:
        compiled = read_settings(settings_file)
        named = environ.get(b"CLIP_SHIM_CONFIG", b"").decode("utf-8", "surrogateescape")
        other = bool(named) and named != compiled["config_file"]
        problem = None
        if other or is_stale(compiled):
            try:
                compiled = _recompile(compiled, settings_file, named if other else compiled["config_file"])
            except ShimError as error:
                problem = error
        config = Config(compiled, environ)
    except (OSError, ValueError, StopIteration, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(
            f"{settings_file} cannot be read: {type(error).__name__}", hint="run `clip-shim install` again"
        ) from error
    config.problem = config.problem or problem
    return config


def _recompile(compiled: dict[str, Any], settings_file: str, config_file: str) -> dict[str, Any]:
    from shim.runtime.process import run

    command = [*compiled["compile_command"], settings_file, config_file]
    code, output, errors = run(command, {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin"}, _COMPILE_SECONDS, _OUTPUT_MAX)
    if code:
        text = " ".join(errors.decode("utf-8", "replace").split())
        raise ConfigError(text or f"the configuration {config_file} cannot be compiled (exit code {code})")
    fresh = jsontext.decode(output)
    if not isinstance(fresh, dict):
        raise ConfigError(f"the configuration {config_file} cannot be compiled")
    return fresh


def _number(value: Any) -> float:
    return float(value.text if isinstance(value, jsontext.Number) else value)


def _boolean(text: str) -> bool:
    text = text.strip().lower()
    if text in ("true", "yes", "on", "1"):
        return True
    if text in ("false", "no", "off", "0"):
        return False
    raise ValueError("true or false")


def _seconds(text: str) -> float:
    text = text.strip().lower()
    factor = 1.0
    for unit, size in _UNITS:
        if text.endswith(unit):
            text, factor = text[: -len(unit)].strip(), size
            break
    if not text.replace(".", "", 1).isdigit() or not text.isascii():
        raise ValueError("a duration such as 500ms, 60s or 5m")
    return float(text) * factor
