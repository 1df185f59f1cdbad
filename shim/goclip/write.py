"""Go clip's files, written: what Go's own reader takes, from our Index (see files.py for the layout)."""

from __future__ import annotations

import json
import stat
from collections.abc import Callable, Iterator, Mapping
from datetime import UTC, datetime
from typing import Any

from shim.goclip.files import HEADER, MAGIC, VERSION, S3Place
from shim.goclip.gobwrite import GO_BOOL, GO_BYTES, GO_INT, GO_STRING, GO_UINT, Map, Opaque, Slice, Struct, encode
from shim.index.model import Compression, Index, Node, Restart, Tree

_OWNER = Struct("Owner", (("Uid", GO_UINT), ("Gid", GO_UINT)))
_ATTR = Struct(
    "Attr",
    (
        ("Ino", GO_UINT),
        ("Size", GO_UINT),
        ("Blocks", GO_UINT),
        ("Atime", GO_UINT),
        ("Mtime", GO_UINT),
        ("Ctime", GO_UINT),
        ("Atimensec", GO_UINT),
        ("Mtimensec", GO_UINT),
        ("Ctimensec", GO_UINT),
        ("Mode", GO_UINT),
        ("Nlink", GO_UINT),
        ("Owner", _OWNER),
        ("Rdev", GO_UINT),
        ("Blksize", GO_UINT),
        ("Padding", GO_UINT),
    ),
)
_REMOTE = Struct("RemoteRef", (("LayerDigest", GO_STRING), ("UOffset", GO_INT), ("ULength", GO_INT)))
_NODE = Struct(
    "ClipNode",
    (
        ("NodeType", GO_STRING),
        ("Path", GO_STRING),
        ("Attr", _ATTR),
        ("Target", GO_STRING),
        ("ContentHash", GO_STRING),
        ("DataPos", GO_INT),
        ("DataLen", GO_INT),
        ("Remote", _REMOTE),
    ),
)
_STRINGS, _LABELS, _SET = Slice(GO_STRING), Map(GO_STRING, GO_STRING), Map(GO_STRING, Struct("", ()))
_POINT = Struct("GzipCheckpoint", (("COff", GO_INT), ("UOff", GO_INT)))
_GZIP = Struct("GzipIndex", (("LayerDigest", GO_STRING), ("Checkpoints", Slice(_POINT))))
_LAYER = Struct(
    "LayerMetadata", (("MIMEType", GO_STRING), ("Digest", GO_STRING), ("Size", GO_INT), ("Annotations", _LABELS))
)
_IMAGE = Struct(
    "ImageMetadata",
    (
        ("Name", GO_STRING),
        ("Digest", GO_STRING),
        ("RepoTags", _STRINGS),
        ("Created", Opaque("Time")),
        ("DockerVersion", GO_STRING),
        ("Labels", _LABELS),
        ("Architecture", GO_STRING),
        ("Os", GO_STRING),
        ("Variant", GO_STRING),
        ("Author", GO_STRING),
        ("Env", _STRINGS),
        ("Cmd", _STRINGS),
        ("Entrypoint", _STRINGS),
        ("User", GO_STRING),
        ("WorkingDir", GO_STRING),
        ("ExposedPorts", _SET),
        ("Volumes", _SET),
        ("StopSignal", GO_STRING),
        ("Layers", _STRINGS),
        ("LayersData", Slice(_LAYER)),
    ),
)
_OCI = Struct(
    "OCIStorageInfo",
    (
        ("RegistryURL", GO_STRING),
        ("Repository", GO_STRING),
        ("Reference", GO_STRING),
        ("Layers", _STRINGS),
        ("GzipIdxByLayer", Map(GO_STRING, _GZIP)),
        ("DecompressedHashByLayer", _LABELS),
        ("ImageMetadata", _IMAGE),
    ),
)
_S3 = Struct(
    "S3StorageInfo",
    (
        ("Bucket", GO_STRING),
        ("Region", GO_STRING),
        ("Key", GO_STRING),
        ("Endpoint", GO_STRING),
        ("ForcePathStyle", GO_BOOL),
    ),
)
_WRAPPER = Struct("StorageInfoWrapper", (("Type", GO_STRING), ("Data", GO_BYTES)))

_YEAR_ONE = 62_135_596_800  # seconds from 0001-01-01 to 1970-01-01: Go's time.Time counts from there
_KINDS = {stat.S_IFDIR: "dir", stat.S_IFREG: "file", stat.S_IFLNK: "symlink"}

NODES = Slice(_NODE)  # Go: []*ClipNode

FileData = Callable[[Node], Mapping[str, Any] | None]
"""What Go must know of a regular file's data (fields of ClipNode); None: Go cannot read it, so it is left out."""


def encode_nodes(tree: Tree, data: FileData) -> tuple[bytes, list[bytes]]:
    """(the gob of a tree's nodes, paths that are left out since Go clip has no way to show them: devices, fifos,
    sockets, and files whose data `data` cannot give)."""
    tree.count_links()
    left_out: list[bytes] = []
    return encode(NODES, list(_nodes(tree, data, left_out))), left_out


def _nodes(tree: Tree, data: FileData, left_out: list[bytes]) -> Iterator[dict[str, Any]]:
    numbers: dict[int, int] = {}
    paths = sorted(tree.walk(), key=lambda item: item[0])  # Go's own order: by whole path
    for path, node in paths:
        kind = _KINDS.get(stat.S_IFMT(node.mode))
        more = data(node) if kind == "file" and node.size else {}
        if kind is None or more is None:
            left_out.append(path)
            continue
        ino = numbers.setdefault(id(node), len(numbers) + 1)
        seconds, rest = divmod(node.mtime, 1_000_000_000)
        times = {f"{name}{unit}": value for name in ("Atime", "Mtime", "Ctime")
                 for unit, value in (("", seconds % (1 << 64)), ("nsec", rest))}  # fmt: skip
        yield {
            "NodeType": kind,
            "Path": path,
            "Attr": {
                "Ino": ino,
                "Size": node.size,
                "Blocks": (node.size + 511) // 512,
                **times,
                "Mode": node.mode,
                "Nlink": node.nlink,
                "Owner": {"Uid": node.uid, "Gid": node.gid},
            },
            "Target": node.target,
            **more,
        }


def pack(nodes: bytes, storage: bytes = b"", kind: str = "", *, data_end: int = HEADER.size) -> tuple[bytes, bytes]:
    """(header, what follows an archive's data): the index, and the storage info of a file without data."""
    index_end = data_end + len(nodes)
    header = HEADER.pack(MAGIC, VERSION, len(nodes), data_end, len(storage), index_end if storage else 0, kind.encode())
    return header, nodes + storage


def encode_v2(index: Index) -> tuple[bytes, list[bytes]]:
    """(a v2 file of the image, paths that Go clip cannot show). Our own bytes may be put behind it."""

    def data(node: Node) -> dict[str, Any] | None:
        if len(node.extents) != 1 or node.extents[0].length != node.size:
            return None
        extent = node.extents[0]
        layer = index.layers[extent.layer].digest
        return {"Remote": {"LayerDigest": layer, "UOffset": extent.offset, "ULength": extent.length}}

    nodes, left_out = encode_nodes(index.tree, data)
    header, rest = pack(nodes, _wrap("oci", encode(_OCI, _oci(index))), "oci")
    return header + rest, left_out


def encode_pointer(nodes: bytes, place: S3Place) -> bytes:
    """A v1 pointer: the index of an archive, given as its gob, and the place in S3 where the archive lies."""
    info = {
        "Bucket": place.bucket,
        "Region": place.region,
        "Key": place.key,
        "Endpoint": place.endpoint,
        "ForcePathStyle": place.path_style,
    }
    return b"".join(pack(nodes, _wrap("s3", encode(_S3, info)), "s3"))


def _wrap(kind: str, body: bytes) -> bytes:
    return encode(_WRAPPER, {"Type": kind, "Data": body})


def _oci(index: Index) -> dict[str, Any]:
    place, _, repository = index.image.partition("/")
    name, colon, _ = repository.rpartition(":")
    return {
        "RegistryURL": place,
        "Repository": name if colon else repository,
        "Reference": index.digest,
        "Layers": [layer.digest for layer in index.layers],
        "GzipIdxByLayer": {
            layer.digest: {
                "LayerDigest": layer.digest,
                # only where a gzip member begins: Go inflates from these points with a new reader
                "Checkpoints": [
                    {"COff": layer.spans.cstart(i), "UOff": layer.spans.ustart(i)}
                    for i in range(layer.spans.count)
                    if layer.spans.kind(i) == Restart.STREAM
                ],
            }
            for layer in index.layers
            if layer.compression == Compression.GZIP
        },
        "DecompressedHashByLayer": {layer.digest: layer.diff_id.removeprefix("sha256:") for layer in index.layers},
        "ImageMetadata": _image(index),
    }


def _image(index: Index) -> dict[str, Any]:
    """The image's config in Go clip's words. Raises nothing: what is not of the expected type is left out."""
    config = _table(_json(index.config))
    run = _table(config.get("config"))
    os_name, _, rest = index.platform.partition("/")
    architecture, _, variant = rest.partition("/")
    return {
        "Name": index.image,
        "Digest": index.digest,
        "Created": _time(config.get("created")),
        "DockerVersion": _text(config.get("docker_version")),
        "Labels": {key: value for key, value in _table(run.get("Labels")).items() if isinstance(value, str)},
        "Architecture": architecture,
        "Os": os_name,
        "Variant": variant,
        "Author": _text(config.get("author")),
        **{key: _texts(run.get(key)) for key in ("Env", "Cmd", "Entrypoint")},
        **{key: _text(run.get(key)) for key in ("User", "WorkingDir", "StopSignal")},
        **{key: {name: {} for name in _table(run.get(key))} for key in ("ExposedPorts", "Volumes")},
        "Layers": [layer.digest for layer in index.layers],
        "LayersData": [
            {"MIMEType": layer.media_type, "Digest": layer.digest, "Size": layer.size} for layer in index.layers
        ],
    }


def _json(raw: bytes) -> Any:
    try:
        return json.loads(raw)
    except (ValueError, RecursionError):
        return None


def _table(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _text(value: Any) -> bytes:
    return value.encode("utf-8", "replace") if isinstance(value, str) else b""


def _texts(value: Any) -> list[bytes]:
    return [_text(item) for item in value if isinstance(item, str)] if isinstance(value, list) else []


def _time(value: Any) -> bytes:
    """Go's time.Time as MarshalBinary writes it: version 1, seconds since year 1, nanoseconds, UTC."""
    seconds = nanoseconds = 0
    try:
        when = datetime.fromisoformat(value)
        when = when if when.tzinfo is not None else when.replace(tzinfo=UTC)
        seconds, nanoseconds = int(when.timestamp()) + _YEAR_ONE, when.microsecond * 1000
    except (TypeError, ValueError, OverflowError):
        pass
    return b"\x01" + seconds.to_bytes(8, "big", signed=True) + nanoseconds.to_bytes(4, "big") + b"\xff\xff"
