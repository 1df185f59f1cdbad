"""A container's root before it is mounted: its layers' directories, looked through as an overlay would show them.

Names are resolved step by step with lstat, and links inside the root only, so nothing outside of it is looked at.
Documentation/filesystems/overlayfs.rst: whiteouts are character devices 0:0, opaque directories have an xattr.
"""

from __future__ import annotations

import os
import stat
import struct
from dataclasses import dataclass

from shim.runtime.reference import is_opaque

_LINKS_MAX = 40  # fs/namei.c: MAXSYMLINKS
_HEAD = 4096
_INTERPRETER_MAX = 4096
_PT_INTERP = 3  # elf(5)


@dataclass(frozen=True, slots=True)
class Place:
    """What a name leads to. file: its path in a layer; target: of a symlink."""

    file: str
    mode: int
    target: str = ""


class RootView:
    """layers: directories, topmost first."""

    def __init__(self, layers: list[str]) -> None:
        self._layers = layers

    def find(self, path: str, *, follow: bool = True) -> Place | None:
        """What is at an absolute path of the root; None if nothing is. follow: also a link at its end."""
        todo = [name for name in path.split("/") if name not in ("", ".")][::-1]
        done: list[str] = []
        links = 0
        place = self._at([])
        while todo:
            name = todo.pop()
            if name == "..":
                done = done[:-1]
                continue
            place = self._at([*done, name])
            if place is None:
                return None
            if stat.S_ISLNK(place.mode) and (todo or follow):
                links += 1
                if links > _LINKS_MAX or not place.target:
                    return None
                if place.target.startswith("/"):
                    done = []
                todo += [part for part in place.target.split("/") if part not in ("", ".")][::-1]
                continue
            if todo and not stat.S_ISDIR(place.mode):
                return None
            done.append(name)
        return self._at(done) if follow else place

    def _at(self, names: list[str]) -> Place | None:
        """The topmost layer's entry at a path without links. A layer that has something else on the way, or an opaque
        directory, hides those below."""
        for layer in self._layers:
            here = layer
            opaque = False
            for number, name in enumerate(names):
                here = f"{here}/{name}"
                try:
                    info = os.lstat(here)
                except FileNotFoundError:
                    break
                if stat.S_ISCHR(info.st_mode) and info.st_rdev == 0:
                    return None
                if number < len(names) - 1:
                    if not stat.S_ISDIR(info.st_mode):
                        return None
                    opaque = opaque or is_opaque(here)
            else:
                info = os.lstat(here)
                target = os.readlink(here) if stat.S_ISLNK(info.st_mode) else ""
                return Place(here, info.st_mode, target)
            if opaque:
                return None
        return None

    def interpreter(self, path: str) -> str | None:
        """The program that the file at `path` is run by: of a "#!" line, or an ELF's PT_INTERP. OSError."""
        place = self.find(path)
        if place is None:
            return None
        fd = os.open(place.file, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            head = os.pread(fd, _HEAD, 0)
            if head.startswith(b"#!"):
                words = head[2:].split(b"\n", 1)[0].split()
                return os.fsdecode(words[0]) if words else None
            return _elf_interpreter(fd, head)
        finally:
            os.close(fd)


def _elf_interpreter(fd: int, head: bytes) -> str | None:
    if len(head) < 64 or head[:4] != b"\x7fELF" or head[4] not in (1, 2) or head[5] not in (1, 2):
        return None
    order = "<" if head[5] == 1 else ">"
    wide = head[4] == 2
    offset = struct.unpack_from(order + ("Q" if wide else "I"), head, 32 if wide else 28)[0]
    size, count = struct.unpack_from(order + "HH", head, 54 if wide else 42)
    if size < (56 if wide else 32) or count > 512:
        return None
    table = os.pread(fd, size * count, offset)
    for at in range(0, len(table) - size + 1, size):
        if struct.unpack_from(order + "I", table, at)[0] == _PT_INTERP:
            form, start = ("Q16xQ", at + 8) if wide else ("I8xI", at + 4)  # p_offset, p_filesz
            where, length = struct.unpack_from(order + form, table, start)
            if length > _INTERPRETER_MAX:
                return None
            return os.fsdecode(os.pread(fd, length, where).split(b"\0")[0])
    return None
