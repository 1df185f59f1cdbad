"""The network: names, clocks, registries, index stores. Each host is asked once, several at a time."""

from __future__ import annotations

import ipaddress
import os
import socket
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import TypeVar
from urllib.parse import urlsplit

import shim
from shim.doctor.node import KnownImage, Node
from shim.doctor.result import Result, failed, ok, skipped, warning
from shim.errors import AuthError, RegistryError, ShimError, StoreError
from shim.registry.credentials import CredentialStore
from shim.registry.endpoint import Call, Endpoint
from shim.registry.hosts import Host, Hosts
from shim.registry.push import Pusher
from shim.registry.transport import Response, Transport, origin_of
from shim.stores import urls
from shim.stores.s3 import S3Store, options_of
from shim.stores.transfer import BESIDE, Stores

DEFAULT_REGISTRY = "docker.io"
_SECONDS = 10.0
_SLOW = 1.0
_HOSTS_MAX = 64
_AHEAD = 300.0  # seconds a clock may be wrong before tokens and certificates are
_ASTRAY = 30.0
_PROBE = ".clip-doctor"  # the object that a store is tried with; it stays there

T = TypeVar("T")
R = TypeVar("R")


def _at_once(work: Callable[[T], R], items: list[T]) -> Iterator[R]:
    with ThreadPoolExecutor(8) as pool:
        yield from pool.map(work, items)


def registries(node: Node) -> list[str]:
    """Those of the configuration and of the images that this node has; Docker's if there are none."""
    named = [name for name in node.settings["registries"] if name != "*"]
    used = [image.ref.registry for image in node.images]
    return list(dict.fromkeys(named + used))[:_HOSTS_MAX] or [DEFAULT_REGISTRY]


def _hosts(node: Node) -> list[Host]:
    table = Hosts(node.settings["registries"])
    found = {host.base: host for name in registries(node) for host in table.of(name)}
    return list(found.values())[:_HOSTS_MAX]


def names(node: Node) -> Iterator[Result]:
    """A proxy looks names up itself, so then it is the proxy's own that counts."""
    proxies = urllib.request.getproxies()
    places = {}
    for host in _hosts(node):
        name = host.origin.host
        proxy = proxies.get(host.origin.scheme) or proxies.get("all")
        if proxy and not urllib.request.proxy_bypass(host.origin.netloc):
            name = urlsplit(proxy if "://" in proxy else f"http://{proxy}").hostname or name
        if not _is_address(name):
            places[name] = True
    if not places:
        yield skipped("no host is named by a name")
    expected = "names of registries are found within a second"
    bad = failed if node.settings["registries"] or node.images else warning  # else nobody asked for that name
    for name, found, seconds in _at_once(_look_up, list(places)):
        if found is None:
            yield bad(f"{name}: no answer in {_SECONDS:g} s", expected, "see /etc/resolv.conf: is the server there?")
        elif not found[0]:
            yield bad(f"{name}: {found[1]}", expected, "check the name, and /etc/resolv.conf")
        elif seconds > _SLOW:
            yield warning(f"{name} was found in {seconds:.1f} s", expected, "a server in /etc/resolv.conf is not there")
        else:
            yield ok(f"{name} is {found[1]} ({seconds * 1000:.0f} ms)", expected)


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name.strip("[]"))
    except ValueError:
        return False
    return True


def _look_up(name: str) -> tuple[str, tuple[bool, str] | None, float]:
    """(name, (whether it was found, address or error), seconds). getaddrinfo(3) has no deadline: a thread waits."""
    answer: list[tuple[bool, str]] = []

    def work() -> None:
        try:
            answer.append((True, str(socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)[0][4][0])))
        except (OSError, UnicodeError) as error:
            answer.append((False, getattr(error, "strerror", None) or str(error)))

    started = time.monotonic()
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(_SECONDS)
    return name, answer[0] if answer else None, time.monotonic() - started


@dataclass(frozen=True, slots=True)
class _Answer:
    """What one host said: `detail` in words, or `error`; ahead: how many seconds our clock is before its."""

    host: Host
    detail: str = ""
    error: ShimError | None = None
    problem: str = ""
    ahead: float | None = None


def _ask(node: Node, transport: Transport, store: CredentialStore, host: Host) -> _Answer:
    image = next((image for image in node.images if image.ref.registry == host.registry), None)
    started = time.time()
    deadline = time.monotonic() + _SECONDS
    try:
        if image is None:
            response = transport.exchange("GET", f"{host.base}/v2/", {}, tls=host.tls, kind="check", deadline=deadline)
            detail, problem = _greeting(response)
        else:
            digest = image.layers[0]
            call = Call("GET", image.ref.repository, f"blobs/{digest}", "blob", (("Range", "bytes=0-0"),), memo=digest)
            response = Endpoint(host, transport, store).request(call, deadline)
            detail, problem = _range(host, image, response)
        ahead = _ahead(response, started)
        response.close()
    except ShimError as error:
        return _Answer(host, error=error)
    return _Answer(host, detail, None, problem, ahead)


def _greeting(response: Response) -> tuple[str, str]:
    """(what a registry of which no image is known says, what is wrong with that)."""
    if response.status == 200:
        return "answers without asking who we are", ""
    if response.status == 401:
        return "answers, and asks who we are", ""
    return f"answered {response.status} to /v2/", f"{response.status} is no registry's answer to /v2/"


def _range(host: Host, image: KnownImage, response: Response) -> tuple[str, str]:
    where = origin_of(response.url).netloc
    led = f", redirects to {where}" if where != host.name else ""
    detail = f"gives layers of {image.ref.repository}{led}"
    if response.status != 206:
        return detail, f"it answered {response.status} where 206 was due: parts of layers cannot be asked for"
    if response.headers.get("Content-Range", "").partition("/")[0] != "bytes 0-0":
        return detail, "it gave another range than the one that was asked for"
    return f"{detail}, ranges work", ""


def _ahead(response: Response, started: float) -> float | None:
    try:
        theirs = parsedate_to_datetime(response.headers["Date"]).timestamp()
    except (KeyError, ValueError, TypeError):
        return None
    return (started + time.time()) / 2 - theirs


def _answers(node: Node) -> list[_Answer]:
    """Asked once for all checks."""
    if node.answers is None:
        transport = Transport(connect_timeout=5, read_timeout=_SECONDS)
        store = CredentialStore()
        node.answers = list(_at_once(lambda host: _ask(node, transport, store, host), _hosts(node)))
        transport.close()
    return node.answers


def reachable(node: Node) -> Iterator[Result]:
    expected = "it can be reached, its certificate is trusted, it lets us read, and gives parts of layers (206)"
    named = node.settings["registries"] or node.images
    for answer in _answers(node):
        host = answer.host
        what = host.base if not host.is_mirror else f"{host.base} (mirror of {host.registry})"
        if answer.error is not None:
            text = f"{what}: {answer.error}"
            fix = answer.error.hint or ""
            if isinstance(answer.error, AuthError):
                yield failed(text, expected, fix)
            elif host.is_mirror or not named:
                yield warning(text, expected, fix)
            else:
                yield failed(text, expected, fix)
        elif answer.problem:
            fix = "use another mirror or proxy: without ranges each layer is read from its start"
            yield warning(f"{what} {answer.detail}: {answer.problem}", expected, fix)
        elif not host.tls.skip_verify:
            yield ok(f"{what} {answer.detail}", expected)
        else:
            yield warning(
                f"{what} {answer.detail}, but its certificate is not looked at (`skip_verify`)",
                expected,
                "name its authority by `ca` under `registries` instead",
            )


def clock(node: Node) -> Iterator[Result]:
    expected = "the clock agrees with the registries' within half a minute"
    fix = "set the clock, and run chrony or systemd-timesyncd"
    made = Path(shim.__file__).stat().st_mtime
    if time.time() < made - 86400:
        yield failed(f"it is {time.ctime()} here, before this program was installed", expected, fix)
        return
    known = [(abs(a.ahead), a) for a in _answers(node) if a.ahead is not None]
    if not known:
        yield skipped(f"no registry said what time it is; here it is {time.ctime()}", expected)
        return
    off, answer = min(known, key=lambda item: item[0])  # of several clocks the one that agrees best
    text = f"{off:.0f} s {'before' if (answer.ahead or 0) > 0 else 'behind'} {answer.host.name}"
    if off > _AHEAD:
        yield failed(f"the clock is {text}: tokens and certificates are refused", expected, fix)
    elif off > _ASTRAY:
        yield warning(f"the clock is {text}", expected, fix)
    else:
        yield ok(f"the clock agrees with {answer.host.name}", expected)


def stores(node: Node) -> Iterator[Result]:
    """Each is read; where indexes are put, a small object named .clip-doctor is written."""
    local = node.settings.state_dir / "indexes"
    expected = "indexes can be read, and written where `stores.write` names it"
    if local.is_dir():
        try:
            with NamedTemporaryFile(dir=local, prefix=_PROBE) as file:
                file.write(b"x")
                file.flush()
                Path(file.name).read_bytes()
            yield ok(f"{local} can be read and written", expected)
        except OSError as error:
            yield failed(f"{local}: {error.strerror}", expected, "is the disk full, or mounted read-only?")
    else:
        yield skipped(f"{local} is made when it is needed", expected)
    write = list(node.settings["stores.write"])
    for url in dict.fromkeys([*node.settings["stores.lookup"], *write]):
        try:
            yield _store(node, url, expected, write=url in write)
        except (ShimError, OSError) as error:
            yield failed(
                f"{url}: {error}", expected, getattr(error, "hint", "") or "see `stores` in `clip-shim config show`"
            )


def _store(node: Node, url: str, expected: str, *, write: bool) -> Result:
    if url in (BESIDE, "oci://"):
        return _beside(node, expected, write=write)
    place = urls.parse(url)
    if isinstance(place, urls.S3Place):
        probe = urls.S3Place(place.bucket, (place.key.rstrip("/") + "/" if place.key else "") + _PROBE)
        store = S3Store(place, options_of(node.settings["stores.s3"], place.bucket))
        if not write:
            store.size(probe)
            return ok(f"{url} can be read", expected)
        with NamedTemporaryFile() as file:
            file.write(b"written by `clip-shim doctor`\n")
            file.flush()
            store.put(probe, Path(file.name), replace=True)
        if store.size(probe) is None:
            raise StoreError(f"{probe} was written, but is not there")
        return ok(f"{url} can be read and written", expected)
    if isinstance(place, urls.FilePlace):
        if not place.path.is_dir() or not os.access(place.path, os.R_OK | (os.W_OK if write else 0)):
            raise StoreError(f"{place.path} is no directory that can be {'written' if write else 'read'}")
        return ok(f"{place.path} can be {'read and written' if write else 'read'}", expected)
    with Stores(node.settings, node.registry) as known:
        known.store(url)
    return ok(url, expected)


def _beside(node: Node, expected: str, *, write: bool) -> Result:
    """Beside the image in its registry: tried on an image that this node has."""
    image = next(iter(node.images), None)
    if image is None:
        return skipped("oci: no image is known here to try it with", expected)
    if write:
        try:
            Pusher(node.registry).push_blob(image.ref, b"{}")  # the config that an index's manifest has
        except RegistryError as error:
            return failed(f"{image.ref.name} cannot be pushed to: {error}", expected, error.hint or "")
    node.registry.check_access(image.ref, image.layers[0])
    return ok(f"{image.ref.name} can be {'read and pushed to' if write else 'read'}", expected)
