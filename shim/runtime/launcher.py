"""Writes the file that engines run, and beside it the wrapper's compiled settings.

The launcher is `fastpath.py`'s text under a `#!` line with absolute paths: it needs no search path, no site-packages
and no YAML. The settings lie in `clip-shim-runtime.json` next to it, with the modification time and size of the
configuration file that they came from. A call that finds another stamp has them compiled again (`recompile`, in a
process that may import everything) and goes on with the result. If the configuration is wrong, other verbs and
containers without a reference go on with the old settings, and containers with one fail with what is wrong.

Not imported by the wrapper itself.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import shim.runtime.fastpath
from shim.errors import ConfigError
from shim.settings import BY_KEY, DEFAULT_CONFIG, SETTINGS, Settings, load

SETTINGS_NAME = "clip-shim-runtime.json"
_ELSEWHERE = "settings-at"  # a file beside the launcher: a package keeps out of /usr what changes
VERSION = 1
_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"  # for runtimes named without a directory
_NEEDED = (3, 11)
_SHEBANG_MAX = 127  # Linux fs/binfmt_script.c before 5.1: BINPRM_BUF_SIZE 128
# -I and -S: nothing of the environment or site-packages; utf8: words of any bytes survive whatever the locale
_FLAGS = "-ISXutf8"


def write_launcher(dest: Path, settings: Settings, daemon_command: list[str], *, config: Path | None = None) -> Path:
    """Write the launcher to `dest` (mode 0755) and its settings beside it, each atomically. Returns `dest`, absolute.

    daemon_command: how `clip-shim` is started on this machine, for instance ["/usr/bin/clip-shim"]; the wrapper adds
    "daemon --supervise". config: the configuration file that `settings` came from. Raises ConfigError, OSError.
    """
    dest = Path(os.path.abspath(dest))
    package = Path(shim.runtime.fastpath.__file__).resolve().parent.parent
    settings_file = settings_path(dest)
    if config is None:
        config = Path(os.environ.get("CLIP_SHIM_CONFIG", DEFAULT_CONFIG))
    text = launcher_text(_interpreter(), package, settings_file)
    compiled = compile_settings(settings, config, daemon_command, dest, package)
    _write(settings_file, json.dumps(compiled, indent=1) + "\n", 0o644)
    if not (os.access(dest, os.X_OK) and dest.read_text(encoding="utf-8", errors="replace") == text):
        _write(dest, text, 0o755)
    return dest


def launcher_text(interpreter: str, package: Path, settings_file: Path) -> str:
    """The launcher of an installation whose `shim` lies at `package`."""
    text = f"#!{interpreter} {_FLAGS}\n# Written by clip-shim: an OCI runtime in front of runc. Do not edit.\n"
    text += Path(shim.runtime.fastpath.__file__).read_text(encoding="utf-8")
    return text + f"\n\nsys.exit(launch({os.fspath(package)!r}, {os.fspath(settings_file)!r}))\n"


def settings_path(launcher: Path) -> Path:
    """Where a launcher's compiled settings lie: beside it, or where the file `settings-at` beside it says."""
    try:
        return Path((launcher.parent / _ELSEWHERE).read_text(encoding="utf-8").strip())
    except OSError:
        return launcher.parent / SETTINGS_NAME


def compile_settings(
    settings: Settings, config: Path, daemon_command: list[str], launcher: Path, package: Path
) -> dict[str, Any]:
    """What the wrapper needs to know, as JSON values; `shim/runtime/config.py` reads it.

    overrides: values that came from the environment or a flag, to be kept when the file is compiled again.
    """
    kept = {
        key: _plain(settings[key])
        for key, where in settings.source.items()
        if where == "flag" or (where == BY_KEY[key].env and where in {s.env for s in SETTINGS})
    }
    # with `python -m shim` from a checkout the package is not on the isolated interpreter's path
    code = (
        f"import sys; sys.path.append({os.fspath(package.parent)!r}); "
        f"from shim.runtime.launcher import recompile; recompile(sys.argv[1], sys.argv[2])"
    )
    return {
        "version": VERSION,
        "launcher": os.fspath(launcher),
        "package": os.fspath(package),
        "config_file": os.fspath(config.absolute()),
        "config_stamp": stamp(config),
        "overrides": kept,
        "compile_command": [sys.executable, "-I", "-c", code],
        "daemon_command": list(daemon_command),
        "run_dir": os.fspath(settings.run_dir),
        "state_dir": os.fspath(settings.state_dir),
        "runtimes": find_runtimes(settings["runtimes"], launcher),
        "mount_deadline": settings["mount_deadline"],
        "trust_paths": list(settings["trust.paths"]),
        "reference": {name: settings["reference." + name] for name in ("annotation", "bundle", "marker", "env")},
    }


def stamp(config: Path) -> list[int] | None:
    """[mtime in ns, size] of the configuration file, None if there is none."""
    try:
        status = config.stat()
    except OSError:
        return None
    return [status.st_mtime_ns, status.st_size]


def find_runtimes(names: tuple[str, ...] | list[str], launcher: Path) -> list[str]:
    """Absolute candidates in order. A name without a directory is looked up in the system's directories, not in PATH:
    podman and CRI-O call `delete` with none. The launcher itself is left out: it would start itself for ever."""
    found: list[str] = []
    for name in names:
        path = name if name.startswith("/") else shutil.which(name, path=_PATH)
        if path and path not in found and os.path.realpath(path) != os.path.realpath(launcher):
            found.append(path)
    return found


def recompile(settings_file: str, config_file: str) -> None:
    """Compile anew: print the settings as JSON, and write them to `settings_file` if they came from its own file.

    Runs in a process of its own (`compile_command`); exit code 2 and a line on stderr if the configuration is wrong.
    """
    try:
        old = json.loads(Path(settings_file).read_bytes())
        config = Path(config_file)
        before = stamp(config)
        settings = load(config if before else None, env={}, flags=old["overrides"])
        new = compile_settings(settings, config, old["daemon_command"], Path(old["launcher"]), Path(old["package"]))
    except (ConfigError, OSError, ValueError, KeyError, TypeError) as error:
        sys.stderr.write(f"{error}\n")
        sys.exit(2)
    new |= {"config_stamp": before, "overrides": old["overrides"]}
    text = json.dumps(new, indent=1) + "\n"
    if config_file == old["config_file"]:
        try:
            _write(Path(settings_file), text, 0o644)
        except OSError:
            pass  # a read-only /usr: right all the same, but compiled at every call
    sys.stdout.write(text)


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _interpreter() -> str:
    """The system's Python if it is new enough (it outlives virtual environments), else the one that runs this."""
    check = f"import sys; sys.exit(sys.version_info < {_NEEDED})"
    system = "/usr/bin/python3"
    own = os.path.realpath(sys.executable)
    if os.access(system, os.X_OK) and subprocess.run([system, "-IS", "-c", check], check=False).returncode == 0:
        return system
    if len(own) + len(_FLAGS) + 3 > _SHEBANG_MAX or " " in own:
        raise ConfigError(f"{own} cannot stand in a #! line", hint="install Python 3.11 or later as /usr/bin/python3")
    return own


def _write(path: Path, text: str, mode: int) -> None:
    """Replace a file in one step: it is read by every runtime call."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        with os.fdopen(fd, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fchmod(file.fileno(), mode)
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise
