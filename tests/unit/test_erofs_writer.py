"""The EROFS writer's bytes, read back by a reader of its own. tests/mounts has the kernel read them."""

from __future__ import annotations

import io
import random
import stat
import struct
import time
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shim.erofs import chunks
from shim.erofs import format as ondisk
from shim.erofs.writer import ImageInfo, write_image
from shim.errors import IndexFormatError
from shim.index.model import Extent, Node, Tree
from tests.unit.erofs_reader import Image

DIR, REG, LNK = stat.S_IFDIR, stat.S_IFREG, stat.S_IFLNK


def folder(children: dict[bytes, Node] | None = None, mode: int = 0o755) -> Node:
    return Node(DIR | mode, children={} if children is None else children)


def file(size: int, *extents: Extent, mode: int = 0o644) -> Node:
    return Node(REG | mode, size=size, extents=extents)


def build(root: Node, devices: list[bytes] | None = None, **options: int) -> tuple[Image, ImageInfo]:
    devices = devices or []
    out = io.BytesIO()

    def read_layer(layer: int, offset: int, length: int) -> bytes:
        return devices[layer][offset : offset + length]

    info = write_image(Tree(root), [len(device) for device in devices], out, read_layer, **options)
    padded = [device + bytes(-len(device) % 512) for device in devices]
    assert info.size == len(out.getvalue())
    return Image(out.getvalue(), padded), info


def refused(root: Node, sizes: list[int] | None = None) -> str:
    with pytest.raises(IndexFormatError) as caught:
        write_image(Tree(root), sizes or [], io.BytesIO())
    return str(caught.value)


def test_all_kinds_and_their_attributes() -> None:
    data = bytes(range(256)) * 8
    shared = file(700, Extent(0, 0, 512, 700))
    root = folder(
        {
            b"a": Node(REG | 0o4755, 1, 2**32 - 2, 1_600_000_000_123_456_789, 700, extents=(Extent(0, 0, 512, 700),)),
            b"empty": file(0),
            b"link": Node(LNK | 0o777, target=b"a", size=1),
            b"chr": Node(stat.S_IFCHR | 0o600, rdev=(4095, 2**20 - 1)),
            b"blk": Node(stat.S_IFBLK | 0o600, rdev=(8, 300)),
            b"fifo": Node(stat.S_IFIFO | 0o600),
            b"sock": Node(stat.S_IFSOCK | 0o600),
            b"old": Node(REG | 0o600, mtime=-1_500_000_000),
            b"d": folder({b"hard": shared, b"e": folder()}, 0o1777),
            b"hard": shared,
        }
    )
    image, info = build(root, [data])
    found = image.walk()
    assert set(found) == {b"/", b"/a", b"/empty", b"/link", b"/chr", b"/blk", b"/fifo", b"/sock", b"/old", b"/d"} | {
        b"/d/hard",
        b"/d/e",
        b"/hard",
    }
    a = found[b"/a"]
    assert (a.mode, a.uid, a.gid, a.mtime, a.size, a.nlink) == (
        REG | 0o4755,
        1,
        2**32 - 2,
        1_600_000_000_123_456_789,
        700,
        1,
    )
    assert image.read(a) == data[512:1212]
    assert image.read(found[b"/empty"]) == b""
    assert image.flat(found[b"/link"]) == b"a"
    assert found[b"/chr"].union == (2**20 - 1) & 0xFF | 4095 << 8 | ((2**20 - 1) & ~0xFF) << 12
    assert found[b"/blk"].union == 300 & 0xFF | 8 << 8 | (300 & ~0xFF) << 12
    assert found[b"/old"].mtime == -1_500_000_000
    assert found[b"/hard"].nid == found[b"/d/hard"].nid
    assert (found[b"/hard"].nlink, found[b"/d"].nlink, found[b"/"].nlink) == (2, 3, 3)
    kinds = {name: kind for name, _, kind in image.entries(found[b"/"])}
    assert [kinds[n] for n in (b"a", b"d", b"chr", b"blk", b"fifo", b"sock", b"link")] == [1, 2, 3, 4, 5, 6, 7]
    assert (image.inos, info.inodes, info.entries) == (12, 12, 12)
    assert image.device_blocks == [4]


def test_same_tree_same_bytes() -> None:
    def make() -> bytes:
        out = io.BytesIO()
        write_image(Tree(folder({b"%d" % i: file(0) for i in range(99)})), [512], out)
        return out.getvalue()

    assert make() == make()
    other = io.BytesIO()
    write_image(Tree(folder({b"%d" % i: file(0, mode=0o600) for i in range(99)})), [512], other)
    assert Image(other.getvalue(), []).uuid != Image(make(), []).uuid


@pytest.mark.parametrize("count", [0, 1, 18, 19, 20, 21, 22, 40, 5000])
def test_directories_of_every_size(count: int) -> None:
    root = folder({b"n%05d" % i + b"x" * (i % 250): file(0) for i in range(count)})
    image, _ = build(root)
    assert len(image.walk()) == count + 1


def test_longest_names_and_targets() -> None:
    root = folder(
        {bytes([65 + i]) * 255: Node(LNK | 0o777, target=b"t" * n) for i, n in enumerate((1, 480, 481, 512, 4095))}
    )
    image, _ = build(root)
    found = image.walk()
    assert [len(image.flat(found[b"/" + bytes([65 + i]) * 255])) for i in range(5)] == [1, 480, 481, 512, 4095]
    assert all(set(image.flat(inode)) == {ord("t")} for path, inode in found.items() if path != b"/")


def test_inline_data_never_crosses_a_block() -> None:
    rng = random.Random(7)
    children: dict[bytes, Node] = {}
    for i in range(3000):
        xattrs = ((b"user.k", bytes(rng.randrange(40))),) if rng.random() < 0.3 else ()
        target = b"t" * rng.randrange(1, 600)
        children[b"%05d" % i] = Node(LNK | 0o777, target=target, xattrs=xattrs)
    image, _ = build(folder(children))
    found = image.walk()  # Image.flat checks it
    assert all(image.flat(found[b"/" + name]) == node.target for name, node in children.items())
    assert all(found[b"/" + name].xattrs == dict(node.xattrs) for name, node in children.items())


def test_xattrs() -> None:
    attrs = (
        (b"user.mime", b"text/plain"),
        (b"security.capability", bytes(20)),
        (b"trusted.x", b""),
        (b"system.posix_acl_access", b"acl"),
        (b"system.posix_acl_default", b"d" * 300),
        (b"security.selinux", b"s" * 1000),
    )
    node = Node(REG | 0o644, xattrs=(*attrs, (b"com.apple.quarantine", b"q"), (b"user.", b"no name")))
    image, info = build(
        folder({b"f": node, b"g": Node(REG | 0o644, size=3, extents=(Extent(0, 0, 0, 3),), xattrs=attrs)}), [b"abc"]
    )
    found = image.walk()
    assert found[b"/f"].xattrs == dict(attrs)
    assert found[b"/g"].xattrs == dict(attrs)
    assert image.read(found[b"/g"]) == b"abc"
    assert info.dropped_xattrs == 2


def test_deep_tree_needs_no_recursion() -> None:
    root = here = folder()
    for _ in range(30_000):
        assert here.children is not None
        here.children[b"d"] = here = folder()
    _, info = build_only(root)
    assert info.inodes == 30_001


def build_only(root: Node) -> tuple[bytes, ImageInfo]:
    out = io.BytesIO()
    info = write_image(Tree(root), [], out)
    return out.getvalue(), info


def test_root_number_fits_with_most_devices() -> None:
    image, _ = build(folder({b"f": file(5, Extent(0, 4095, 512, 5))}), [b"x" * 1024] * 4096)
    assert image.root_nid < 1 << 16
    assert image.read(image.walk()[b"/f"]) == b"xxxxx"
    assert "layers" in refused(folder(), [512] * 4097)


def test_a_contiguous_file_is_one_chunk() -> None:
    device = bytes(10_000 * 512)
    image, info = build(
        folder({b"%d" % n: file(n, Extent(0, 0, 1024, n)) for n in (1, 512, 513, 70_000, 5_000_000)}), [device]
    )
    for path, inode in image.walk().items():
        if path != b"/":
            chunk, rows = image.chunks(inode)
            assert rows == [(1, 2)]
            assert inode.size <= chunk < max(2 * inode.size, 1024)
    assert info.inline_bytes == 0


def test_files_beyond_a_terabyte_have_two_chunks() -> None:
    size = (1 << 40) + 5
    node = chunks.plan(size, [Extent(0, 0, 512, size)], [(1 << 41) - 512], 0)
    assert node.bits == 31
    assert bytes(node.indexes) == struct.pack("<HHIHHI", 0, 1, 1, 0, 1, (1 << 31) + 1)
    out = io.BytesIO()
    write_image(Tree(folder({b"big": file(size, Extent(0, 0, 512, size))})), [(1 << 41) - 512], out)
    image = Image(out.getvalue(), [])
    assert image.chunks(image.walk()[b"/big"])[1] == [(1, 1), (1, (1 << 31) + 1)]


def test_holes_are_null_addresses() -> None:
    image, info = build(
        folder({b"hole": file(1 << 40), b"s": file(1 << 33, Extent(1 << 32, 0, 512, 1 << 20))}), [bytes(2 << 20)]
    )
    found = image.walk()
    assert image.chunks(found[b"/hole"]) == (1 << 40, [(0, 0xFFFFFFFF)])
    chunk, rows = image.chunks(found[b"/s"])
    assert chunk == 1 << 20
    assert [row for row in rows if row[1] != 0xFFFFFFFF] == [(1, 1)]
    assert rows[4096] == (1, 1)
    assert info.inline_bytes == 0


def test_one_small_piece_of_a_huge_file_costs_little() -> None:
    """512-byte chunks would need 16 GiB of indexes here: copying a larger chunk is cheaper."""
    _, info = build(folder({b"f": file(1 << 40, Extent(512 * 3, 0, 512, 512))}), [bytes(2048)])
    assert info.size < 16 << 20


@st.composite
def sparse_file(draw: st.DrawFn) -> tuple[Node, list[bytes], bytes]:
    rng = random.Random(draw(st.integers(0, 2**32)))
    unit = draw(st.sampled_from([1, 511, 512, 1024, 4096]))
    devices = [rng.randbytes(40_000), rng.randbytes(20_000)]
    content = bytearray()
    extents = []
    for kind in draw(st.lists(st.sampled_from("hda"), min_size=1, max_size=12)):
        length = rng.randrange(1, 8) * unit
        if kind == "h":
            content += bytes(length)
            continue
        layer = rng.randrange(2)
        length = min(length, 19_000)
        offset = rng.randrange(0, len(devices[layer]) - length)
        offset = offset if kind == "d" else offset // 512 * 512
        extents.append(Extent(len(content), layer, offset, length))
        content += devices[layer][offset : offset + length]
    return file(len(content), *extents), devices, bytes(content)


@settings(max_examples=300, deadline=None)
@given(sparse_file())
def test_any_extents_give_the_right_bytes(case: tuple[Node, list[bytes], bytes]) -> None:
    node, devices, content = case
    image, info = build(folder({b"f": node, b"tail": Node(LNK | 0o777, target=b"t" * 600)}), devices)
    found = image.walk()
    assert image.read(found[b"/f"]) == content
    assert image.flat(found[b"/tail"]) == b"t" * 600
    assert info.inline_bytes <= 2 * len(content) + 1024


@pytest.mark.parametrize(
    ("node", "words"),
    [
        (file(600, Extent(0, 0, 0, 700)), "outside the file"),
        (file(600, Extent(0, 1, 0, 600)), "outside its layer"),
        (file(600, Extent(0, -1, 0, 600)), "outside its layer"),
        (file(600, Extent(0, 0, 4096 - 512, 600)), "outside its layer"),
        (file(600, Extent(0, 0, -512, 600)), "out of order"),
        (file(600, Extent(0, 0, 0, 300), Extent(200, 0, 0, 300)), "overlap"),
        (file(600, Extent(300, 0, 0, 300), Extent(0, 0, 0, 300)), "out of order"),
        (file(600, Extent(0, 0, 0, 0)), "out of order"),
        (file(0, Extent(0, 0, 0, 5)), "empty file with data"),
        (file(-5), "2 TiB"),
        (file((1 << 41) + 1), "2 TiB"),
        (Node(LNK | 0o777, target=b""), "empty target"),
        (Node(LNK | 0o777, target=b"x" * 4096), "a target that no file system allows"),
        (Node(LNK | 0o777, target=b"x\0y"), "a target that no file system allows"),
        (Node(0o644), "no kind of file"),
        (Node(0o200644), "no kind of file"),
        (Node(stat.S_IFCHR, rdev=(4096, 0)), "device number"),
        (Node(stat.S_IFBLK, rdev=(0, 1 << 20)), "device number"),
        (Node(REG, uid=1 << 32), "out of range"),
        (Node(REG, gid=-1), "out of range"),
        (Node(REG, mtime=1 << 99), "out of range"),
        (Node(DIR, mtime=1 << 99, children={}), "out of range"),
        (Node(REG, xattrs=((b"user." + b"k" * 256, b""),)), "too long"),
        (Node(REG, xattrs=((b"user.k", bytes(65536)),)), "too long"),
        (Node(REG, xattrs=tuple((b"user.%d" % i, bytes(60000)) for i in range(5))), "256 KiB"),
    ],
)
def test_what_cannot_be_represented_is_refused_by_name(node: Node, words: str) -> None:
    message = refused(folder({b"dir": folder({b"bad": node})}), [4096])
    assert "/dir/bad" in message
    assert words in message


@pytest.mark.parametrize("name", [b"", b".", b"..", b"a/b", b"a\0b", b"x" * 256])
def test_bad_names_are_refused(name: bytes) -> None:
    assert "/dir has a name" in refused(folder({b"dir": folder({b"ok": file(0), name: file(0)})}))


def test_a_directory_with_two_names_is_refused() -> None:
    twice = folder()
    assert "/b has a second name" in refused(folder({b"a": twice, b"b": twice}))
    loop = folder()
    assert loop.children is not None
    loop.children[b"self"] = loop
    assert "/self has a second name" in refused(loop)


def test_other_roots_and_layers_are_refused() -> None:
    assert "root is no directory" in refused(file(0))
    assert "layer 0" in refused(folder(), [1 << 41])


def test_copied_data_is_bounded_and_needs_a_reader() -> None:
    node = file(5000, Extent(0, 0, 7, 5000))
    with pytest.raises(IndexFormatError, match=r"/f: .*0 MiB"):
        build(folder({b"f": node}), [bytes(8192)], max_inline=4096)
    assert "no layer can be read" in refused(folder({b"f": node}), [8192])
    with pytest.raises(IndexFormatError, match="layer 0 gave 3 bytes"):
        write_image(Tree(folder({b"f": node})), [8192], io.BytesIO(), lambda *_: b"abc")


def test_an_unfinished_image_has_no_superblock() -> None:
    out = io.BytesIO()

    def broken(layer: int, offset: int, length: int) -> bytes:
        raise OSError("gone")

    with pytest.raises(OSError, match="gone"):
        write_image(Tree(folder({b"f": file(600, Extent(0, 0, 7, 600))})), [8192], out, broken)
    with pytest.raises(IndexFormatError):
        ondisk.read_superblock(io.BytesIO(out.getvalue()))


def test_crc32c_check_value() -> None:
    assert ondisk.crc32c(b"123456789") ^ 0xFFFFFFFF == 0xE3069283  # RFC 3720, and every catalogue of CRCs


def test_superblock_is_read_back() -> None:
    data, info = build_only(folder())
    head = ondisk.read_superblock(io.BytesIO(data))
    assert (head.blocks * 512, head.inodes, head.uuid, head.devices) == (info.size, 1, info.uuid, ())
    out = io.BytesIO()
    info = write_image(Tree(folder()), [512, 513, 0], out)
    assert ondisk.read_superblock(out).devices == info.device_blocks == (1, 2, 0)


def _flip(at: int) -> Callable[[bytes], bytes]:
    return lambda data: data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]


@pytest.mark.parametrize(
    "damage",
    [lambda _: b"", lambda data: data[:1100], *(_flip(at) for at in (1024, 1030, 1036, 1040, 1104, 1112, 1300))],
)
def test_damaged_superblocks_are_refused(damage: Callable[[bytes], bytes]) -> None:
    out = io.BytesIO()
    write_image(Tree(folder()), [512, 1024], out)
    with pytest.raises(IndexFormatError):
        ondisk.read_superblock(io.BytesIO(damage(out.getvalue())))


def test_many_entries_in_one_directory_in_linear_time() -> None:
    root = folder({b"%06d" % i: file(3, Extent(0, 0, 0, 3)) for i in range(100_000)})
    start = time.process_time()
    data, info = build_only_with(root, [512])
    assert time.process_time() - start < 10  # about 0.8 s; a quadratic step would take minutes
    assert info.inodes == 100_001
    assert len(Image(data, [b"abc" + bytes(509)]).walk()) == 100_001


def build_only_with(root: Node, sizes: list[int]) -> tuple[bytes, ImageInfo]:
    out = io.BytesIO()
    info = write_image(Tree(root), sizes, out)
    return out.getvalue(), info
