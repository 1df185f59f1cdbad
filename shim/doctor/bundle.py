"""Would this bundle start, and if not, why: what the wrapper and the runtime will do, in their order, without doing it.

The tree is really acquired from the daemon (which is started if none runs, as a container would), so what is found out
is what a container would meet. Nothing of the bundle is changed.
"""

from __future__ import annotations

import errno
import os
import stat
import time
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from shim.doctor import trial
from shim.doctor.node import Node, why
from shim.doctor.result import Result, failed, ok, skipped, warning
from shim.doctor.rootview import RootView
from shim.errors import MountError, ShimError
from shim.runtime import client, verify
from shim.runtime.bundle import Bundle
from shim.runtime.config import Config
from shim.runtime.launcher import compile_settings
from shim.runtime.reference import Reference, find
from shim.runtime.rootfs import PLAIN, Rootfs

_LOOK_SECONDS = 60
_MISSING_MAX = 8
_BUNDLE_HINT = "a bundle is a directory with config.json, as engines make it (runc spec)"


def check(directory: Path) -> Callable[[Node], Iterator[Result]]:
    """The check of one bundle."""

    def run(node: Node) -> Iterator[Result]:
        with ExitStack() as stack:
            yield from _look(node, directory, stack)

    return run


def _look(node: Node, directory: Path, stack: ExitStack) -> Iterator[Result]:
    expected = "config.json can be read, and asks for nothing that a lazily loaded tree has not"
    try:
        bundle = Bundle(str(directory))
        rootfs = Rootfs(bundle.rootfs, dict)
        if bundle.has_user_namespace:
            yield failed(
                "the container has a user namespace, whose shifted owners a lazily loaded tree does not have",
                expected,
                "run it without userns-remap, --userns or hostUsers: false",
            )
            return
    except (ShimError, OSError) as error:
        yield failed(why(error), expected, getattr(error, "hint", None) or _BUNDLE_HINT)
        return
    yield ok(f"{bundle.path} can be read", expected)
    expected = "a reference to an index, by annotation, index.clip, a thin image or CLIP_INDEX, that is trusted"
    config = _config(node)
    try:
        reference = find(bundle, config, rootfs.lowers)
        if reference is not None:
            if reference.fd >= 0:
                stack.callback(os.close, reference.fd)
            rootfs.refuse_unsupported()
    except (ShimError, OSError) as error:
        yield failed(why(error), expected, getattr(error, "hint", None) or "see `trust:` in `clip-shim config show`")
        return
    if reference is None:
        off = {"annotation", "bundle", "marker"} - config.sources
        note = f" ({', '.join(sorted(off))} switched off)" if off else ""
        yield skipped(f"there is no reference{note}: runc gets the container untouched", expected)
        return
    yield ok(f"{reference.source}: {reference.value}", expected)
    answer = yield from _acquire(node, config, reference, bundle, stack)
    if answer is not None:
        to_be_had = yield from _layers(node, answer)
        yield from _root(node, bundle, rootfs, answer, read=to_be_had)


def _config(node: Node) -> Config:
    """The wrapper's settings, as they would be compiled now."""
    from shim.doctor.installation import config_file

    package = Path(verify.__file__).resolve().parent.parent
    compiled = compile_settings(node.settings, config_file(), node.daemon_command, node.launcher, package)
    return Config(compiled, {})


def _acquire(
    node: Node, config: Config, reference: Reference, bundle: Bundle, stack: ExitStack
) -> Generator[Result, None, dict[str, Any] | None]:
    """Yields results; returns the daemon's answer, or None."""
    expected = "the daemon reads the index, trusts where it leads, and mounts its tree"
    request = {
        "v": 1,
        "op": "acquire",
        "source": reference.source,
        "value": reference.value,
        "container": {"id": "doctor", "root": "", "bundle": bundle.directory},
    }
    started = time.monotonic()
    try:
        connection, answer = client.ask(config, dict(os.environb), request, reference.fd)
        stack.callback(connection.close)
        verify.check_tree(str(answer["tree"]), answer.get("dirs") or [], str(answer.get("device") or ""))
    except (ShimError, OSError) as error:
        kind = f" ({type(error).__name__})" if isinstance(error, ShimError) else ""
        yield failed(f"{why(error)}{kind}", expected, getattr(error, "hint", None) or "see the log of the daemon")
        return None
    node.forget()
    took = 1000 * (time.monotonic() - started)
    yield ok(f"{answer['image']}, {answer['index'][:19]}, mounted by {answer['tier']} in {took:.0f} ms", expected)
    return answer


def _layers(node: Node, answer: dict[str, Any]) -> Generator[Result, None, bool]:
    """Yields results; returns whether the tree's files can be read."""
    expected = "the registry gives each layer to this node's credentials, or all of it is cached"
    image = next((image for image in node.images if _names(answer, image.ref.name)), None)
    if image is None:
        yield skipped("the daemon does not say what layers the image has", expected)
        return True

    def ask(digest: str) -> tuple[str, ShimError | None]:
        try:
            node.registry.check_access(image.ref, digest)
        except ShimError as error:
            return digest, error
        return digest, None

    with ThreadPoolExecutor(8) as pool:
        bad = [(digest, error) for digest, error in pool.map(ask, dict.fromkeys(image.layers)) if error is not None]
    if not bad:
        yield ok(f"{len(image.layers)} layers at {image.ref.registry}", expected)
    elif _all_cached(node, len(image.layers)):
        yield warning(f"{bad[0][1]}, but all layers in use are cached", expected, bad[0][1].hint or "")
    else:
        text = f"{len(bad)} of {len(image.layers)} layers cannot be had: {bad[0][0][:19]}: {bad[0][1]}"
        yield failed(text, expected, bad[0][1].hint or "")
        return False
    return True


def _names(answer: dict[str, Any], name: str) -> bool:
    image = str(answer["image"])
    return image == name or image.startswith((f"{name}:", f"{name}@"))


def _all_cached(node: Node, count: int) -> bool:
    layers = (node.status or {}).get("layers", [])
    return len(layers) >= count and all(layer["cached_bytes"] >= layer["size"] for layer in layers)


def _root(node: Node, bundle: Bundle, rootfs: Rootfs, answer: dict[str, Any], *, read: bool) -> Iterator[Result]:
    """What the merged root will be, looked at in a child, as reading a program's first bytes may wait for the registry.

    read: whether they are read at all."""
    layers = rootfs.layers() if rootfs.kind != PLAIN else None
    directories = layers.all if layers is not None else [rootfs.path]
    view = RootView([*(os.fsdecode(path) for path in directories if os.path.isdir(path)), str(answer["tree"])])
    writable = layers is None or layers.writable
    expected = "a root with /proc, /dev and /sys, whole links, and the program with its interpreter"
    try:
        found = trial.attempt(
            lambda _: _inspect(view, bundle, answer, writable=writable, read=read), node.work_dir, _LOOK_SECONDS
        )
    except MountError as error:
        yield failed(str(error), expected, error.hint or "see `clip-shim status --waiting`")
        return
    for status, text, wanted, fix in found:
        yield Result(status, text, wanted, fix)


def _inspect(view: RootView, bundle: Bundle, answer: dict[str, Any], *, writable: bool, read: bool) -> list[list[str]]:
    return [
        *_directories(view, writable=writable),
        *_links(view, answer),
        *_mounts(view, bundle, writable=writable),
        *_program(view, bundle, read=read),
    ]


def _directories(view: RootView, *, writable: bool) -> Iterator[list[str]]:
    expected = "/proc, /dev and /sys are directories"
    good = True
    for name in ("proc", "dev", "sys"):
        place = view.find(f"/{name}", follow=False)
        if place is None and writable:
            continue  # it is made
        if place is None or not stat.S_ISDIR(place.mode):
            good = False
            text = f"/{name} is missing, and nothing can be made" if place is None else f"/{name} is no directory"
            yield ["failed", text, expected, "make the index again with `clip-shim index REF -o FILE`"]
    if good:
        yield ["ok", "the runtime can mount on /proc, /dev and /sys", expected, ""]


def _links(view: RootView, answer: dict[str, Any]) -> Iterator[list[str]]:
    expected = "top-level links lead to where the index has them lead"
    good = True
    for name, link in (answer.get("symlinks") or {}).items():
        place = view.find(f"/{name}", follow=False)
        if place is None or not stat.S_ISLNK(place.mode):
            continue  # a layer of the engine says something else
        if not place.target:
            good = False
            yield ["failed", f"/{name} is an empty link", expected, "the index is damaged: make it again"]
        elif link.get("resolves") and place.target == link.get("target") and view.find(f"/{name}") is None:
            good = False
            yield ["failed", f"/{name} -> {place.target} leads nowhere", expected, "a layer hides what it leads to"]
    if good:
        yield ["ok", f"{len(answer.get('symlinks') or {})} top-level links are whole", expected, ""]


def _mounts(view: RootView, bundle: Bundle, *, writable: bool) -> Iterator[list[str]]:
    expected = "what is mounted into the container exists, and has a place there"
    mounts = _mount_tables(bundle)
    good = True
    for mount in mounts:
        options = mount.get("options") or []
        source, target = str(mount.get("source") or ""), str(mount.get("destination") or "")
        is_bind = "bind" in options or "rbind" in options or mount.get("type") == "bind"
        if is_bind and not os.path.lexists(os.path.join(bundle.directory, source)):
            good = False
            yield [
                "failed",
                f"{source}, to be mounted on {target}, is not there",
                expected,
                "make it, or mount another",
            ]
        if not writable and view.find(target) is None and not target.startswith(("/proc/", "/sys/", "/dev/")):
            good = False
            yield ["failed", f"{target} is not in the root, and nothing can be made", expected, "give it an upper"]
    if good:
        yield ["ok", f"{len(mounts)} mounts have sources and places", expected, ""]


def _mount_tables(bundle: Bundle) -> list[dict[str, Any]]:
    mounts = bundle.spec.get("mounts")
    return [mount for mount in mounts if isinstance(mount, dict)] if isinstance(mounts, list) else []


def _program(view: RootView, bundle: Bundle, *, read: bool) -> Iterator[list[str]]:
    expected = "the program is there, can be executed, and so can its interpreter"
    process = bundle.section("process")
    args = process.get("args")
    if not isinstance(args, list) or not args or not isinstance(args[0], str):
        yield ["failed", "process.args names no program", expected, "give the container a command"]
        return
    name = args[0]
    path = bundle.environment("PATH") or "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
    cwd = str(process.get("cwd") or "/")
    places = [os.path.join(cwd, name)] if "/" in name else [os.path.join(place, name) for place in path.split(":")]
    targets = {str(mount.get("destination")) for mount in _mount_tables(bundle)} - {"/proc", "/dev"}
    for place in places:
        if any(place == target or place.startswith(f"{target}/") for target in targets):
            yield ["ok", f"{place} comes with a mount", expected, ""]
            return
        node = view.find(place)
        if node is not None and stat.S_ISREG(node.mode):
            break
    else:
        where = name if "/" in name else f"{name} in PATH={path}"
        yield ["failed", f"{where} is not in the root", expected, "check the command, and that this is the right image"]
        return
    if not node.mode & 0o111:
        yield [
            "failed",
            f"{place} cannot be executed (mode {node.mode & 0o7777:04o})",
            expected,
            "chmod it in the image",
        ]
        return
    chain = [place]
    try:
        while read and (interpreter := view.interpreter(chain[-1])) is not None:
            chain.append(interpreter)
            found = view.find(interpreter)
            if found is None or not stat.S_ISREG(found.mode) or not found.mode & 0o111:
                text = f"{chain[-2]} needs {interpreter}, which is not there"
                yield ["failed", text, expected, "the image lacks it, or is for another platform"]
                return
            if len(chain) > _MISSING_MAX:
                yield ["failed", f"{place} has interpreters without end", expected, "mend its first line"]
                return
    except OSError as error:
        name_ = errno.errorcode.get(error.errno or 0, str(error.errno))
        text = f"the first bytes of {chain[-1]} cannot be read ({name_})"
        yield ["failed", text, expected, "see the result on layers, and the daemon's log"]
        return
    yield ["ok", " → ".join(chain), expected, ""]
