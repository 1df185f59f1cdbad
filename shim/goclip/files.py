"""Go clip's files, read: v1 archives (data inside), v1 pointers (data in S3) and v2 indexes (data in a registry).

    0   9   89 43 4C 49 50 0D 0A 1A 0A ("\\x89CLIP\\r\\n\\x1a\\n")
    9   1   version, 1 in all of them
    10  32  four int64, little-endian: index length, index position, storage info length, storage info position
    42  12  storage type, NUL-padded: empty (v1 archive), "s3", "oci"

The index is the gob of []*ClipNode, one for each path; storage info is the gob of {Type, Data}, Data a gob again. An
archive's data are blocks: a type byte (0), a file's bytes, and their CRC-64/GO-ISO, big-endian. Go ignores what lies
between and behind them.
"""

from __future__ import annotations

import stat
import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

from shim.errors import IndexFormatError
from shim.goclip import gob

MAGIC = b"\x89CLIP\r\n\x1a\n"
VERSION = 1
HEADER = struct.Struct("<9sBqqqq12s")
MAX_NODES = 2_000_000
MAX_STORAGE = 64 << 20

_LACKS = (
    "restart points: a read inflates its layer from the start",
    "mode bits above 0777 (setuid, setgid, sticky)",
    "extended attributes, file capabilities and ACLs",
    "device nodes, fifos and sockets",
    "hard links: each name is a file of its own",
    "directories that no layer names, with their owners",
    "SHA-256 of the pieces that are read: bytes cannot be checked one by one",
)

ReadAt = Callable[[int, int], bytes]
"""read(offset, length): exactly these bytes of the file, or an error."""


class GoNode(NamedTuple):
    """One path of a Go clip index. kind: "dir", "file" or "symlink"; mode: lower 12 bits; mtime: ns since the epoch;
    data: where an archive has a file's bytes; layer and offset: where a registry has them ("" for none)."""

    kind: str
    path: bytes
    mode: int
    uid: int
    gid: int
    mtime: int
    size: int
    target: bytes
    content_hash: str
    data: int
    layer: str
    offset: int


@dataclass(frozen=True, slots=True)
class S3Place:
    """Where a v1 pointer says that its archive lies. `endpoint`: "" for Amazon's."""

    bucket: str
    key: str
    region: str
    endpoint: str
    path_style: bool


@dataclass(frozen=True, slots=True)
class OciPlace:
    """The image of a v2 index. `reference`: tag or digest; digest: of its manifest; platform: os/arch[/variant]."""

    registry: str
    repository: str
    reference: str
    name: str
    digest: str
    platform: str
    layers: tuple[str, ...]
    layer_bytes: int


@dataclass(frozen=True, slots=True)
class GoClip:
    """A Go clip file. `place`: None for an archive with its data inside."""

    nodes: list[GoNode]
    place: S3Place | OciPlace | None
    data_end: int  # an archive's blocks lie before this offset

    @property
    def kind(self) -> str:
        if self.place is None:
            return "clip v1 archive"
        return "clip v1 pointer to S3" if isinstance(self.place, S3Place) else "clip v2 index"


def is_go(head: bytes) -> bool:
    """Whether a file that begins so is Go clip's."""
    return head[: len(MAGIC)] == MAGIC


@dataclass(frozen=True, slots=True)
class Header:
    """Offsets and lengths in bytes; checked against the file's size."""

    index_length: int
    index: int
    storage_length: int
    storage: int
    kind: str


def read_header(read: ReadAt, size: int) -> Header:
    """Raises IndexFormatError: no Go clip file, of another version, or one whose parts lie outside of it."""
    if size < HEADER.size:
        raise IndexFormatError("this is no Go clip file: it is shorter than its header")
    magic, version, index_length, index, storage_length, storage, raw = HEADER.unpack(read(0, HEADER.size))
    if magic != MAGIC:
        raise IndexFormatError("this is no Go clip file")
    if version != VERSION:
        raise IndexFormatError(f"the Go clip file has version {version}, this clip-shim reads {VERSION}")
    for start, length, limit in ((index, index_length, gob.MAX_BYTES), (storage, storage_length, MAX_STORAGE)):
        if not (0 <= length <= limit and 0 <= start <= size - length):
            raise IndexFormatError("the Go clip file is cut short, or its header is damaged")
    if index < HEADER.size or not index_length:
        raise IndexFormatError("the Go clip file has no index")
    kind = raw.rstrip(b"\0").decode("ascii", "replace")
    return Header(index_length, index, storage_length, storage, kind)


def read(read_at: ReadAt, size: int, *, nodes: bool = True) -> GoClip:
    """A Go clip file of `size` bytes. nodes: False leaves its nodes out. Raises IndexFormatError."""
    header = read_header(read_at, size)
    place = _storage(gob.decode(read_at(header.storage, header.storage_length))) if header.storage_length else None
    found: list[GoNode] = []
    if nodes:
        raw = gob.decode(read_at(header.index, header.index_length))
        if not isinstance(raw, list) or len(raw) > MAX_NODES:
            raise IndexFormatError("the Go clip file's index is no list of nodes, or too long")
        found = [_node(item) for item in raw]
    return GoClip(found, place, header.index)


_KINDS = {b"dir": "dir", b"file": "file", b"symlink": "symlink"}


def _node(raw: Any) -> GoNode:
    try:
        attr = raw.get("Attr", {})
        owner = attr.get("Owner", {})
        remote = raw.get("Remote", {})
        kind = _KINDS.get(raw.get("NodeType"))
        path = raw.get("Path", b"")
        size = attr.get("Size", 0)
        length = remote.get("ULength", 0) if remote else raw.get("DataLen", size)
        if kind is None or not path.startswith(b"/"):
            raise IndexFormatError("the Go clip file has a node without a type or a path")
        return GoNode(
            kind,
            path,
            attr.get("Mode", 0) & 0o7777,
            owner.get("Uid", 0),
            owner.get("Gid", 0),
            _signed(attr.get("Mtime", 0)) * 1_000_000_000 + attr.get("Mtimensec", 0),
            length if kind == "file" else size,
            raw.get("Target", b""),
            raw.get("ContentHash", b"").decode("ascii", "replace"),
            raw.get("DataPos", 0),
            remote.get("LayerDigest", b"").decode("ascii", "replace"),
            remote.get("UOffset", 0),
        )
    except (AttributeError, TypeError) as error:
        raise IndexFormatError("the Go clip file has a node of another shape") from error


def _signed(value: int) -> int:
    """Seconds before 1970, which Go casts to uint64."""
    return value - (1 << 64) if value >= 1 << 63 else value


def _storage(raw: Any) -> S3Place | OciPlace:
    try:
        kind, body = raw.get("Type", b""), gob.decode(raw.get("Data", b""))
        if kind == b"s3":
            return S3Place(
                _text(body, "Bucket"),
                _text(body, "Key"),
                _text(body, "Region"),
                _text(body, "Endpoint"),
                bool(body.get("ForcePathStyle", False)),
            )
        if kind == b"oci":
            return _oci(body)
    except (AttributeError, TypeError) as error:
        raise IndexFormatError("the Go clip file's storage info has another shape") from error
    raise IndexFormatError(f"the Go clip file keeps its data in {kind!r}, which this clip-shim does not know")


def _oci(body: Any) -> OciPlace:
    image = body.get("ImageMetadata", {})
    platform = "/".join(_text(image, key) for key in ("Os", "Architecture", "Variant") if image.get(key))
    reference = _text(body, "Reference")
    return OciPlace(
        _text(body, "RegistryURL"),
        _text(body, "Repository"),
        reference,
        _text(image, "Name"),
        _text(image, "Digest") or (reference if reference.startswith("sha256:") else ""),
        platform,
        tuple(layer.decode("utf-8", "replace") for layer in body.get("Layers", [])),
        sum(int(layer.get("Size", 0)) for layer in image.get("LayersData", [])),
    )


def _text(table: Any, key: str) -> str:
    text: str = table.get(key, b"").decode("utf-8", "replace")
    return text


def type_bits(kind: str) -> int:
    """st_mode's type of a node's kind."""
    return {"dir": stat.S_IFDIR, "file": stat.S_IFREG, "symlink": stat.S_IFLNK}[kind]


def describe(read_at: ReadAt, size: int) -> dict[str, Any]:
    """What a Go clip file is about, with the keys of `codec.summary`, and besides `format`, `lacks` (what our own
    index has and this file does not) and, for a pointer, `data`: the S3 URL."""
    clip = read(read_at, size)
    place = clip.place
    facts: dict[str, Any] = {
        "image": "",
        "digest": "",
        "platform": "",
        "layers": 0,
        "entries": len(clip.nodes),
        "image_bytes": sum(node.size for node in clip.nodes if node.kind == "file"),
        "index_bytes": size,
        "seek_points": 0,
        "format": clip.kind,
        "lacks": list(_LACKS if isinstance(place, OciPlace) else _LACKS[1:]),
    }
    if isinstance(place, OciPlace):
        facts |= {
            "image": place.name or f"{place.registry}/{place.repository}",
            "digest": place.digest,
            "platform": place.platform,
            "layers": len(place.layers),
            "image_bytes": place.layer_bytes,
        }
    elif isinstance(place, S3Place):
        facts |= {"data": f"s3://{place.bucket}/{place.key}"}
    return facts
