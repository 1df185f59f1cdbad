"""What the server needs of a blob file, and what it tells of a read that failed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from shim.errors import ShimError

Buffer = bytes | bytearray | memoryview
Done = Callable[[Buffer | ShimError], None]


class Blob(Protocol):
    """One file of the mount. Ranges given to it are non-empty, at most 1 MiB and inside [0, size)."""

    @property
    def node_id(self) -> int:
        """Stable for the life of the FUSE mount, also over a hand-over; never given to another name."""

    @property
    def name(self) -> bytes:
        """The file's name; no slash, no NUL, at most 255 bytes."""

    @property
    def size(self) -> int:
        """Bytes in the file; never changes."""

    @property
    def data_fd(self) -> int:
        """A descriptor that holds verified bytes at the blob's own offsets, where `stamp` says so."""

    @property
    def epoch(self) -> int:
        """Grows before bytes that could be read from `data_fd` are taken away."""

    def stamp(self, offset: int, size: int) -> int:
        """The epoch, if the whole range may be read from `data_fd` now; < 0: ask `read_cached`. Never blocks.

        When `epoch` is still the same after reading, what was read is right.
        """

    def read_cached(self, offset: int, size: int) -> Buffer | None:
        """The bytes if they are at hand in memory or on the local disk, verified; None = miss. No network."""

    def read_missing(self, offset: int, size: int, done: Done) -> None:
        """Get the bytes from wherever they are. Returns at once; `done` is called exactly once, from a pool thread."""

    def trouble(self) -> str:
        """What holds reads of this blob up: source host and last error; "" when nothing does."""


@dataclass(frozen=True, slots=True)
class ReadFailure:
    """A read that was answered with an error: what one log line says. `waited` in seconds."""

    blob: str
    offset: int
    size: int
    pid: int
    waited: float
    cause: str


@dataclass(frozen=True, slots=True)
class Waiting:
    """A read that waits for the registry, for `status --waiting`. `age` in seconds, `trouble` as `Blob.trouble`."""

    pid: int
    blob: str
    offset: int
    size: int
    age: float
    trouble: str
