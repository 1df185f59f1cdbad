"""Sample indexes and a comparable dump of one."""

from __future__ import annotations

import copy
import hashlib
import stat
from array import array
from pathlib import Path
from typing import Any

from shim.index import codec, container
from shim.index.model import WINDOW_SIZE, Compression, Extent, Index, Layer, Node, Restart, SpanTable, Tree

ASSETS = Path(__file__).parents[1] / "assets" / "index-v1"
NS = 10**9


def digest(text: str) -> str:
    return "sha256:" + hashlib.sha256(text.encode()).hexdigest()


def window(seed: int, step: int) -> bytes:
    """A sparse window: short runs, `step` apart, of text and of single bytes."""
    data = bytearray(WINDOW_SIZE)
    for at in range(seed % step, WINDOW_SIZE - 16, step):
        run = hashlib.sha256(f"{seed} {at}".encode()).digest()[: 3 + at % 13]
        data[at : at + len(run)] = run
    return bytes(data)


def directory(**more: Any) -> Node:
    return Node(stat.S_IFDIR | 0o755, children={}, **more)


def file(size: int = 0, layer: int = 0, offset: int = 0, mode: int = 0o644, **more: Any) -> Node:
    extents = (Extent(0, layer, offset, size),) if size else ()
    return Node(stat.S_IFREG | mode, size=size, extents=extents, **more)


def symlink(target: bytes, **more: Any) -> Node:
    return Node(stat.S_IFLNK | 0o777, size=len(target), target=target, **more)


def put(tree: Tree, path: str | bytes, node: Node) -> Node:
    """Set `path` to `node`, making directories."""
    here = tree.root
    *parents, last = (path.encode() if isinstance(path, str) else path).strip(b"/").split(b"/")
    for name in parents:
        assert here.children is not None
        here = here.children.setdefault(name, directory(mtime=1_700_000_000 * NS))
    assert here.children is not None
    here.children[last] = node
    return node


def spans(size: int, usize: int, points: list[tuple[int, int, int, Restart, bytes]]) -> SpanTable:
    """A table from (ustart, cstart, bits, kind, window) rows."""
    table = SpanTable(array("Q", [row[0] for row in points] + [usize]), array("Q", [row[1] for row in points] + [size]))
    for ustart, cstart, bits, kind, sparse in points:
        table.bits.append(bits)
        table.kinds.append(kind)
        table.windows.append(sparse)
        table.digests += hashlib.sha256(f"{size} {ustart} {cstart}".encode()).digest()
    return table


def sample_layers() -> list[Layer]:
    """gzip with every kind of span, plain tar, zstd, and an empty gzip layer."""
    stream, deflate, go_on = Restart.STREAM, Restart.DEFLATE, Restart.CONTINUE
    gzip = spans(
        3_000_000,
        9_000_000,
        [
            (0, 0, 0, stream, b""),
            (2_100_000, 700_001, 3, deflate, window(1, 257)),
            (4_200_000, 1_400_002, 0, deflate, b""),
            (5_000_000, 1_700_000, 7, deflate, bytes(WINDOW_SIZE)),
            (6_000_000, 1_700_000, 0, go_on, b""),
            (8_000_000, 2_700_000, 0, stream, b""),
        ],
    )
    plain = spans(20480, 20480, [(0, 0, 0, stream, b""), (16384, 16384, 0, stream, b"")])
    zstd = spans(50_000, 1_000_000, [(0, 0, 0, stream, b""), (500_000, 0, 0, go_on, b"")])
    tar = "application/vnd.oci.image.layer.v1.tar"
    empty = SpanTable(array("Q", [0]), array("Q", [29]))
    return [
        Layer(digest("a"), digest("A"), 3_000_000, 9_000_000, tar + "+gzip", Compression.GZIP, gzip),
        Layer(digest("b"), digest("b"), 20480, 20480, tar, Compression.NONE, plain),
        Layer(digest("c"), digest("C"), 50_000, 1_000_000, tar + "+zstd", Compression.ZSTD, zstd),
        Layer(digest("d"), digest("D"), 29, 0, tar + "+gzip", Compression.GZIP, empty),
    ]


def sample_tree() -> Tree:
    """Everything a tree can have, in few entries."""
    tree = Tree(directory(mtime=1_700_000_000 * NS))
    caps = (b"security.capability", bytes.fromhex("0100000200200000000000000000000000000000"))
    put(tree, "dev/null", Node(stat.S_IFCHR | 0o666, rdev=(1, 3)))
    put(tree, "dev/loop", Node(stat.S_IFBLK | 0o660, gid=6, rdev=(4095, 1048575)))
    put(tree, "dev/pipe", Node(stat.S_IFIFO | 0o600, mtime=-1))
    put(tree, "dev/sock", Node(stat.S_IFSOCK | 0o755, uid=4294967294, gid=4294967294))
    put(tree, "proc", directory())
    put(tree, "sys", directory())
    put(tree, "tmp", Node(stat.S_IFDIR | 0o1777, children={}, mtime=1_700_000_001 * NS + 123456789))
    put(tree, "bin", symlink(b"usr/bin"))
    put(tree, "usr/bin/su", file(70000, 0, 1024, 0o4755, mtime=1_600_000_000 * NS))
    put(tree, "usr/bin/ping", file(512, 0, 72704, 0o755, xattrs=(caps,), mtime=1_600_000_000 * NS))
    acl = (b"system.posix_acl_access", b"\2\0\0\0"), (b"user.note", b""), (b"trusted.x", b"\0" * 9)
    put(tree, "usr/bin/new", file(100, 1, 512, xattrs=tuple(sorted(acl)), mtime=-5 * NS + 7))
    linked = put(tree, "usr/lib/a", file(4096, 0, 80000 * 100))
    put(tree, "usr/lib/b/also", linked)
    put(tree, "usr/share/link", put(tree, "usr/share/target", symlink("/ümlaut".encode())))
    put(tree, b"usr/share/\xff\n", file(mtime=(1 << 62) * NS))
    put(tree, "usr/share/" + "n" * 255, file(1, 2, 999_999))
    sparse = Extent(512, 0, 2_000_000, 100), Extent(5000, 0, 2_000_100, 24), Extent(1 << 40, 1, 1000, 1)
    put(tree, "var/sparse", Node(stat.S_IFREG | 0o600, size=(1 << 41) + 1, extents=sparse))
    put(tree, "var/hole", Node(stat.S_IFREG | 0o600, size=(1 << 63) - 1))
    put(tree, "var/tail", Node(stat.S_IFREG | 0o600, size=4096, extents=(Extent(0, 0, 512, 512),)))
    tree.count_links()
    return tree


def sample() -> Index:
    config = b'{"architecture": "amd64",\n "os":"linux", "config": {"Env": ["A=\xc3\xbc"]}}\n'
    image = "registry.example:5000/team/app_x/small:v1.0"
    return Index(image, digest("manifest"), "linux/arm64/v8", config, sample_layers(), sample_tree())


def profiled() -> Index:
    """The sample with a start profile, spans of two layers in no order."""
    index = sample()
    index.profile = ((0, 2), (1, 0), (0, 0), (0, 3), (0, 1))
    return index


def smallest() -> Index:
    """No layers at all (a `FROM scratch` image)."""
    tree = Tree(directory())
    tree.count_links()
    return Index("localhost/scratch", digest("0"), "linux/amd64", b"", [], tree, checkpoint_mib=4)


def dump(index: Index) -> dict[str, Any]:
    """All that an index says, as JSON: two indexes are equal if their dumps are. Names that share an inode show it."""
    names: dict[int, str] = {}
    entries = []
    for path, node in index.tree.walk():
        text = path.decode("utf-8", "backslashreplace")
        entry: dict[str, Any] = {"path": text}
        first = names.setdefault(id(node), text)
        if first != text:
            entry["same_as"] = first
        for key in ("mode", "uid", "gid", "mtime", "size", "nlink"):
            entry[key] = getattr(node, key)
        entry["rdev"], entry["target"] = list(node.rdev), node.target.hex()
        entry["xattrs"] = sorted([name.hex(), value.hex()] for name, value in node.xattrs)
        entry["extents"] = [list(extent) for extent in node.extents]
        entry["dir"] = node.children is not None
        entries.append(entry)
    layers = []
    for layer in index.layers:
        table = layer.spans
        rows = [
            [
                table.ustart(i),
                table.cstart(i),
                table.bit(i),
                table.kind(i),
                table.digest(i).hex(),
                _sum(table.window(i)),
            ]
            for i in range(table.count)
        ]
        row = {key: getattr(layer, key) for key in ("digest", "diff_id", "size", "uncompressed_size", "media_type")}
        ends = [table.ustart(table.count), table.cstart(table.count)]
        layers.append({**row, "compression": layer.compression.name, "spans": rows, "ends": ends})
    head = {key: getattr(index, key) for key in ("image", "digest", "platform", "checkpoint_mib")}
    profile = {"profile": [list(item) for item in index.profile]} if index.profile else {}
    return {**head, **profile, "config": index.config.hex(), "layers": layers, "tree": entries}


def _sum(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest() if data else ""


def pack(sections: dict[bytes, bytes]) -> bytes:
    """A file of raw sections, all hashes right, nothing else checked."""
    flags = {codec.PROFILE: 0}
    return container.pack([(tag, flags.get(tag, container.MANDATORY), raw) for tag, raw in sections.items()])


def good_files() -> dict[str, tuple[Index, bytes]]:
    """name → (what it means, bytes)."""
    index = sample()
    data = codec.encode(index)
    sections = [(tag, container.MANDATORY, raw) for tag, raw in codec.raw_sections(index).items()]
    return {
        "sample": (index, data),
        "scratch": (smallest(), codec.encode(smallest())),
        "start-profile": (profiled(), codec.encode(profiled())),
        "behind-go": (copy.copy(index), container.GO_MAGIC + b"\1" + bytes(range(90)) + data),
        "optional-section": (index, container.pack([(b"note", 0, b"skip me"), *sections])),
    }
