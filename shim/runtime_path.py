"""Where the file is that engines run, and how it starts `clip-shim`."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from shim.errors import ConfigError
from shim.settings import Settings


def runtime_path() -> Path:
    """`<prefix>/libexec/clip-shim/clip-shim-runtime` of the installation that runs now."""
    return Path(sys.prefix) / "libexec" / "clip-shim" / "clip-shim-runtime"


def daemon_command() -> list[str]:
    """How this installation's `clip-shim` is started; `-m` works in a checkout too."""
    return [sys.executable, "-m", "shim"]


def ensure_launcher(settings: Settings) -> Path:
    """Write the launcher and its compiled settings if they are absent or not this version's; returns its path.

    Raises ConfigError when it is absent and cannot be written.
    """
    from shim.runtime.launcher import write_launcher

    path = runtime_path()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        return write_launcher(path, settings, daemon_command())
    except OSError as error:
        if os.access(path, os.X_OK):
            return path  # installed by a package, and we are not root
        raise ConfigError(f"cannot write {path}: {error.strerror}", hint="run this as root once") from error
