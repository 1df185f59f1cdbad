"""What is mounted at a bundle's rootfs: the engine's overlay, ours of an earlier run, or none."""

from __future__ import annotations

import os

from shim.errors import BundleError, MountError
from shim.mount import mountinfo
from shim.mount.overlay import OURS, Layers, read_stock
from shim.runtime.reference import MARKER

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

STOCK, EARLIER, PLAIN = "stock", "earlier", "plain"


class Rootfs:
    """path: the root directory, links resolved; kind: STOCK (an engine's overlay is mounted there), EARLIER (ours is)
    or PLAIN (a directory, bind mount, or nothing at all); entry: its mountinfo entry, if it is a mount point."""

    __slots__ = ("_state", "data", "entry", "kind", "path")

    def __init__(self, path: str, state: Callable[[], dict[str, Any]]) -> None:
        """state: gives the content of the container's record, and is called if it is needed."""
        self.path = os.path.realpath(path).encode("utf-8", "surrogateescape")
        self.data = mountinfo.read_bytes()
        self.entry = mountinfo.at(self.path, self.data)
        self.kind = PLAIN
        if self.entry is not None and self.entry.fs_type == b"overlay" and self.entry.root == b"/":
            self.kind = EARLIER if self.entry.source.startswith(OURS) else STOCK
        self._state = state

    def layers(self) -> Layers:
        """The engine's own layers of a STOCK or EARLIER overlay. MountError if they cannot be told."""
        assert self.entry is not None
        return read_stock(self.entry) if self.kind == STOCK else self._earlier()

    def _earlier(self) -> Layers:
        """From the record that was made with the mount; from the mount itself when there is none."""
        assert self.entry is not None
        state = self._state()
        if state.get("kind") == "in-place" and state.get("rootfs") == os.fsdecode(self.path):
            return layers_from(state)
        shown = read_stock(self.entry)
        if len(shown.lowers) < 2 or any(path.startswith(b"/proc/") for path in shown.lowers):
            raise MountError(
                f"the overlay at {os.fsdecode(self.path)} is ours, but its record is gone",
                hint="unmount it, or stop the container and start it again",
            )
        shown.lowers.pop()  # the tree
        return shown

    def lowers(self) -> list[bytes]:
        """The directories in which a marker counts, topmost first: what the container itself could not write."""
        try:
            if self.kind != PLAIN:
                return self.layers().lowers
        except MountError:
            if os.path.lexists(self.path + MARKER.encode()):
                raise  # a thin image on an overlay that cannot be made again
            return []
        if self.entry is not None and b"ro" in self.entry.options.split(b","):
            return [self.path]  # a read-only snapshot of a single layer
        if (
            self.entry is not None
            and self.entry.fs_type.startswith(b"fuse")
            and os.path.lexists(self.path + MARKER.encode())
        ):
            self.refuse_unsupported()
        return []

    def refuse_unsupported(self) -> None:
        """Raise MountError for a rootfs that no overlay of ours can take the place of."""
        entry = self.entry
        if entry is None:
            return
        if entry.fs_type in (b"fuse.fuse-overlayfs", b"fuse"):
            raise MountError(
                f"the rootfs {os.fsdecode(self.path)} is a fuse-overlayfs mount, which is not supported",
                hint="use the engine's kernel overlay driver, as root",
            )
        if self.kind != PLAIN:
            number = b"%d" % entry.id
            if any(line.split(b" ", 2)[1:2] == [number] for line in self.data.split(b"\n")):
                raise MountError(f"something is mounted below the rootfs {os.fsdecode(self.path)}: it would be lost")


def layers_from(state: dict[str, object]) -> Layers:
    """The engine's layers out of a record. BundleError if it makes no sense."""
    try:
        lowers = [str(path).encode("utf-8", "surrogateescape") for path in state["lowers"]]  # type: ignore[attr-defined]
        upper, work = (str(state[key]).encode("utf-8", "surrogateescape") for key in ("upper", "work"))
        options = [
            (str(name), None if value is None else str(value).encode("utf-8", "surrogateescape"))
            for name, value in state["options"]  # type: ignore[attr-defined]
        ]
        return Layers(lowers, upper, work, options, int(state["attributes"]))  # type: ignore[call-overload]
    except (KeyError, TypeError, ValueError) as error:
        raise BundleError(f"the container's record is damaged: {error!r}") from error


def layers_to(layers: Layers) -> dict[str, object]:
    """A record's part that `layers_from` reads."""
    return {
        "lowers": [_text(path) for path in layers.lowers],
        "upper": _text(layers.upper),
        "work": _text(layers.work),
        "options": [[name, None if value is None else _text(value)] for name, value in layers.options],
        "attributes": layers.attributes,
    }


def _text(path: bytes) -> str:
    return path.decode("utf-8", "surrogateescape")
