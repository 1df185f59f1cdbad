"""What the daemon derives from a tree: the root's symlinks, and where paths lead inside it."""

from __future__ import annotations

import stat

from shim.daemon.prepare import _root_symlinks, resolve
from shim.index.flat import FlatTree, flatten
from shim.index.model import Node, Tree


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


def test_resolve() -> None:
    t = tree()
    file = resolve(t, b"/usr/bin/sh")
    assert file is not None
    assert stat.S_ISREG(t.attributes[t.attribute_of[file]].mode)
    assert resolve(t, b"/bin/sh") == file
    assert resolve(t, b"/../../bin/./sh") == file
    assert resolve(t, b"/bin/sh/x") is None
    assert resolve(t, b"/") == 0
