"""Checks an index against the registry it came from: every byte of every layer is fetched and hashed again."""

from __future__ import annotations

import stat
from collections.abc import Iterator
from contextlib import closing

from shim.index.build import Progress, layer_name, layer_of, read_diff_ids, scan_layers
from shim.index.merge import TreeMerger, show_path
from shim.index.model import Index, Layer, Node, Spans, Tree
from shim.registry.client import RegistryClient
from shim.registry.manifest import parse_manifest
from shim.registry.ref import ImageRef

MAX_DIFFERENCES = 50  # more are of no use to anybody


def verify_index(index: Index, client: RegistryClient, *, progress: Progress | None = None) -> list[str]:
    """What differs between the index and the image in the registry, one line each, at most 50; empty if all is right.

    Compared are the manifest (still there, under its digest), the config, each layer's digests, sizes, spans and
    restart points, and the merged tree. Raises RegistryError (NotFoundError: the manifest or a layer is gone),
    LayerError and IntegrityError (naming the layer) for an image that is damaged itself.
    """
    ref = ImageRef.parse(index.image, local_paths=False).with_digest(index.digest)
    document = client.manifest(ref)
    descriptor, descriptors = parse_manifest(document, f"the manifest of {ref}")
    config = client.blob(ref, descriptor)
    found = _Differences()
    if config != index.config:
        found.add("the index holds another image config than the registry")
    if len(descriptors) != len(index.layers):
        found.add(f"the index has {len(index.layers)} layers, the image {len(descriptors)}")
        return found.lines
    diff_ids = read_diff_ids(config, len(descriptors))
    merger = TreeMerger()
    with closing(scan_layers(ref, client, descriptors, index.checkpoint_mib << 20, progress)) as scans:
        for number, scanned in enumerate(scans):
            what = layer_name(number, descriptors)
            actual = layer_of(descriptors[number], scanned.result)
            if actual.diff_id != diff_ids[number]:
                found.add(f"{what}: its bytes hash to {actual.diff_id}, the image config says {diff_ids[number]}")
            for line in compare_layers(index.layers[number], actual):
                found.add(f"{what}: {line}")
            merger.apply(scanned.entries, number)
    for line in compare_trees(index.tree, merger.finish()):
        found.add(line)
        if found.full:
            break
    return found.lines


class _Differences:
    def __init__(self) -> None:
        self.lines: list[str] = []

    @property
    def full(self) -> bool:
        return len(self.lines) > MAX_DIFFERENCES

    def add(self, line: str) -> None:
        if len(self.lines) < MAX_DIFFERENCES:
            self.lines.append(line)
        elif len(self.lines) == MAX_DIFFERENCES:
            self.lines.append(f"and more: only the first {MAX_DIFFERENCES} differences are shown")


def compare_layers(said: Layer, actual: Layer) -> Iterator[str]:
    """What an index says of a layer against what the layer is; one line for each kind of difference."""
    for key in ("digest", "diff_id", "size", "uncompressed_size", "media_type", "compression"):
        ours, theirs = getattr(said, key), getattr(actual, key)
        if ours != theirs:
            yield f"{key} is {_text(ours)} in the index and {_text(theirs)} in the registry"
    if said.spans.table_digest() != actual.spans.table_digest():
        yield _first_span(said.spans, actual.spans)
        return
    for i in range(actual.spans.count):
        if _restart(said.spans, i) != _restart(actual.spans, i):
            yield f"span {i} (at byte {actual.spans.ustart(i)}) has another restart point in the index"
            return


def _restart(spans: Spans, i: int) -> tuple[int, int, int, bytes]:
    return spans.kind(i), spans.cstart(i), spans.bit(i), spans.window(i)


def _first_span(said: Spans, actual: Spans) -> str:
    for i in range(min(said.count, actual.count)):
        start = actual.ustart(i)
        if said.ustart(i) != start or said.ustart(i + 1) != actual.ustart(i + 1):
            return f"span {i} covers other bytes in the index than the layer's (at byte {start})"
        if said.digest(i) != actual.digest(i):
            return f"span {i} (at byte {start}) has another SHA-256 in the index than in the registry"
    return f"the index has {said.count} spans, the layer {actual.count}"


def compare_trees(said: Tree, actual: Tree) -> Iterator[str]:
    """Lines for what differs, `said` being the index's: names, metadata, where data lies, which names are one inode."""
    theirs_of: dict[int, int] = {}  # id of our node → id of theirs, and back
    ours_of: dict[int, int] = {}
    stack: list[tuple[bytes, Node, Node]] = [(b"", said.root, actual.root)]
    while stack:
        path, ours, theirs = stack.pop()
        name = show_path(path or b"/")
        joined = theirs_of.setdefault(id(ours), id(theirs)) != id(theirs)
        if joined or ours_of.setdefault(id(theirs), id(ours)) != id(ours):
            yield f"{name}: is a hard link to other names in the index than in the registry"
        for key, mine, real in _fields(ours, theirs):
            yield f"{name}: {key} is {mine} in the index and {real} in the registry"
        mine_names, real_names = ours.children or {}, theirs.children or {}
        for child in sorted(mine_names.keys() | real_names.keys(), reverse=True):
            below = path + b"/" + child
            if child not in mine_names:
                yield f"{show_path(below)}: is missing in the index"
            elif child not in real_names:
                yield f"{show_path(below)}: is in the index and not in the registry's layers"
            else:
                stack.append((below, mine_names[child], real_names[child]))


def _fields(ours: Node, theirs: Node) -> Iterator[tuple[str, str, str]]:
    if ours.mode != theirs.mode:
        yield "mode", stat.filemode(ours.mode), stat.filemode(theirs.mode)
    for key in ("uid", "gid", "mtime", "size", "rdev", "nlink"):
        if getattr(ours, key) != getattr(theirs, key):
            yield key, str(getattr(ours, key)), str(getattr(theirs, key))
    if ours.target != theirs.target:
        yield "target", show_path(ours.target), show_path(theirs.target)
    if sorted(ours.xattrs) != sorted(theirs.xattrs):
        yield "xattrs", _xattrs(ours), _xattrs(theirs)
    if ours.extents != theirs.extents:
        yield "data", f"{len(ours.extents)} pieces", f"{len(theirs.extents)} pieces elsewhere"


def _xattrs(node: Node) -> str:
    return show_path(b", ".join(key + b"=" + value.hex().encode() for key, value in sorted(node.xattrs))) or "none"


def _text(value: object) -> str:
    return show_path(str(value).encode())
