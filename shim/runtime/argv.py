"""The only parser of runc-style command lines. Pure: it looks at words, never at the system.

Two grammars exist. runc's is urfave/cli v1 over Go's `flag` package: one dash or two, `--flag=value` or `--flag value`,
flags of a verb are also found behind its operands (runc@v1.0.0 … v1.4.0: main.go, create.go, run.go, restore.go;
urfave/cli@v1.22: command.go reorderArgs). crun's is GNU argp in order: `-bDIR`, unique abbreviations of long names, the
first operand ends the options (crun@1.8 … 1.25: src/crun.c, create.c, run.c, restore.c).

The words before the verb are read by `fastpath.find_verb`, which the launcher carries in its own text.
"""

from __future__ import annotations

from shim.runtime.fastpath import HANDLED, find_verb

_COMMON = {
    "bundle": True,
    "b": True,
    "console-socket": True,
    "pid-file": True,
    "no-pivot": False,
    "no-new-keyring": False,
    "no-subreaper": False,
    "preserve-fds": True,
    "pidfd-socket": True,  # runc 1.2
    "detach": False,
    "d": False,
    "keep": False,  # runc 1.1
    "help": False,
    "h": False,
}
_RESTORE = {
    "image-path": True,
    "work-path": True,
    "parent-path": True,
    "tcp-established": False,
    "ext-unix-sk": False,
    "shell-job": False,
    "file-locks": False,
    "manage-cgroups-mode": True,
    "empty-ns": True,
    "auto-dedup": False,
    "lazy-pages": False,
    "lsm-profile": True,
    "lsm-mount-context": True,
}
_CRUN = {"config": True, "f": True}

# flag name -> takes a value
FLAGS: dict[tuple[str, str], dict[str, bool]] = {
    ("runc", "create"): _COMMON,
    ("runc", "run"): _COMMON,
    ("runc", "restore"): _COMMON | _RESTORE,
    ("crun", "create"): _COMMON | _CRUN,
    ("crun", "run"): _COMMON | _CRUN,
    ("crun", "restore"): _COMMON | _RESTORE | _CRUN,
}


_ID_BYTES = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_+,-.")
_DEFAULT_ROOTS = {"runc": "/run/runc", "crun": "/run/crun"}


class Invocation:
    """What a command line asks for. `verb` is None when the line is none of ours to understand: forward it untouched.

    bundle: as written, "" for the current directory; config: name of the configuration file, relative to the bundle;
    log, log_format, root: as written, "" when not given; container: the ID as written, "" when there is none.
    """

    __slots__ = ("bundle", "config", "container", "log", "log_format", "root", "verb")

    def __init__(self) -> None:
        self.verb: str | None = None
        self.bundle = ""
        self.config = "config.json"
        self.container = ""
        self.log = ""
        self.log_format = ""
        self.root = ""


def is_valid_id(container: str) -> bool:
    """runc's rule (libcontainer/factory_linux.go: idRegex and validateID), and short enough for a file name."""
    return 0 < len(container) <= 255 and container not in (".", "..") and _ID_BYTES.issuperset(container)


def runtime_root(root: str, style: str) -> str:
    """The runtime's state directory: --root, or what it takes without."""
    return root or _DEFAULT_ROOTS[style]


def style_of(runtime: str) -> str:
    """The grammar of the low-level runtime at path `runtime`: "crun" or "runc"."""
    return "crun" if runtime.rsplit("/", 1)[-1].startswith("crun") else "runc"


def parse(args: list[str], style: str = "runc") -> Invocation:
    """Understand the words behind argv[0]. Never raises: what cannot be understood has `verb` None."""
    found = Invocation()
    given: dict[str, str] = {}
    at = find_verb(args, given)
    found.log, found.log_format, found.root = given.get("log", ""), given.get("log-format", ""), given.get("root", "")
    if at < 0 or args[at] not in HANDLED:
        return found
    verb, rest = args[at], args[at + 1 :]
    table = FLAGS[style, verb]
    values, operands, unknown = _parse_crun(rest, table) if style == "crun" else _parse_runc(rest, table)
    if "help" in values or "h" in values:
        return found
    found.verb = verb
    found.bundle = values.get("b", values.get("bundle", ""))
    found.config = values.get("f", values.get("config", "")) or "config.json"
    # a flag of a later runtime may have taken the first operand as its value, but the ID always comes last
    found.container = operands[-1] if operands and (unknown or len(operands) == 1) else ""
    return found


def _parse_runc(args: list[str], table: dict[str, bool]) -> tuple[dict[str, str], list[str], bool]:
    """Go's rules after urfave's reordering: (values by flag, operands, whether an unknown flag was met)."""
    flags, operands = _reorder(args)
    words = flags + operands
    values: dict[str, str] = {}
    unknown = False
    at = 0
    while at < len(words):
        word = words[at]
        if len(word) < 2 or word[0] != "-":
            break
        at += 1
        if word == "--":
            break
        name, equals, value = word[2 if word[1] == "-" else 1 :].partition("=")
        takes_value = table.get(name)
        if takes_value is None:
            unknown = True
            # whether it takes the next word is not known, and need not be: the ID is the last word
            while at < len(words) and (len(words[at]) < 2 or words[at][0] != "-"):
                at += 1
        elif takes_value and not equals:
            if at >= len(words):
                break
            value = words[at]
            at += 1
        if takes_value is not None:
            values["bundle" if name == "b" else name] = value
    rest = words[at:]
    if unknown and not rest:
        rest = [word for word in args if len(word) < 2 or word[0] != "-"][-1:]
    return values, rest, unknown


def _reorder(args: list[str]) -> tuple[list[str], list[str]]:
    """urfave/cli@v1.22 command.go reorderArgs: flags, and a word behind each that has no "=", move to the front."""
    flags: list[str] = []
    operands: list[str] = []
    may_be_value = False
    for at, word in enumerate(args):
        if word == "--":
            operands += args[at:]
            break
        if may_be_value and word[:1] != "-":
            may_be_value = False
            flags.append(word)
        elif len(word) > 1 and word[0] == "-":
            flags.append(word)
            may_be_value = "=" not in word
        else:
            operands.append(word)
    return flags, operands


def _parse_crun(args: list[str], table: dict[str, bool]) -> tuple[dict[str, str], list[str], bool]:
    """argp in order: (values by flag, operands, whether an unknown flag was met). An operand ends the options."""
    values: dict[str, str] = {}
    at = 0
    while at < len(args):
        word = args[at]
        if len(word) < 2 or word[0] != "-":
            break
        at += 1
        if word == "--":
            break
        if word[1] == "-":
            name, equals, value = word[2:].partition("=")
            long = [n for n in table if len(n) > 1 and (n == name or (name and n.startswith(name)))]
            name = name if name in table else (long[0] if len(long) == 1 else "")
            if not name:
                return values, args[-1:], True
            if table[name] and not equals:
                if at >= len(args):
                    break
                value = args[at]
                at += 1
            values[name] = value
            continue
        cluster = word[1:]
        while cluster:
            name, cluster = cluster[0], cluster[1:]
            if name == "?":
                values["help"] = ""
            elif name not in table:
                return values, args[-1:], True
            elif table[name]:
                if not cluster and at < len(args):
                    cluster = args[at]
                    at += 1
                values[name], cluster = cluster, ""
            else:
                values[name] = ""
    return values, args[at:], False
