"""Texts that are made from the product's own tables; `make docs` writes those that are committed.

man_pages, completions: from the argparse parsers of `--help`; configuration and its reference: from the settings table.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from shim import __version__  # noqa: E402
from shim.cli.config import default_yaml  # noqa: E402
from shim.cli.main import build_parser  # noqa: E402
from shim.settings import SETTINGS  # noqa: E402


def config() -> str:
    """/etc/clip-shim/config.yaml: every setting with its default, commented out: new defaults reach old files."""
    lines = default_yaml().splitlines()
    out = ["# clip-shim. A setting that is commented out has the default that is shown. See clip-shim.yaml(5)."]
    for line in lines[1:]:
        is_value = re.match(r" *[a-z0-9_]+: ", line)
        out.append(re.sub(r"^( *)", r"\1#", line, count=1) if is_value else line)
    return "\n".join(out) + "\n"


def reference() -> str:
    """The configuration reference, in Markdown."""
    lines = [
        "# Configuration",
        "",
        "Every setting, from the one table that the program itself uses (`shim/settings.py`). Order: defaults, then",
        "`/etc/clip-shim/config.yaml`, then the environment, then flags. `clip-shim config show` says what holds and",
        "why, `clip-shim config check FILE` what is wrong with a file. The wrapper sees a changed file with the next",
        "container, the daemon when it is restarted. Made by `make docs`.",
        "",
        "| key | default | environment | what |",
        "|---|---|---|---|",
    ]
    for setting in SETTINGS:
        text = setting.help.replace("|", "\\|")
        lines.append(f"| `{setting.key}` | `{json.dumps(setting.default)}` | `{setting.env}` | {text} |")
    return "\n".join(lines) + "\n"


def completion(shell: str) -> str:
    import shtab

    text: str = shtab.complete(build_parser(), shell=shell)
    return text


def man_pages() -> dict[str, str]:
    """Name with section → troff."""
    return {"clip-shim.1": _commands(), "clip-shim.yaml.5": _settings()}


def _escape(text: str) -> str:
    text = text.replace("\\", "\\e").replace("-", "\\-").replace("…", "...").replace("·", "|").replace("→", "->")
    return re.sub(r"(?m)^([.'])", r"\\&\1", text)


def _head(name: str, section: int, what: str) -> list[str]:
    title = f'.TH {name.upper()} {section} "" "clip-shim {__version__}" "clip-shim"'
    return [title, ".SH NAME", f"{_escape(name)} \\- {_escape(what)}"]


def _usage(parser: argparse.ArgumentParser) -> str:
    return " ".join(parser.format_usage().removeprefix("usage: ").split())


def _commands() -> str:
    parser = build_parser()
    lines = _head("clip-shim", 1, "an OCI runtime over lazily loaded images")
    lines += [".SH SYNOPSIS", ".B clip\\-shim", "VERB [OPTION]...", ".br", ".B clip\\-shim", "RUNC'S COMMAND LINE"]
    lines += [".SH DESCRIPTION", _escape(parser.description or ""), ".PP", _escape(parser.epilog or "")]
    lines.append(".SH COMMANDS")
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for child in action.choices.values():
                lines += _verb(child)
    lines += [
        ".SH EXIT STATUS", "0 when it worked, 1 when it failed, 2 when it was called wrongly.",
        ".SH FILES", ".TP", ".I /etc/clip\\-shim/config.yaml", "The configuration, see",
        ".BR clip\\-shim.yaml (5).", ".TP", ".I /etc/clip\\-shim/disabled",
        "While it exists, containers with a reference fail with what it says, all others go straight to runc.", ".TP",
        ".I /var/lib/clip\\-shim", "Cache, indexes, and what containers wrote.", ".TP", ".I /run/clip\\-shim",
        "Sockets, mounts, and the state of running containers.",
        ".SH SEE ALSO", ".BR runc (8),", ".BR clip\\-shim.yaml (5)",
    ]  # fmt: skip
    return "\n".join(lines) + "\n"


def _verb(parser: argparse.ArgumentParser) -> list[str]:
    lines = [f".SS {_escape(_usage(parser).removeprefix('clip-shim '))}", _escape(parser.description or "")]
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            texts = {item.dest: item.help or "" for item in action._choices_actions}
            for name in action.choices:
                lines += [".TP", f".B {_escape(name)}", _escape(texts.get(name, ""))]
        elif not isinstance(action, argparse._HelpAction) and action.help and action.help != argparse.SUPPRESS:
            value = "" if action.nargs == 0 else f" {action.metavar or action.dest}"
            names = ", ".join(action.option_strings) + value if action.option_strings else value.strip()
            lines += [".TP", f".B {_escape(names)}", _escape(action.help.replace("%%", "%"))]
    return lines


def _settings() -> str:
    lines = _head("clip-shim.yaml", 5, "configuration of clip-shim")
    lines += [
        ".SH DESCRIPTION",
        "A YAML file, \\fI/etc/clip\\-shim/config.yaml\\fR. Dots in a key stand for nested tables. Variables of the "
        "environment override it. An unknown key is an error.",
        ".SH SETTINGS",
    ]
    for setting in SETTINGS:
        lines += [".TP", f".B {_escape(setting.key)}", _escape(setting.help) + ".", ".br"]
        lines.append(f"Default: {_escape(json.dumps(setting.default))}. Variable: {_escape(setting.env)}.")
    lines += [".SH SEE ALSO", ".BR clip\\-shim (1)"]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    texts = {"reference": reference, "config": config, "man": lambda: man_pages()["clip-shim.1"]}
    sys.stdout.write(texts[sys.argv[1]]())
