"""What an index says, as plain Python values: the image, its layers, their restart points and the merged tree.

Pure data: no I/O, no dependency beyond the standard library. `shim/index/codec.py` turns it into bytes and back,
`shim/index/build.py` makes it from a registry, `shim/erofs/` and `shim/tree/` show it to the kernel.
"""

from __future__ import annotations

import enum
import stat
from array import array
from bisect import bisect_right
from collections.abc import Iterator, MutableSequence
from dataclasses import dataclass, field
from hashlib import sha256
from typing import NamedTuple, Protocol

WINDOW_SIZE = 32768  # RFC 1951: a deflate distance reaches at most 32 KiB back
BLOCK = 512  # POSIX ustar block; also the EROFS block size


class Compression(enum.IntEnum):
    NONE = 0
    GZIP = 1
    ZSTD = 2


class Restart(enum.IntEnum):
    """How reading can begin at a span's first byte."""

    CONTINUE = 0  # it cannot: read on from an earlier span
    STREAM = 1  # a gzip member, zstd frame or plain byte starts exactly at the compressed offset
    DEFLATE = 2  # inside a gzip member, at a deflate block: needs the bit offset and the window


class Extent(NamedTuple):
    """`length` bytes at `logical` in the file lie at `offset` of layer `layer`'s uncompressed tar. Gaps are holes."""

    logical: int
    layer: int
    offset: int
    length: int


@dataclass(slots=True)
class Node:
    """One inode. Hard links are one Node under several names. Directories have `children`, others None.

    mode: st_mode with the type bits; mtime: ns since the epoch (may be negative); rdev: (major, minor) for devices;
    target: symlink target; extents: file data, sorted by `logical`, disjoint; size: st_size (files; symlinks
    len(target)). nlink is derived (`Tree.count_links`) and 1 until then.
    """

    mode: int
    uid: int = 0
    gid: int = 0
    mtime: int = 0
    size: int = 0
    rdev: tuple[int, int] = (0, 0)
    target: bytes = b""
    xattrs: tuple[tuple[bytes, bytes], ...] = ()
    extents: tuple[Extent, ...] = ()
    children: dict[bytes, Node] | None = None
    nlink: int = 1

    @property
    def is_dir(self) -> bool:
        return stat.S_ISDIR(self.mode)

    @property
    def is_file(self) -> bool:
        return stat.S_ISREG(self.mode)

    @property
    def is_symlink(self) -> bool:
        return stat.S_ISLNK(self.mode)


@dataclass(slots=True)
class Tree:
    """The merged tree of an image, whiteouts applied. `root` is a directory Node."""

    root: Node

    def walk(self) -> Iterator[tuple[bytes, Node]]:
        """(path, node) in preorder, names sorted by byte, root first as b"/". No recursion, any depth."""
        stack: list[tuple[bytes, Node]] = [(b"/", self.root)]
        while stack:
            path, node = stack.pop()
            yield path, node
            if node.children:
                base = path if path == b"/" else path + b"/"
                stack.extend((base + name, child) for name, child in sorted(node.children.items(), reverse=True))

    def count_links(self) -> None:
        """Set every node's nlink as a POSIX file system would show it (directories: 2 + subdirectories)."""
        counts: dict[int, int] = {}
        for _, node in self.walk():
            counts[id(node)] = counts.get(id(node), 0) + 1
        for _, node in self.walk():
            if node.children is not None:
                node.nlink = 2 + sum(1 for child in node.children.values() if child.children is not None)
            else:
                node.nlink = counts[id(node)]


class Spans(Protocol):
    """What reading a layer needs of its spans. `SpanTable` holds them in memory, `spanfile.SpanFile` maps a file.

    0 <= i < count, except that `ustart` and `cstart` take i == count too (the layer's sizes). Nothing here blocks on
    more than the local disk, and all of it may be called from any thread.
    """

    @property
    def count(self) -> int:
        """Spans in the layer; 0 for an empty layer."""

    def ustart(self, i: int) -> int:
        """The uncompressed offset at which span i begins."""

    def cstart(self, i: int) -> int:
        """The compressed offset at which reading of span i begins (see `SpanTable`)."""

    def bit(self, i: int) -> int:
        """For a DEFLATE point, how many upper bits of byte `cstart(i)` are the span's first ones; otherwise 0."""

    def kind(self, i: int) -> int:
        """A `Restart` value."""

    def digest(self, i: int) -> bytes:
        """SHA-256 (32 bytes) of the span's uncompressed bytes."""

    def window(self, i: int) -> bytes:
        """b"" or the WINDOW_SIZE bytes before the point, those that nothing refers to being zero."""

    def find(self, offset: int) -> int:
        """The span that holds uncompressed `offset` (0 <= offset < size)."""

    def restart(self, i: int) -> int:
        """The nearest span <= i at which reading can begin."""

    def run_end(self, i: int) -> int:
        """One past the last span that is read from the same restart point as span i."""

    def table_digest(self) -> bytes:
        """SHA-256 over (count, ustarts, digests): two tables with it agree on every byte of the layer."""


@dataclass(slots=True)
class SpanTable:
    """A layer's spans: consecutive pieces of its uncompressed bytes, each with a SHA-256, some of them restart points.

    Span i covers uncompressed [ustarts[i], ustarts[i+1]); ustarts has count+1 items, the last is the layer's size, the
    first 0. cstarts[i] is the compressed offset at which reading of span i begins: for DEFLATE the offset of the first
    byte not fully consumed before the point (so when bits[i] > 0 the *upper* `bits[i]` bits of byte cstarts[i] are
    the first ones of the span: the byte has already given its 8 - bits[i] low bits); for CONTINUE it is informative
    (<= where its bytes begin). cstarts has count+1 items, the last is the compressed size. windows[i] is b"" or the
    sparse 32 KiB window (WINDOW_SIZE bytes, unreferenced bytes zero). An empty layer (0 bytes) has count == 0.
    """

    ustarts: array[int] = field(default_factory=lambda: array("Q", [0]))
    cstarts: array[int] = field(default_factory=lambda: array("Q", [0]))
    bits: bytearray = field(default_factory=bytearray)
    kinds: bytearray = field(default_factory=bytearray)
    digests: bytearray = field(default_factory=bytearray)  # 32 bytes a span
    windows: MutableSequence[bytes] = field(default_factory=list)  # the scanner gives one that keeps them packed

    @property
    def count(self) -> int:
        return len(self.kinds)

    def ustart(self, i: int) -> int:
        return self.ustarts[i]

    def cstart(self, i: int) -> int:
        return self.cstarts[i]

    def bit(self, i: int) -> int:
        return self.bits[i]

    def kind(self, i: int) -> int:
        return self.kinds[i]

    def digest(self, i: int) -> bytes:
        return bytes(self.digests[32 * i : 32 * i + 32])

    def window(self, i: int) -> bytes:
        return self.windows[i]

    def find(self, offset: int) -> int:
        """The span that holds uncompressed `offset` (0 <= offset < size)."""
        return bisect_right(self.ustarts, offset) - 1

    def restart(self, i: int) -> int:
        """The nearest span <= i at which reading can begin."""
        while self.kinds[i] == Restart.CONTINUE:
            i -= 1
        return i

    def run_end(self, i: int) -> int:
        """One past the last span that is read from the same restart point as span i."""
        i += 1
        while i < self.count and self.kinds[i] == Restart.CONTINUE:
            i += 1
        return i

    def table_digest(self) -> bytes:
        """SHA-256 over (count, ustarts, digests), little-endian: tables that share it agree on every byte."""
        ustarts = array("Q", self.ustarts)
        return sha256(len(self.kinds).to_bytes(8, "little") + ustarts.tobytes() + bytes(self.digests)).digest()


@dataclass(slots=True)
class Layer:
    """One layer of the image, lowest first. Digests are "sha256:<64 hex>"."""

    digest: str  # of the compressed blob, as the manifest names it
    diff_id: str  # of the uncompressed tar, as the image config names it
    size: int  # compressed bytes
    uncompressed_size: int
    media_type: str
    compression: Compression
    spans: SpanTable


@dataclass(slots=True)
class Archive:
    """Where the bytes of an index's only layer lie, if in no registry: in the file whose end the index is (location
    ""), or in an object ("s3://BUCKET/KEY").

    pieces: (offset in the layer, offset in the archive, length), both ascending and disjoint; what is in no piece is
    zeros.
    """

    location: str
    pieces: list[tuple[int, int, int]]


@dataclass(slots=True)
class Index:
    """A whole index. `image` is the canonical reference it was made from, without digest (registry/repository:tag);
    `digest` the manifest digest of the chosen platform; `config` the raw image config, byte for byte."""

    image: str
    digest: str
    platform: str  # os/arch[/variant]
    config: bytes
    layers: list[Layer]
    tree: Tree
    checkpoint_mib: int = 2
    profile: tuple[tuple[int, int], ...] = ()
    """The start profile: (layer, span) of what a container's start read, in the order of the first reads."""
    archive: Archive | None = None
