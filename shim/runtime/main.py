"""The wrapper behind the launcher's fast path, and `clip-shim <runc's command line>`."""

from __future__ import annotations

import posix

from shim.runtime.fastpath import execute, read_settings


def run(words: list[str], environ: dict[bytes, bytes], settings_file: str) -> int:
    """Do what `words` (a runtime's command line without argv[0]) asks for. Returns an exit code only on failure."""
    settings = read_settings(settings_file)
    problem = execute(settings["runtimes"], words, environ)
    posix.write(2, f"clip-shim: {problem}\n".encode())
    return 1
