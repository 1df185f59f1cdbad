"""/proc/self/mountinfo, parsed as bytes (proc_pid_mountinfo(5), Linux fs/proc_namespace.c: show_mountinfo).

Standard library only, and neither `re` nor `typing`: the wrapper reads this file at every container start.
"""

from __future__ import annotations

import os

TYPE_CHECKING = False  # not typing's: importing typing costs milliseconds
if TYPE_CHECKING:
    from collections.abc import Sequence

# SELinux's options are the only ones printed with quotes, commas inside (security/selinux/hooks.c: show_sb_opts)
_QUOTED = (b"context", b"fscontext", b"defcontext", b"rootcontext", b"seclabel")
_READ = 1 << 20


class MountEntry:
    """One mount. Names are decoded from the file's octal escapes, option strings are as printed (see split_options).

    id, parent: mount ids, unique among living mounts; dev: b"major:minor" of the superblock; root: the path inside the
    filesystem that is mounted (not b"/" for a bind of a subdirectory); options: of this mount; fields: the optional
    ones (b"shared:1" …); source: b"" if none; super_options: of the filesystem.
    """

    __slots__ = (
        "dev",
        "fields",
        "fs_type",
        "id",
        "mount_point",
        "options",
        "parent",
        "root",
        "source",
        "super_options",
    )

    def __init__(self, line: bytes) -> None:
        """Parse one line. ValueError if it is none."""
        words = line.split(b" ")  # a single space each: an empty source leaves an empty word
        dash = words.index(b"-", 6)
        self.id = int(words[0])
        self.parent = int(words[1])
        self.dev = words[2]
        self.root = unescape(words[3])
        self.mount_point = unescape(words[4])
        self.options = words[5]
        self.fields = tuple(words[6:dash])
        if len(words) < dash + 4:
            raise ValueError("a mountinfo line with too few words")
        self.fs_type = unescape(words[dash + 1])
        self.source = unescape(words[dash + 2])
        self.super_options = b" ".join(words[dash + 3 :])

    def __repr__(self) -> str:
        return f"MountEntry({self.id}, {self.mount_point!r}, {self.fs_type!r}, {self.source!r})"


def unescape(text: bytes) -> bytes:
    """Undo the kernel's octal escapes: a backslash and three octal digits (fs/seq_file.c: mangle_path, seq_escape)."""
    parts = text.split(b"\\")
    if len(parts) == 1:
        return text
    out = [parts[0]]
    for part in parts[1:]:
        digits = part[:3]
        if len(digits) == 3 and not digits.strip(b"01234567") and digits[0] <= 0x33:
            out.append(bytes((int(digits, 8),)) + part[3:])
        else:
            out.append(b"\\" + part)
    return b"".join(out)


def read_bytes(path: str = "/proc/self/mountinfo") -> bytes:
    """The whole file. OSError if there is none."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        parts = []
        while part := os.read(fd, _READ):
            parts.append(part)
        return b"".join(parts)
    finally:
        os.close(fd)


def parse(data: bytes) -> list[MountEntry]:
    """All mounts, in the file's order. ValueError on a line that is none."""
    return [MountEntry(line) for line in data.split(b"\n") if line]


def read() -> list[MountEntry]:
    """All mounts of this process' namespace that are below its root."""
    return parse(read_bytes())


def at(path: str | bytes, data: bytes | None = None) -> MountEntry | None:
    """The mount that one reaches at `path` (absolute, no symlinks in it), None if it is no mount point.

    data: the file's content if it was read already. Of several mounts on one path the topmost is taken: not simply the
    last line, since Linux sorts by mount id from 6.8 on, and a detached mount is older than its attachment.
    """
    where = os.path.normpath(os.fsencode(path))
    data = read_bytes() if data is None else data
    # find the lines by their text, parse only those; escaped as the kernel does, `#` by some versions only
    needle = where.replace(b"\\", b"\\134").replace(b" ", b"\\040").replace(b"\t", b"\\011").replace(b"\n", b"\\012")
    needles = {b" " + needle + b" ", b" " + needle.replace(b"#", b"\\043") + b" "}
    found = []
    for line in data.split(b"\n"):
        if any(text in line for text in needles):
            entry = MountEntry(line)
            if entry.mount_point == where:
                found.append(entry)
    if len(found) > 1:
        covered = {entry.parent for entry in found}
        found = [entry for entry in found if entry.id not in covered] or found
    if len(found) > 1:  # the rest lie under a mount further up
        entries = parse(data)
        found = [entry for entry in found if _visible(entry, entries)] or found
    return found[-1] if found else None


def _visible(entry: MountEntry, entries: Sequence[MountEntry]) -> bool:
    """Whether no other mount covers the way to `entry`: one on the same parent, at a directory above."""
    by_id = {other.id: other for other in entries}
    seen: set[int] = set()
    here: MountEntry | None = entry
    while here is not None and here.id not in seen:
        seen.add(here.id)
        for other in entries:
            if other.parent == here.parent and other.id != here.id and _above(other.mount_point, here.mount_point):
                return False
        here = by_id.get(here.parent)
    return True


def _above(upper: bytes, lower: bytes) -> bool:
    return lower != upper and lower.startswith(upper if upper.endswith(b"/") else upper + b"/")


def _raw_options(text: bytes) -> list[bytes]:
    """Split at commas, except inside the quotes of SELinux's options. Commas in other values are printed as \\054."""
    parts: list[bytes] = []
    rest = text
    while rest:
        comma = rest.find(b",")
        end = len(rest) if comma < 0 else comma
        equals = rest.find(b'="', 0, end)
        if equals >= 0 and rest[:equals] in _QUOTED:
            close = rest.find(b'"', equals + 2)
            if close >= 0:
                comma = rest.find(b",", close)
                end = len(rest) if comma < 0 else comma
        parts.append(rest[:end])
        rest = rest[end + 1 :]
    return parts


def _unquote(key: bytes, value: bytes) -> bytes:
    return value[1:-1] if key in _QUOTED and len(value) > 1 and value[:1] == value[-1:] == b'"' else value


def split_options(super_options: bytes) -> list[tuple[bytes, bytes | None]]:
    """(key, value) in order, None for an option without "="; decoded, without SELinux's quotes. Keys may come again
    ("lowerdir+"). A value still has overlay's own backslashes: for the lower directories use split_lowerdirs."""
    result: list[tuple[bytes, bytes | None]] = []
    for part in _raw_options(super_options):
        key, equals, value = part.partition(b"=")
        result.append((unescape(key), unescape(_unquote(key, value)) if equals else None))
    return result


def split_lowerdirs(super_options: bytes) -> list[bytes]:
    """An overlay's lower directories, topmost first, as they were given (perhaps relative; data-only ones too).

    Takes the *printed* options: "lowerdir=a:b" with `\\:`, `\\\\` and `\\,` escaped by the mounter, a colon that the
    kernel itself printed as \\072 (6.6), or one "lowerdir+=" each (6.8), where nothing is escaped.
    """
    lowers: list[bytes] = []
    for part in _raw_options(super_options):
        key, _, value = part.partition(b"=")
        if key in (b"lowerdir+", b"datadir+"):
            lowers.append(unescape(value))
        elif key == b"lowerdir":
            lowers.extend(_split_colons(value))
    return lowers


def unescape_path(value: bytes) -> bytes:
    """Undo overlay's own escapes in upperdir and workdir values (`\\:`, `\\,`, `\\\\`)."""
    out = bytearray()
    skip = False
    for byte in value:
        if byte == 0x5C and not skip:
            skip = True
            continue
        out.append(byte)
        skip = False
    return bytes(out) + (b"\\" if skip else b"")


def _split_colons(value: bytes) -> list[bytes]:
    """Split a printed "lowerdir=" value (fs/overlayfs/params.c: ovl_parse_param_split_lowerdirs)."""
    if b"\\" not in value:
        return [item for item in value.split(b":") if item]
    items: list[bytes] = []
    pending: list[bytes] = []
    for piece in value.split(b":"):
        pending.append(piece)
        text = unescape(piece)
        if (len(text) - len(text.rstrip(b"\\"))) % 2:  # an odd backslash before the colon: it belongs to the name
            continue
        items.append(unescape_path(b":".join(unescape(part) for part in pending)))
        pending = []
    if pending:
        items.append(unescape_path(b":".join(unescape(part) for part in pending)))
    return [item for item in items if item]
