"""What the daemon derives from a tree: the root's symlinks, and where paths lead inside it."""

from __future__ import annotations

import stat
import time

from shim.daemon.prepare import _probes, _root_symlinks, resolve
from shim.index.flat import FlatTree, flatten
from shim.index.model import Extent, Node, Tree


def directory(**children: Node) -> Node:
    return Node(stat.S_IFDIR | 0o755, children={name.encode(): child for name, child in children.items()})


def link(target: str) -> Node:
    return Node(stat.S_IFLNK | 0o777, target=target.encode(), size=len(target))


def tree() -> FlatTree:
    file = Node(stat.S_IFREG | 0o644)
    usr = directory(bin=directory(sh=file), up=link("../.."), abs=link("/usr/bin"))
    root = Tree(
        directory(
            usr=usr,
            bin=link("usr/bin"),
            vmlinuz=link("boot/vmlinuz-6"),
            loop=link("loop"),
            out=link("../../../usr"),
            through=link("/usr/up/usr/abs/sh"),
        )
    )
    return flatten(root)


def test_symlinks_resolve_as_in_a_chroot() -> None:
    found = {name: info["resolves"] for name, info in _root_symlinks(tree()).items()}
    assert found == {"bin": True, "vmlinuz": False, "loop": False, "out": True, "through": True}


def at(tree: FlatTree, path: bytes) -> int | None:
    return resolve(tree, path, [1000])


def test_resolve() -> None:
    t = tree()
    file = at(t, b"/usr/bin/sh")
    assert file is not None
    assert stat.S_ISREG(t.attributes[t.attribute_of[file]].mode)
    assert at(t, b"/bin/sh") == file
    assert at(t, b"/../../bin/./sh") == file
    assert at(t, b"/bin/sh/x") is None
    assert at(t, b"/") == 0


def test_looking_up_has_an_end() -> None:
    """5,000 directories, and 39 links each of which goes through one of them 800 times: 32,000 lookups a name."""
    chain = {"l00": link("z"), "z": directory()}
    chain |= {f"l{number:02}": link("z/../" * 800 + f"l{number - 1:02}") for number in range(1, 40)}
    chain |= {f"d{number:05}": directory() for number in range(5000)}
    flat = flatten(Tree(directory(**chain)))
    began = time.process_time()
    found = _root_symlinks(flat)
    assert time.process_time() - began < 2
    assert found["l01"]["resolves"] is True
    assert resolve(flat, b"/l39", [100_000]) is not None


def test_probes_find_a_file_of_each_layer_far_down_quickly() -> None:
    first = Node(stat.S_IFREG | 0o644)
    here = top = directory(a=first, **{f"b{number:05}": first for number in range(50_000)})
    for _ in range(200):
        below = directory()
        assert here.children is not None
        here.children[b"z"] = here = below
    assert here.children is not None
    for layer in range(20):
        here.children[b"f%d" % layer] = Node(stat.S_IFREG | 0o644, size=9, extents=(Extent(0, layer, 512, 9),))
    here.children[b"holes"] = Node(stat.S_IFREG | 0o644, size=99, extents=(Extent(0, 20, 512, 9),))
    flat = flatten(Tree(top))
    began = time.process_time()
    probes = _probes(flat)
    assert time.process_time() - began < 0.5
    assert [probe["layer"] for probe in probes] == list(range(21))
    assert probes[20]["path"] == "/z" * 200 + "/holes"
