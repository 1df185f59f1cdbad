"""Jobs: turn an index file into what a mount needs, under STATE/trees/<index hex>/.

    index.clip        the index, as it was given (written by the daemon before the job)
    spans.<n>         layer n's span table (shim/index/spanfile.py)
    pieces, archive   of an archive: where in it the layer's bytes are, and the path of a local one
    image.erofs       the EROFS metadata image, with a seal behind it
    profile.json      the start profile, if there is one (profile.py)
    meta.json         everything else the daemon needs; written last: without it the directory counts as
                      empty

Two jobs, side by side: `prepare_layers` (so that the layers can be served, and fetched from, while the tree is made)
and `prepare_tree`; `finish` puts together what they found.

Every file is written under a temporary name and renamed, so a job can be killed anywhere and run again. A disk can
still give back something else (nothing is synced: a power failure may), and EROFS shows a damaged image without a word:
so the image ends in a seal (format version, length, CRC-32), which is looked at before each mount, and span files carry
a checksum of their own.
"""

from __future__ import annotations

import json
import os
import posixpath
import struct
import zlib
from array import array
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Any, BinaryIO

from shim.cache.store import layer_name
from shim.daemon.profile import write_profile
from shim.erofs.chunks import ReadLayer
from shim.erofs.writer import write_image
from shim.errors import CacheError, IndexFormatError
from shim.index import archived, codec
from shim.index.flat import FlatTree
from shim.index.model import Extent, Index
from shim.index.spanfile import SpanFile, write_span_file

META_VERSION = 2
IMAGE_VERSION = 2  # raise it when shim/erofs writes other images: those that are kept are then made again
_MAX_LINKS = 40  # Linux: MAXSYMLINKS
_MAX_STEPS = 100_000  # names that are looked up for all of a root's symlinks; a distribution's take about a hundred
_SEAL = struct.Struct("<8sIIQ488x")  # magic, image version, CRC-32 and length of what stands before; one block
_SEAL_MAGIC = b"clipseal"
_PIECE = 1 << 20


def begin(directory: Path) -> None:
    """Clear what killed jobs left, and an image of another version, or damaged."""
    for left in (*directory.glob("*.tmp"), directory / "image.erofs"):
        left.unlink(missing_ok=True)


def prepare_layers(directory: str) -> dict[str, Any]:
    """Job: decode and validate all of `directory`/index.clip but its tree, write the span files and, if the index has
    one, the start profile; returns the meta's part about image and layers."""
    base = Path(directory)
    index = codec.decode(codec.read_file(base / "index.clip"), tree=False)
    layers = []
    for number, layer in enumerate(index.layers):
        span_path = base / f"spans.{number}"
        write_span_file(span_path, layer)
        with SpanFile(span_path) as spans:
            identity = spans.identity
        layers.append(
            {
                "digest": layer.digest,
                "diff_id": layer.diff_id,
                "size": layer.size,
                "uncompressed_size": layer.uncompressed_size,
                "compression": int(layer.compression),
                "blob": layer_name(layer.diff_id, identity),
            }
        )
    if index.profile:
        write_profile(base, index.profile)
    archive = index.archive
    if archive is not None:
        [only] = index.layers  # its digest is made of its spans', so it can be no registry's layer that is cached
        if only.diff_id != "sha256:" + sha256(only.spans.digests).hexdigest() or only.digest != only.diff_id:
            raise IndexFormatError("the archive's digest is not that of its spans")
        _commit(base / "pieces", lambda out: out.write(array("Q", archived.flat(archive)).tobytes()))
    return {
        "version": META_VERSION,
        "image": index.image,
        "digest": index.digest,
        "platform": index.platform,
        "layers": layers,
        **({} if archive is None else {"archive": archive.location}),
    }


def prepare_tree(directory: str, erofs: bool = True) -> dict[str, Any]:
    """Job: decode and validate the tree of `directory`/index.clip, write its EROFS image; returns the meta's other
    part.

    The image is left to `build_image` when it needs data that EROFS cannot map: that has to be read through the blob
    files.
    """
    base = Path(directory)
    index, tree = codec.decode_flat(codec.read_file(base / "index.clip"))
    if erofs:
        _try_image(base, index, tree)
    return {
        "symlinks": _root_symlinks(tree),
        "dirs": [name for name in ("proc", "dev", "sys") if _has_dir(tree, name.encode())],
        "probes": _probes(tree),
    }


def finish(directory: Path, meta: dict[str, Any]) -> None:
    """Keep the whole meta: from now on the directory counts as prepared. Raises CacheError."""
    try:
        _commit(directory / "meta.json", lambda out: out.write(json.dumps(meta).encode()))
    except OSError as error:
        raise CacheError(
            f"the tree cannot be kept in {directory}: {error.strerror}",
            hint="see `state_dir` in the configuration: is the disk full?",
        ) from error


def _try_image(base: Path, index: Index, tree: FlatTree) -> None:
    class NeedsBytesError(Exception):
        pass

    def refuse(_layer: int, _offset: int, _length: int) -> bytes:
        raise NeedsBytesError

    try:
        _commit(base / "image.erofs", lambda out: _write_sealed(out, index, tree, refuse))
    except NeedsBytesError:
        pass


def read_meta(directory: Path) -> dict[str, Any] | None:
    """The meta of a directory that `prepare_tree` finished, else None."""
    try:
        meta = json.loads((directory / "meta.json").read_bytes())
    except (OSError, ValueError, RecursionError):
        return None
    return meta if isinstance(meta, dict) and _is_whole(meta) else None


def _is_whole(meta: dict[str, Any]) -> bool:
    """Whether a meta has the shape that `prepare_tree` gives it."""
    kinds = {"image": str, "digest": str, "platform": str, "layers": list, "symlinks": dict, "dirs": list}
    kinds |= {"probes": list}
    if meta.get("version") != META_VERSION or not all(isinstance(meta.get(key), kind) for key, kind in kinds.items()):
        return False
    return isinstance(meta.get("archive", ""), str) and all(
        isinstance(layer, dict) and all(isinstance(layer.get(key), str) for key in ("digest", "diff_id", "blob"))
        for layer in meta["layers"]
    )


def build_image(directory: str, blobs: str, names: list[str]) -> None:
    """Write image.erofs unless a sound one is there. Data that EROFS cannot map is read through the blob files."""
    base = Path(directory)
    if is_sealed(base / "image.erofs"):
        return
    index, tree = codec.decode_flat(codec.read_file(base / "index.clip"))

    def read_layer(layer: int, offset: int, length: int) -> bytes:
        with open(os.path.join(blobs, names[layer]), "rb", buffering=0) as blob:
            data = b""
            while len(data) < length:
                piece = os.pread(blob.fileno(), length - len(data), offset + len(data))
                if not piece:
                    raise IndexFormatError(f"layer {layer} ends before byte {offset + length}")
                data += piece
            return data

    _commit(base / "image.erofs", lambda out: _write_sealed(out, index, tree, read_layer))


def _write_sealed(out: BinaryIO, index: Index, tree: FlatTree, read_layer: ReadLayer) -> None:
    write_image(tree, [layer.uncompressed_size for layer in index.layers], out, read_layer)
    length = out.seek(0, os.SEEK_END)
    out.seek(0)
    check = _crc(out, length)
    out.seek(length)
    out.write(_SEAL.pack(_SEAL_MAGIC, IMAGE_VERSION, check, length))


def is_sealed(path: Path) -> bool:
    """Whether the image at `path` is whole, as it was written, and of this version."""
    try:
        with open(path, "rb") as image:
            length = os.fstat(image.fileno()).st_size - _SEAL.size
            if length < 0:
                return False
            image.seek(length)
            seal = _SEAL.unpack(image.read(_SEAL.size))
            image.seek(0)
            return seal == (_SEAL_MAGIC, IMAGE_VERSION, _crc(image, length), length)
    except OSError:
        return False


def _crc(file: BinaryIO, length: int) -> int:
    check = 0
    while length > 0 and (piece := file.read(min(_PIECE, length))):
        check = zlib.crc32(piece, check)
        length -= len(piece)
    return check


def _commit(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Replace `path`: complete or not at all. The name has the process in it: two jobs never write one file."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "w+b") as out:
            write(out)
        temporary.rename(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def _has_dir(tree: FlatTree, name: bytes) -> bool:
    inode = tree.child(0, name)
    return inode is not None and tree.directory_of(inode) is not None


def _root_symlinks(tree: FlatTree) -> dict[str, dict[str, object]]:
    """The root's symlinks with their targets, and whether each resolves inside the tree.

    Names and targets are decoded as the file system encoding does (surrogateescape), as the wrapper encodes them back.
    """
    found: dict[str, dict[str, object]] = {}
    budget = [_MAX_STEPS]
    for entry in tree.directories[0].entries:
        name, target = tree.names[entry], tree.targets.get(tree.inodes[entry])
        if target is not None:
            found[os.fsdecode(name)] = {
                "target": os.fsdecode(target),
                "resolves": resolve(tree, b"/" + name, budget) is not None,
            }
    return found


def resolve(tree: FlatTree, path: bytes, budget: list[int]) -> int | None:
    """The inode that `path` leads to inside the tree, symlinks followed as chroot would, or None: also where the budget
    of steps, which several paths may share, is used up."""
    links = 0
    inode, here = 0, 0  # what was reached, and the directory to go on from
    todo = [part for part in reversed(path.split(b"/")) if part]
    while todo:
        budget[0] -= 1
        if budget[0] < 0:
            return None
        part = todo.pop()
        directory = tree.directories[here]
        if directory.inode != inode:
            return None  # a file in the middle
        if part in (b".", b".."):
            if part == b"..":
                here = directory.parent
                inode = tree.directories[here].inode
            continue
        child = tree.child(here, part)
        if child is None:
            return None
        target = tree.targets.get(child)
        if target is not None:
            links += 1
            if links > _MAX_LINKS:
                return None
            if posixpath.isabs(target):
                inode, here = 0, 0
            todo.extend(piece for piece in reversed(target.split(b"/")) if piece)
            continue
        inode = child
        number = tree.directory_of(child)
        here = here if number is None else number
    return inode


def _probes(tree: FlatTree) -> list[dict[str, object]]:
    """One file for each layer, to compare what EROFS shows with what the layer holds; programs' loaders come first,
    since a container reads them anyway."""
    best: dict[int, tuple[int, int, Extent]] = {}
    ranks = dict.fromkeys({layer: inode for inode, layer in enumerate(tree.layers)}.values(), 2)  # one a layer
    ranks |= dict.fromkeys(tree.extents, 3)
    for entry, name in enumerate(tree.names):
        if name.startswith((b"ld-linux", b"ld-musl", b"ld.so", b"busybox")):
            ranks[tree.inodes[entry]] = 1 if name.startswith(b"busybox") else 0
    for inode, rank in ranks.items():
        extents = tree.data_of(inode)
        if extents and not extents[0].logical and (extents[0].layer not in best or rank < best[extents[0].layer][0]):
            best[extents[0].layer] = (rank, inode, extents[0])
    entries = tree.first_entries()
    return [
        {
            "layer": layer,
            "rank": rank,
            "path": os.fsdecode(tree.path(entries[inode])),
            "offset": extent.offset,
            "length": min(extent.length, 4096),
        }
        for layer, (rank, inode, extent) in sorted(best.items())
    ]
