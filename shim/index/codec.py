"""The native index file: `Index` to bytes and back. FORMAT.md describes the bytes.

Reading is safe on hostile input: whatever the bytes, the result is a valid Index or IndexFormatError; time and memory
stay in proportion to the file (at most 64 raw bytes for each stored one, and the absolute bounds in `validate`).
The same Index gives the same bytes, as long as liblzma is the same.
"""

from __future__ import annotations

import errno
import json
import mmap
import os
import stat
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from types import TracebackType
from typing import Any

from shim.errors import IndexFormatError
from shim.index import archived, container, profile, spancodec, treecodec, treereader
from shim.index.container import Container
from shim.index.flat import FlatTree
from shim.index.model import Archive, Compression, Index, Layer, Node, Restart, SpanTable, Tree
from shim.index.sparse import SparseWindows
from shim.index.validate import MAX_CONFIG, MAX_LAYERS, validate_head, validate_spans, validate_tree

Data = bytes | bytearray | memoryview | mmap.mmap

META = b"META"
CONFIG = b"CONF"
TREE = b"TREE"
SPANS = b"SPAN"
WINDOWS = b"WIND"
PROFILE = b"PROF"  # the one that is optional: absent without a start profile
ARCHIVE = b"DATA"
LIMITS = {
    META: 1 << 20,
    CONFIG: MAX_CONFIG,
    TREE: treecodec.MAX_RAW,
    SPANS: spancodec.MAX_SPAN_RAW,
    WINDOWS: spancodec.MAX_WINDOW_RAW,
    PROFILE: profile.MAX_RAW,
    ARCHIVE: archived.MAX_RAW,
}
_LAYER_KEYS = ("digest", "diff_id", "media_type", "size", "uncompressed_size", "compression")


def index_digest(data: Data) -> str:
    """The name of an index: "sha256:" and the hash of our part of the file, header to trailer."""
    with memoryview(data) as view, view.cast("B") as flat:
        start, length = container.locate(flat)
        return "sha256:" + sha256(flat[start : start + length]).hexdigest()


def encode(index: Index) -> bytes:
    """The index file. `nlink` is not stored, xattrs are sorted; everything else comes back as it is.

    Raises IndexFormatError if `index` is not valid, or larger than the format allows.
    """
    with Encoder() as encoder:
        return encoder.finish(index)


class Encoder:
    """`encode` for a maker who has the layers one by one: what they need longest for, to compress the windows, is begun
    with each. The file is the same. Use it in a `with` block."""

    def __init__(self) -> None:
        self._packer = container.Packer()
        self._windows = spancodec.WindowEncoder()
        self._pieces: list[container.Piece] = []
        self._pending = b""  # runs' bytes that are too few for a piece of their own
        self._layers = 0

    def __enter__(self) -> Encoder:
        self._packer.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._packer.__exit__(kind, error, trace)

    def layer(self, layer: Layer) -> None:
        """The next layer, lowest first. Raises IndexFormatError if its spans are not valid."""
        validate_spans(layer, self._layers)
        self._layers += 1
        self._pending += self._windows.add(layer)
        if len(self._pending) > container.PIECE // 2:
            self._pieces += self._packer.pieces(self._pending)
            self._pending = b""

    def finish(self, index: Index) -> bytes:
        """The file of `index`, whose layers begin with those that `layer` got. Raises IndexFormatError as `encode`."""
        validate_head(index)
        for layer in index.layers[self._layers :]:
            self.layer(layer)
        pieces = self._packer.pieces(self._windows.head()) + self._pieces
        pieces += self._packer.pieces(self._pending) if self._pending else []
        _check_size(WINDOWS, sum(len(piece.raw) for piece in pieces))
        self._packer.add(WINDOWS, container.MANDATORY, pieces)
        for tag, parts in _sections(index):
            _check_size(tag, sum(map(len, parts)))
            flags = 0 if tag == PROFILE else container.MANDATORY
            self._packer.add(tag, flags, [piece for part in parts for piece in self._packer.pieces(part)])
        return self._packer.finish(tuple(LIMITS))


def raw_sections(index: Index) -> dict[bytes, bytes]:
    """The sections before compression, in file order: the same whatever the version of liblzma."""
    validate_head(index)
    for number, layer in enumerate(index.layers):
        validate_spans(layer, number)
    found = {tag: b"".join(parts) for tag, parts in _sections(index)}
    found[WINDOWS] = spancodec.encode_windows(index.layers)
    return {tag: found[tag] for tag in LIMITS if tag in found}


def _sections(index: Index) -> Iterator[tuple[bytes, Sequence[bytes]]]:
    """Tag and raw bytes of each section but WIND, what takes longest to compress first; the bytes in parts that have
    little in common. Raises IndexFormatError, also late."""
    validate_tree(index.tree, [layer.uncompressed_size for layer in index.layers])
    yield TREE, treecodec.encode_parts(index.tree, len(index.layers))
    yield SPANS, [spancodec.encode_spans(index.layers)]
    yield CONFIG, [index.config]
    counts = count_entries(index.tree), sum(map(_restarts, index.layers))
    yield META, [_encode_meta(index, *counts)]
    if index.profile:
        profile.check(index.profile, [layer.spans.count for layer in index.layers])
        yield PROFILE, [profile.encode(index.profile)]
    if index.archive is not None:
        archived.validate_archive(index)
        yield ARCHIVE, [archived.encode_archive(index.archive)]


def _check_size(tag: bytes, size: int) -> None:
    if size > LIMITS[tag]:
        raise IndexFormatError(f"the image is too large: section {tag.decode()} would take {size} bytes")


@contextmanager
def _opened(data: Data) -> Iterator[Container]:
    """A file's sections, while inside. Raises IndexFormatError."""
    with memoryview(data) as view, view.cast("B") as flat:
        box = container.parse(flat, frozenset(LIMITS))
        try:
            yield box
        finally:
            box.view.release()


def decode(data: Data, *, tree: bool = True, spans: bool = True) -> Index:
    """The index in a file's bytes. What is switched off is neither read nor checked, and comes out empty: `tree` as a
    bare root directory, `spans` as tables without spans (and no start profile).

    Raises IndexFormatError: not an index, damaged, hostile, or of a version this one does not know.
    """
    with _opened(data) as box:
        index, meta = _read_head(box)
        if spans:
            _read_spans(box, index, meta)
        if tree:
            index.tree = _read_tree(box, index, meta).nodes()
        return index


def decode_flat(data: Data) -> tuple[Index, FlatTree]:
    """The index without spans and tree, and its tree as columns. Raises IndexFormatError as `decode`."""
    with _opened(data) as box:
        index, meta = _read_head(box)
        return index, _read_tree(box, index, meta)


def decode_tree(data: Data) -> Tree:
    """The merged tree alone. Raises IndexFormatError as `decode`."""
    return decode(data, spans=False).tree


def summary(data: Data) -> dict[str, Any]:
    """What an index is about, without reading its tree or spans: image, digest, platform, layers (their number),
    entries, image_bytes (compressed layers), index_bytes, seek_points (spans at which reading can begin).

    Raises IndexFormatError as `decode`.
    """
    with _opened(data) as box:
        index, meta = _read_head(box)
    with memoryview(data) as view:
        size = view.nbytes
    return {
        "image": index.image,
        "digest": index.digest,
        "platform": index.platform,
        "layers": len(index.layers),
        "entries": meta["entries"],
        "image_bytes": sum(layer.size for layer in index.layers),
        "index_bytes": size,
        "seek_points": meta["seek_points"],
    }


def archive_of(data: Data) -> Archive | None:
    """Where the data are, if an index's are in an archive; little is read. Raises IndexFormatError."""
    with _opened(data) as box:
        return _read_head(box)[0].archive if ARCHIVE in box.sections else None


def write_index(path: str | os.PathLike[str], index: Index) -> str:
    """Encode into `path`, mode 0644: complete or not at all, also after a crash. Returns the index digest.

    Raises IndexFormatError for an invalid index (nothing is written) and OSError.
    """
    data = encode(index)
    write_file(Path(path), data)
    return index_digest(data)


def check_target(path: Path) -> None:
    """Raises OSError if a rename to `path` would do away with something that is no file: /dev/null, /dev/stdout."""
    if path.exists() and not path.is_file() and not path.is_dir():  # a directory stays anyway
        raise FileExistsError(errno.EEXIST, "it is there, and is no regular file", str(path))


def write_file(path: Path, data: bytes) -> None:
    """Replace `path` by `data`, mode 0644, by temporary file, fsync and rename. Raises OSError."""
    check_target(path)
    handle, temporary = tempfile.mkstemp(prefix=f".{path.name[:64]}.", dir=path.parent)
    try:
        with open(handle, "wb") as out:
            out.write(data)
            os.fchmod(out.fileno(), 0o644)
            out.flush()
            os.fsync(out.fileno())
        os.rename(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise
    directory = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def read_index(source: str | os.PathLike[str] | int) -> Index:
    """`decode(read_file(source))`."""
    return decode(read_file(source))


def read_file(source: str | os.PathLike[str] | int) -> bytes:
    """An index file's bytes, from a path (a symlink is refused) or an open descriptor (left open, its position unused):
    our part of it, whatever stands before.

    Never blocks on a fifo or device. Raises IndexFormatError if it is no regular file, longer than 512 MiB, or changes
    while it is read, and OSError if it cannot be opened.
    """
    if isinstance(source, int):
        return _read_descriptor(source, f"descriptor {source}")
    handle = os.open(source, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        return _read_descriptor(handle, os.fspath(source))
    finally:
        os.close(handle)


def _read_descriptor(handle: int, name: str) -> bytes:
    found = os.fstat(handle)
    if not stat.S_ISREG(found.st_mode):
        raise IndexFormatError(f"{name} is not a regular file")
    start = container.start_of_part(lambda offset, length: os.pread(handle, length, offset), found.st_size)
    if found.st_size - start > container.MAX_FILE:
        raise IndexFormatError(f"{name} is {found.st_size} bytes long, at most {container.MAX_FILE} are allowed")
    pieces, at = [], start
    while at < found.st_size and (piece := os.pread(handle, found.st_size - at, at)):
        pieces.append(piece)
        at += len(piece)
    if at != found.st_size:
        raise IndexFormatError(f"{name} changed while it was read")
    return b"".join(pieces)


def count_entries(tree: Tree) -> int:
    """Names in the tree, the root included."""
    count, stack = 1, [tree.root]
    while stack:
        children = stack.pop().children or {}
        count += len(children)
        stack.extend(node for node in children.values() if node.children)
    return count


def _restarts(layer: Layer) -> int:
    return layer.spans.count - layer.spans.kinds.count(Restart.CONTINUE)


def _encode_meta(index: Index, entries: int, seek_points: int) -> bytes:
    layers = [{key: getattr(layer, key) for key in _LAYER_KEYS} for layer in index.layers]
    for layer in layers:
        layer["compression"] = Compression(layer["compression"]).name.lower()
    meta = {
        "image": index.image,
        "digest": index.digest,
        "platform": index.platform,
        "checkpoint_mib": index.checkpoint_mib,
        "entries": entries,
        "seek_points": seek_points,
        "layers": layers,
    }
    return json.dumps(meta, separators=(",", ":")).encode("ascii")


def _read_head(box: Container) -> tuple[Index, dict[str, Any]]:
    raw = box.read(META, LIMITS[META])
    try:
        meta = json.loads(raw.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise IndexFormatError("section META is not valid JSON") from error
    if not isinstance(meta, dict):
        raise IndexFormatError("section META is no JSON object")
    rows = _get(meta, "layers", list)
    if len(rows) > MAX_LAYERS:
        raise IndexFormatError(f"the image has {len(rows)} layers, at most {MAX_LAYERS} are allowed")
    for key in ("entries", "seek_points"):
        if _get(meta, key, int) < 0:
            raise IndexFormatError(f"section META: `{key}` is negative")
    index = Index(
        image=_get(meta, "image", str),
        digest=_get(meta, "digest", str),
        platform=_get(meta, "platform", str),
        config=box.read(CONFIG, LIMITS[CONFIG]),
        layers=[_read_layer(row) for row in rows],
        tree=Tree(Node(stat.S_IFDIR | 0o755, children={}, nlink=2)),
        checkpoint_mib=_get(meta, "checkpoint_mib", int),
    )
    validate_head(index)
    if ARCHIVE in box.sections:
        index.archive = archived.decode_archive(box.read(ARCHIVE, LIMITS[ARCHIVE]))
        archived.validate_archive(index)
    return index, meta


def _read_layer(row: object) -> Layer:
    if not isinstance(row, dict):
        raise IndexFormatError("section META: a layer is no JSON object")
    names = {kind.name.lower(): kind for kind in Compression}
    compression = names.get(_get(row, "compression", str))
    if compression is None:
        raise IndexFormatError("section META: a layer's compression is unknown")
    return Layer(
        digest=_get(row, "digest", str),
        diff_id=_get(row, "diff_id", str),
        size=_get(row, "size", int),
        uncompressed_size=_get(row, "uncompressed_size", int),
        media_type=_get(row, "media_type", str),
        compression=compression,
        spans=SpanTable(windows=SparseWindows()),
    )


def _get(table: dict[str, Any], key: str, kind: type) -> Any:
    value = table.get(key)
    if type(value) is not kind:  # not isinstance: True is no number here
        raise IndexFormatError(f"section META: `{key}` is missing or not of type {kind.__name__}")
    return value


def _read_spans(box: Container, index: Index, meta: dict[str, Any]) -> None:
    tables = spancodec.decode_spans(box.read(SPANS, LIMITS[SPANS]), len(index.layers))
    spancodec.decode_windows(box.read(WINDOWS, LIMITS[WINDOWS]), tables)
    for number, (layer, table) in enumerate(zip(index.layers, tables, strict=True)):
        layer.spans = table
        validate_spans(layer, number)
    if sum(map(_restarts, index.layers)) != meta["seek_points"]:
        raise IndexFormatError("section META gives another number of seek points than the span tables")
    if PROFILE in box.sections:
        index.profile = profile.decode(box.read(PROFILE, LIMITS[PROFILE]))
        profile.check(index.profile, [table.count for table in tables])


def _read_tree(box: Container, index: Index, meta: dict[str, Any]) -> FlatTree:
    sizes = [layer.uncompressed_size for layer in index.layers]
    tree = treereader.decode_tree(box.read(TREE, LIMITS[TREE]), sizes)
    if len(tree.names) != meta["entries"]:
        raise IndexFormatError("section META gives another number of entries than the tree")
    return tree
