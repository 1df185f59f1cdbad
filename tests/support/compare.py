"""Whether two trees are the same in all that POSIX can see.

    python -m tests.support.compare EXPECTED ACTUAL [--unset PATH]… [--no-content]

Exit code 1, and the first differences, if not.

Compared: paths, types, all mode bits, owner, mtime to the nanosecond, xattrs (file capabilities too), size, link count,
which names share an inode, device numbers, symlink targets, SHA-256 of contents. Not compared:
- link count and size of directories: every file system counts them in its own way (ext4 whole blocks);
- atime, ctime, inode numbers, allocated blocks: nothing in an image says them;
- xattrs `trusted.overlay.*` and `security.selinux`: written by the host, not by the image.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import stat
import sys
from collections.abc import Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

_HOST_XATTRS = ("trusted.overlay.", "user.overlay.", "security.selinux")
SHOWN = 20


@dataclass(frozen=True)
class Difference:
    """`path` is relative to the roots, b"" for the root itself."""

    path: bytes
    what: str
    expected: object
    actual: object

    def __str__(self) -> str:
        name = os.fsdecode(self.path).encode("unicode_escape", "surrogateescape").decode(errors="replace")
        return f"/{name}: {self.what}: expected {self.expected!r}, found {self.actual!r}"


@dataclass(frozen=True)
class _Seen:
    facts: dict[str, object]
    inode: tuple[int, int]
    is_file: bool


def _walk(root: bytes) -> Iterator[tuple[bytes, os.stat_result]]:
    stack = [b""]
    while stack:
        path = stack.pop()
        found = os.lstat(os.path.join(root, path) if path else root)
        yield path, found
        if stat.S_ISDIR(found.st_mode):
            stack.extend(os.path.join(path, name) for name in os.listdir(os.path.join(root, path)))


def _xattrs(path: bytes) -> dict[str, bytes]:
    names = os.listxattr(path, follow_symlinks=False)
    return {n: os.getxattr(path, n, follow_symlinks=False) for n in sorted(names) if not n.startswith(_HOST_XATTRS)}


def _look(root: bytes, path: bytes, found: os.stat_result) -> _Seen:
    full = os.path.join(root, path) if path else root
    mode = found.st_mode
    facts: dict[str, object] = {
        "type": stat.filemode(mode)[0],
        "mode": oct(stat.S_IMODE(mode)),
        "owner": (found.st_uid, found.st_gid),
        "mtime": found.st_mtime_ns,
        "xattrs": _xattrs(full),
    }
    if not stat.S_ISDIR(mode):
        facts["links"] = found.st_nlink
        facts["size"] = found.st_size
    if stat.S_ISCHR(mode) or stat.S_ISBLK(mode):
        facts["device"] = (os.major(found.st_rdev), os.minor(found.st_rdev))
    if stat.S_ISLNK(mode):
        facts["target"] = os.readlink(full)
    return _Seen(facts, (found.st_dev, found.st_ino), stat.S_ISREG(mode))


def _survey(root: bytes) -> dict[bytes, _Seen]:
    return {path: _look(root, path, found) for path, found in _walk(root)}


def _hash(path: bytes) -> str:
    sha = hashlib.sha256()
    with open(path, "rb", buffering=0) as file:
        while piece := file.read(1 << 20):
            sha.update(piece)
    return sha.hexdigest()


def _groups(seen: dict[bytes, _Seen], paths: Collection[bytes]) -> dict[bytes, tuple[bytes, ...]]:
    """Each path that is not a directory → all of `paths` that are the same inode."""
    by_inode: dict[tuple[int, int], list[bytes]] = {}
    for path in sorted(paths):
        if seen[path].facts["type"] != "d":
            by_inode.setdefault(seen[path].inode, []).append(path)
    return {path: tuple(names) for names in by_inode.values() for path in names}


def compare(
    expected: str | Path, actual: str | Path, *, unset: Collection[bytes] = (), content: bool = True
) -> list[Difference]:
    """Every difference between two trees, sorted by path.

    unset: paths (relative, b"" the root) of directories that no layer names: their mtime is whenever they were made.
    """
    roots = os.fsencode(expected), os.fsencode(actual)
    left, right = _survey(roots[0]), _survey(roots[1])
    out = [Difference(path, "missing", left[path].facts["type"], None) for path in left.keys() - right.keys()]
    out += [Difference(path, "unexpected", None, right[path].facts["type"]) for path in right.keys() - left.keys()]
    both = left.keys() & right.keys()
    for path in both:
        one, two = left[path].facts, right[path].facts
        for what in [*one, *(two.keys() - one.keys())]:
            if one.get(what) == two.get(what) or (what == "mtime" and path in unset):
                continue
            out.append(Difference(path, what, one.get(what), two.get(what)))
            if what == "type":
                break
    groups = _groups(left, both), _groups(right, both)
    for path in groups[0].keys() & groups[1].keys():
        if groups[0][path] != groups[1][path]:
            out.append(Difference(path, "same inode as", groups[0][path], groups[1][path]))
    if content:
        out += _contents(roots, [p for p in both if left[p].is_file and right[p].is_file], groups[0])
    return sorted(out, key=lambda d: (d.path, d.what))


def _contents(
    roots: tuple[bytes, bytes], files: list[bytes], groups: dict[bytes, tuple[bytes, ...]]
) -> list[Difference]:
    """Hashes, one per inode; two threads, because hashing and reading release the interpreter."""
    firsts = sorted(path for path in files if groups[path][0] == path or groups[path][0] not in files)
    with ThreadPoolExecutor(2) as pool:
        left = pool.map(lambda path: _hash(os.path.join(roots[0], path)), firsts)
        right = pool.map(lambda path: _hash(os.path.join(roots[1], path)), firsts)
        return [
            Difference(path, "content", one, two)
            for path, one, two in zip(firsts, left, right, strict=True)
            if one != two
        ]


def report(differences: list[Difference], shown: int = SHOWN) -> str:
    """The first differences, a line each, and how many more there are."""
    lines = [str(difference) for difference in differences[:shown]]
    if len(differences) > shown:
        lines.append(f"… and {len(differences) - shown} more")
    return "\n".join(lines)


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description="compare two trees in all that POSIX can see")
    parser.add_argument("expected")
    parser.add_argument("actual")
    parser.add_argument("--unset", action="append", default=[], help="a directory whose mtime nothing sets")
    parser.add_argument("--no-content", action="store_true")
    args = parser.parse_args(argv)
    found = compare(
        args.expected, args.actual, unset=[os.fsencode(path) for path in args.unset], content=not args.no_content
    )
    print(report(found) if found else "the trees are equal")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
