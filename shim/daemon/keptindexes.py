"""What the daemon keeps below STATE/indexes, as the cleaner sees it: indexes and archives that it fetched or made,
copies of what URLs gave, and what tags meant.

Each such index carries a note, in an extended attribute, of which one it is. What has none was put there by somebody,
and stays; so does everything on a file system without such attributes.
"""

from __future__ import annotations

import os
import stat
import time
from collections.abc import Container, Iterable, Iterator
from contextlib import suppress
from pathlib import Path

from shim.cache.clean import Item
from shim.daemon.indexfile import Head
from shim.errors import IndexFormatError
from shim.index import codec
from shim.mount import lease

URLS, TAGS = ".urls", ".tags"  # directories of copies of what URLs gave, and of the digests of image tags
MAKING = ".making"  # unfinished files, emptied at start
UNFINISHED = ".incoming-"  # begins the names of those that stand elsewhere
NOTE = "user.clip.index"
_STALE_SECONDS = 86400.0
_STAMP_SECONDS = 3600.0


def note_of(head: Head | None) -> tuple[str, bytes]:
    """The attribute of a kept file, name and value. None: it is no index of ours, but leads to one."""
    return NOTE, b"" if head is None else f"{head.hex} {head.digest} {head.image}".encode()


def stamp(path: Path) -> None:
    """Note that a file without a tree is used now, once an hour."""
    try:
        if time.time() - path.stat().st_mtime > _STAMP_SECONDS:
            os.utime(path)
    except OSError:
        pass  # it is gone, or nothing can be written there


class KeptIndexes:
    """Threads: any. Changes nothing but by `remove` and `sweep`."""

    def __init__(self, state_dir: Path) -> None:
        self._root = state_dir / "indexes"

    def items(self, trees: Iterable[Item], pins: Container[str]) -> list[Item]:
        """trees: those that are kept. An index is in use, and was used last, when its tree is and was: no start of a
        tree that is mounted reads it, but one after a reboot may."""
        by_hex = {tree.name: tree for tree in trees}
        items = []
        for path, info in self._files():
            name = str(path.relative_to(self._root))
            if path.parent == self._root / TAGS:
                items.append(Item("tag", name, 0, info.st_mtime))
                continue
            note = _note(path)
            if note is None:
                continue
            hex_, digest, image = (*note.split(" ", 2), "", "")[:3]
            tree = by_hex.get(hex_)
            items.append(
                Item(
                    "index",
                    name,
                    info.st_blocks * 512,
                    max(info.st_mtime, tree.last_used if tree is not None else 0.0),
                    in_use=tree is not None and tree.in_use,
                    pinned=f"sha256:{hex_}" in pins or digest in pins,
                    what=image,
                )
            )
        return items

    def remove(self, item: Item) -> bool:
        """Delete a file unless it was replaced, or somebody has it open: a start, or an archive that is read from."""
        path = self._root / item.name
        try:
            if not _is_ours(path):
                with suppress(OSError):
                    os.removexattr(path, NOTE)
                return False
            if lease.in_use(path) or path.stat().st_mtime > item.last_used:
                return False
            path.unlink()
        except FileNotFoundError:
            return False
        return True

    def touch(self, item: Item) -> None:
        """Have a file's time be now."""
        try:
            os.utime(self._root / item.name)
        except OSError:
            pass  # it is gone, or nothing can be written there

    def follow(self, item: Item) -> None:
        """An index was used when its tree was: it keeps that time when the tree goes."""
        path = self._root / item.name
        try:
            if item.last_used - path.stat().st_mtime > _STAMP_SECONDS:
                os.utime(path, (item.last_used, item.last_used))
        except OSError:
            pass  # as for `touch`

    def sweep(self) -> None:
        """Delete what was left unfinished by processes that were killed."""
        for path, info in self._files(unfinished=True):
            if time.time() - info.st_mtime > _STALE_SECONDS:
                with suppress(OSError):
                    path.unlink()

    def _files(self, *, unfinished: bool = False) -> Iterator[tuple[Path, os.stat_result]]:
        for where, directories, names in os.walk(self._root):
            if Path(where) == self._root and MAKING in directories:
                directories.remove(MAKING)
            for name in names:
                path = Path(where, name)
                is_unfinished = name.startswith("." if path.parent == self._root / TAGS else UNFINISHED)
                if is_unfinished != unfinished:
                    continue
                try:
                    info = path.lstat()
                except OSError:
                    continue  # gone meanwhile
                if stat.S_ISREG(info.st_mode):
                    yield path, info


def _is_ours(path: Path) -> bool:
    """Whether a file still is what its note says: who copies another over it keeps the note. Raises
    FileNotFoundError."""
    hex_ = (_note(path) or "").split(" ", 1)[0]
    if not hex_:
        return True  # no index of ours: nothing to compare with
    try:
        return codec.index_digest(codec.read_file(path)) == f"sha256:{hex_}"
    except FileNotFoundError:
        raise
    except (IndexFormatError, OSError):
        return False


def _note(path: Path) -> str | None:
    try:
        return os.getxattr(path, NOTE, follow_symlinks=False).decode("utf-8", "replace")
    except OSError:
        return None
