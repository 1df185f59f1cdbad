"""From a real registry to an index and back again by `verify`: what is streamed, what is believed, what is refused."""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from shim.errors import IntegrityError, LayerError, NotFoundError, RegistryError, ShimError, UsageError
from shim.index.build import build_index
from shim.index.model import Compression, Index, Node
from shim.index.verify import verify_index
from shim.registry.ref import ImageRef
from shim.thin.content import Spool
from tests.support.ocitar import DIR, LINK, SYM, Entry, gzip_bytes, multi_member, tar, zstd
from tests.support.registry import OCI, Registry, make_client, sha256
from tests.support.smallimage import noise, text

BASE = tar(
    [
        Entry(b"usr", DIR, 0o755),
        Entry(b"usr/big", data=text(1, 3_000_000)),
        Entry(b"usr/noise", data=noise(2, 2_500_000)),
        Entry(b"usr/link", LINK, target=b"usr/big"),
        Entry(b"bin", SYM, 0o777, target=b"usr"),
        Entry(b"gone", data=b"1"),
    ]
)
UPPER = tar([Entry(b".wh.gone"), Entry(b"new", mode=0o4755, data=b"n" * 1000, xattrs={"security.capability": b"\1"})])
EMPTY = tar([])


@pytest.fixture(scope="module")
def registry() -> Iterator[Registry]:
    with Registry() as running:
        yield running


def parse(registry: Registry, name: str, tag: str = "v1") -> ImageRef:
    return ImageRef.parse(registry.ref(name, tag), local_paths=False)


def push(registry: Registry, name: str, *blobs: bytes, raw: tuple[bytes, ...] = (), **more: object) -> ImageRef:
    """An image of these layer blobs; `raw` are their uncompressed bytes where they are not gzip or plain."""
    ids = [sha256(layer) for layer in raw] if raw else None
    registry.push_image(name, "v1", blobs, diff_ids=ids, **more)  # type: ignore[arg-type]
    return parse(registry, name)


def test_an_image_of_all_compressions(registry: Registry, tmp_path: Path) -> None:
    raw = (BASE, UPPER, EMPTY, BASE, b"", UPPER)
    blobs = (gzip_bytes(BASE), zstd(UPPER), gzip_bytes(EMPTY), BASE, b"", multi_member(UPPER))
    ref = push(registry, "all", *blobs, raw=raw)
    client = make_client(tmp_path)
    index = build_index(ref, client, platform="linux/amd64", checkpoint_mib=1)

    kinds = [Compression.GZIP, Compression.ZSTD, Compression.GZIP, Compression.NONE, Compression.NONE, Compression.GZIP]
    assert [layer.compression for layer in index.layers] == kinds
    assert [layer.diff_id for layer in index.layers] == [sha256(layer) for layer in raw]
    assert [layer.digest for layer in index.layers] == [sha256(blob) for blob in blobs]
    assert [layer.size for layer in index.layers] == list(map(len, blobs))
    assert [layer.uncompressed_size for layer in index.layers] == list(map(len, raw))
    status, config = registry.get(f"/v2/all/blobs/{config_digest(registry, 'all')}", "all")
    assert (status, index.config) == (200, config)
    assert (index.image, index.platform, index.checkpoint_mib) == (registry.ref("all", "v1"), "linux/amd64", 1)
    assert index.digest == sha256(registry.get("/v2/all/manifests/v1", "all")[1])

    spans = index.layers[0].spans
    assert spans.count > 3
    for i in range(spans.count):
        assert spans.digest(i) == hashlib.sha256(BASE[spans.ustart(i) : spans.ustart(i + 1)]).digest()
    tree = dict(index.tree.walk())
    assert set(tree) == {b"/", b"/usr", b"/usr/big", b"/usr/noise", b"/usr/link", b"/bin", b"/new"}
    assert tree[b"/usr/big"].extents[0].layer == 3
    assert content(tree[b"/usr/big"], raw) == text(1, 3_000_000)
    assert tree[b"/usr/link"] is tree[b"/usr/big"]


def config_digest(registry: Registry, name: str) -> str:
    return str(json.loads(registry.get(f"/v2/{name}/manifests/v1", name)[1])["config"]["digest"])


def content(node: Node, layers: tuple[bytes, ...]) -> bytes:
    return b"".join(layers[layer][offset : offset + length] for _, layer, offset, length in node.extents)


def test_each_layer_is_streamed_once_even_when_named_twice(registry: Registry, tmp_path: Path) -> None:
    base, upper = gzip_bytes(BASE), gzip_bytes(UPPER)
    ref = push(registry, "twice", base, upper, base)
    client = make_client(tmp_path)
    seen: list[tuple[int, int, int]] = []
    index = build_index(ref, client, progress=lambda *what: seen.append(what))
    total = len(base) + len(upper)
    blobs = client.counters.snapshot()[(registry.host, "blob")]
    assert (blobs.requests, blobs.bytes) == (2, total)
    assert index.layers[0] == index.layers[2]
    assert b"/gone" in dict(index.tree.walk())
    assert dict(index.tree.walk())[b"/usr/big"].extents[0].layer == 2
    assert [done for _, done, _ in seen] == sorted(done for _, done, _ in seen)
    assert seen[-1][1:] == (total, total)
    assert {layer for layer, _, _ in seen} == {0, 1}


def test_the_index_is_the_same_every_time(registry: Registry, tmp_path: Path) -> None:
    ref = push(registry, "same", gzip_bytes(BASE), gzip_bytes(UPPER))
    first, second = (build_index(ref, make_client(tmp_path)) for _ in range(2))
    assert first.layers == second.layers
    assert list(map(shown, first.tree.walk())) == list(map(shown, second.tree.walk()))


def shown(item: tuple[bytes, Node]) -> tuple[object, ...]:
    path, node = item
    return path, node.mode, node.mtime, node.nlink, node.extents, node.xattrs


# --- what is refused ------------------------------------------------------------------------------------------------


def storage_of(registry: Registry, digest: str) -> Path:
    return next((registry.storage / "docker/registry/v2/blobs/sha256" / digest[7:9] / digest[7:]).glob("data"))


def flip(blob: bytes) -> bytes:
    return blob[:1000] + bytes([blob[1000] ^ 1]) + blob[1001:]


@pytest.mark.parametrize("damage", [flip, lambda blob: blob[:-600] + b"Z" * 600], ids=["bit", "end"])
@pytest.mark.parametrize("compress", [gzip_bytes, bytes], ids=["gzip", "plain"])
def test_wrong_bytes_are_refused_by_layer(
    registry: Registry, tmp_path: Path, damage: Callable[[bytes], bytes], compress: Callable[[bytes], bytes]
) -> None:
    good = gzip_bytes(EMPTY)
    bad = compress(tar([Entry(b"f", data=noise(len(repr(damage)), 200_000))], record=512))
    ref = push(registry, "damaged", good, bad)
    stored = storage_of(registry, sha256(bad))
    stored.write_bytes(damage(bad))
    try:
        with pytest.raises((IntegrityError, LayerError), match=rf"layer 2 of 2 \({sha256(bad)[:19]}\)"):
            build_index(ref, make_client(tmp_path))
    finally:
        stored.write_bytes(bad)
    assert build_index(ref, make_client(tmp_path)).layers[1].digest == sha256(bad)


def test_a_damaged_mirror_is_replaced_by_the_registry(registry: Registry, tmp_path: Path) -> None:
    blob = gzip_bytes(tar([Entry(b"mirrored", data=noise(9, 300_000))]))
    ref = push(registry, "mirrored", blob)
    with Registry() as mirror:
        mirror.push_image("mirrored", "v1", [blob])
        storage_of(mirror, sha256(blob)).write_bytes(flip(blob))
        settings = {registry.host: {"mirrors": [{"host": f"http://{mirror.host}"}]}}
        seen: list[int] = []
        index = build_index(ref, make_client(tmp_path, settings), progress=lambda *what: seen.append(what[1]))
    assert index.layers[0].digest == sha256(blob)
    assert seen[-1] == len(blob)  # what was read in vain is taken back


def test_files_of_a_damaged_mirror_are_the_registrys(registry: Registry, tmp_path: Path) -> None:
    """Thin images fetch some files' spans only. Where nobody has right ones, the layer is named."""
    data = noise(10, 300_000)
    blob = gzip_bytes(tar([Entry(b"file", data=data)]))
    ref = push(registry, "spooled", blob)
    index = build_index(ref, make_client(tmp_path))
    node = (index.tree.root.children or {})[b"file"]
    with Registry() as mirror:
        mirror.push_image("spooled", "v1", [blob])
        storage_of(mirror, sha256(blob)).write_bytes(flip(blob))
        settings = {registry.host: {"mirrors": [{"host": f"http://{mirror.host}"}]}}
        with open(tmp_path / "spool", "w+b") as file:
            spool = Spool(file)
            spool.fetch(index, ref, make_client(tmp_path, settings), [node])
            assert spool.open(node).read() == data
        storage_of(registry, sha256(blob)).write_bytes(flip(blob))
        with open(tmp_path / "spool", "w+b") as file, pytest.raises(ShimError, match=r"^layer 1 of 1 "):
            Spool(file).fetch(index, ref, make_client(tmp_path, settings), [node])


def test_the_same_tar_in_other_bytes_is_refused(registry: Registry, tmp_path: Path) -> None:
    blob = gzip_bytes(UPPER)
    ref = push(registry, "other-bytes", blob)
    storage_of(registry, sha256(blob)).write_bytes(blob[:4] + b"time" + blob[8:])  # RFC 1952: MTIME, in no checksum
    with pytest.raises(IntegrityError, match=r"layer 1 of 1 .* bytes hash to"):
        build_index(ref, make_client(tmp_path))
    storage_of(registry, sha256(blob)).write_bytes(blob)


def test_a_diff_id_that_is_wrong_is_refused_by_layer(registry: Registry, tmp_path: Path) -> None:
    ref = push(registry, "wrong-id", gzip_bytes(BASE), gzip_bytes(UPPER), raw=(BASE, BASE))
    with pytest.raises(IntegrityError, match=r"layer 2 of 2 .* the config says sha256:"):
        build_index(ref, make_client(tmp_path))


@pytest.mark.parametrize("rootfs", [None, {}, {"diff_ids": "x"}, {"diff_ids": [1]}, [], {"diff_ids": []}])
def test_a_config_without_sound_diff_ids_is_refused(registry: Registry, tmp_path: Path, rootfs: object) -> None:
    ref = push(registry, "no-ids", gzip_bytes(EMPTY), config={"rootfs": rootfs})
    with pytest.raises(RegistryError, match="image's config"):
        build_index(ref, make_client(tmp_path))


@pytest.mark.parametrize(
    ("kind", "why"),
    [
        (OCI + "layer.v1.tar+gzip+encrypted", "encrypted"),
        ("application/vnd.cncf.helm.chart.content.v1+json", "not a file system layer"),
    ],
)
def test_layers_that_are_none_are_refused(registry: Registry, tmp_path: Path, kind: str, why: str) -> None:
    ref = push(registry, "no-layer", gzip_bytes(EMPTY), layer_type=kind)
    with pytest.raises(LayerError, match=why):
        build_index(ref, make_client(tmp_path))


@pytest.mark.parametrize(
    ("layer", "why"),
    [
        (tar([Entry(b"../out")]), "leaves the root"),
        (BASE[: len(BASE) // 2], "ends too early"),
        (b"no tar at all" * 100, "not a valid tar archive"),
        (b"BZh91AY&SY", "bzip2"),
    ],
)
def test_layers_no_engine_would_unpack_are_refused_by_layer(
    registry: Registry, tmp_path: Path, layer: bytes, why: str
) -> None:
    ref = push(registry, "no-tar", layer, raw=(layer,))
    with pytest.raises(LayerError, match=rf"layer 1.*{why}"):
        build_index(ref, make_client(tmp_path))


def test_a_missing_layer_and_a_wrong_spacing(registry: Registry, tmp_path: Path) -> None:
    blob = gzip_bytes(tar([Entry(b"only-here")]))
    ref = push(registry, "missing", blob)
    storage_of(registry, sha256(blob)).unlink()
    with pytest.raises(NotFoundError):
        build_index(ref, make_client(tmp_path))
    for spacing in (0, 65):
        with pytest.raises(UsageError):
            build_index(ref, make_client(tmp_path), checkpoint_mib=spacing)


def test_an_error_ends_all_work(registry: Registry, tmp_path: Path) -> None:
    """As Ctrl-C does: what is raised in the middle comes out, and no thread is left."""
    blobs = [tar([Entry(b"f%d" % n, data=noise(n, size))]) for n, size in enumerate((16_000_000, 64_000_000))]
    ref = push(registry, "many", *blobs)
    client = make_client(tmp_path)

    def progress(layer: int, done: int, total: int) -> None:
        if layer == 0 and done > total // 40:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build_index(ref, client, progress=progress)
    for thread in threading.enumerate():
        if thread.name.startswith("layer-"):
            thread.join(10)
            assert not thread.is_alive()
    assert client.counters.snapshot()[(registry.host, "blob")].bytes < 0.7 * sum(map(len, blobs))


def test_what_no_container_may_see_is_dropped_with_one_warning(registry: Registry, tmp_path: Path) -> None:
    layer = tar([Entry(b"d", DIR, 0o755, xattrs={"trusted.overlay.opaque": b"y", "user.ok": b"1"})])
    said: list[str] = []
    index = build_index(push(registry, "xattrs", layer), make_client(tmp_path), warn=said.append)
    assert dict(index.tree.walk())[b"/d"].xattrs == ((b"user.ok", b"1"),)
    assert said == ["left out, since no container may see it: 1 overlay xattrs"]


# --- verify ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def indexed(registry: Registry, tmp_path: Path) -> Index:
    ref = push(registry, "verified", gzip_bytes(BASE), gzip_bytes(UPPER))
    return build_index(ref, make_client(tmp_path), checkpoint_mib=1)


def test_verify_finds_nothing_in_a_true_index(indexed: Index, tmp_path: Path) -> None:
    assert verify_index(indexed, make_client(tmp_path)) == []


def _bad_digest(index: Index) -> None:
    index.layers[0].spans.digests[40] ^= 1


def _bad_border(index: Index) -> None:
    index.layers[0].spans.ustarts[2] += 512


def _bad_point(index: Index) -> None:
    index.layers[0].spans.cstarts[1] += 1


def _bad_window(index: Index) -> None:
    window = bytearray(index.layers[0].spans.windows[1] or bytes(32768))
    window[-1] ^= 1
    index.layers[0].spans.windows[1] = bytes(window)


def _bad_config(index: Index) -> None:
    index.config += b" "


def _bad_diff_id(index: Index) -> None:
    index.layers[1].diff_id = sha256(b"")


def _bad_mode(index: Index) -> None:
    dict(index.tree.walk())[b"/new"].mode ^= 0o4000


def _bad_target(index: Index) -> None:
    dict(index.tree.walk())[b"/bin"].target = b"sbin"


def _bad_data(index: Index) -> None:
    node = dict(index.tree.walk())[b"/new"]
    node.extents = (node.extents[0]._replace(offset=0),)


def _more_names(index: Index) -> None:
    root = index.tree.root.children
    assert root is not None
    root[b"evil"] = Node(0o100755)


def _fewer_names(index: Index) -> None:
    root = index.tree.root.children
    assert root is not None
    del root[b"new"]


def _split_link(index: Index) -> None:
    usr = dict(index.tree.walk())[b"/usr"].children
    assert usr is not None
    old = usr[b"link"]
    usr[b"link"] = Node(old.mode, old.uid, old.gid, old.mtime, old.size, extents=old.extents, nlink=2)


@pytest.mark.parametrize(
    ("tamper", "why"),
    [
        (_bad_digest, r"layer 1 of 2 \(.*\): span 1 \(at byte \d+\) has another SHA-256"),
        (_bad_border, "layer 1 of 2 .* span 1 covers other bytes"),
        (_bad_point, "layer 1 of 2 .* span 1 .* another restart point"),
        (_bad_window, "layer 1 of 2 .* span 1 .* another restart point"),
        (_bad_config, "another image config"),
        (_bad_diff_id, "layer 2 of 2 .* diff_id is sha256:.* in the index"),
        (_bad_mode, "^/new: mode is -rwxr-xr-x in the index and -rwsr-xr-x in the registry"),
        (_bad_target, "^/bin: target is sbin in the index and usr in the registry"),
        (_bad_data, "^/new: data"),
        (_more_names, "^/evil: is in the index and not"),
        (_fewer_names, "^/new: is missing in the index"),
        (_split_link, "^/usr/(big|link): "),
    ],
)
def test_verify_names_what_differs(indexed: Index, tmp_path: Path, tamper: Callable[[Index], None], why: str) -> None:
    tamper(indexed)
    found = verify_index(indexed, make_client(tmp_path))
    assert found
    assert re.search(why, found[0]), found


def test_verify_without_the_manifest_or_with_other_layers(indexed: Index, tmp_path: Path) -> None:
    client = make_client(tmp_path)
    layers = indexed.layers
    indexed.layers = layers[:1]
    assert verify_index(indexed, client) == ["the index has 1 layers, the image 2"]
    indexed.layers = layers
    indexed.digest = sha256(b"another")
    with pytest.raises(ShimError):
        verify_index(indexed, client)
