"""Reads images from registries: manifests, configs, ranges of layers. The public face of this package.

    client = RegistryClient(settings["registries"])
    image = client.resolve(ImageRef.parse("python:3.12"), "linux/arm64")
    with client.open_blob(ref, image.layers[0].digest, 1 << 20, 3 << 20) as stream:
        for chunk in stream: ...

Protocol: OCI distribution-spec 1.1 ("Pulling manifests", "Pulling blobs"), which Docker's registry API is a form of.
"""

from __future__ import annotations

import re
import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeVar
from urllib.parse import urlencode

from shim.errors import IntegrityError, NotFoundError, RegistryError, ShimError
from shim.registry import manifest as manifests
from shim.registry import platform as platforms
from shim.registry.credentials import CredentialStore
from shim.registry.endpoint import Call, Endpoint
from shim.registry.hooks import Counters, Hooks
from shim.registry.hosts import CERTS_DIRS, PULL, RESOLVE, Hosts
from shim.registry.images import ImageFinder
from shim.registry.manifest import OCI_INDEX, Descriptor, Document, Manifest
from shim.registry.ref import ImageRef, check_digest
from shim.registry.retry import RetryPolicy, pause
from shim.registry.stream import BlobStream, check_range
from shim.registry.transport import Response, Transport

__all__ = ["BlobStream", "Descriptor", "Document", "Manifest", "RegistryClient"]

MAX_CONFIG = 8 << 20  # bytes of an image config
MAX_DISCARD = 4 << 30
MAX_REGISTRIES = 1024
MAX_PAGES = 16  # of a list of referrers; what stands behind is not looked at
AWAY_SECONDS = 30.0
_NO_HEAD = (400, 405, 501)
_NEXT = re.compile(r"""<([^<>]*)>[^<]*;\s*rel\s*=\s*"?next(?![\w.-])""", re.IGNORECASE)  # RFC 8288

T = TypeVar("T")


class RegistryClient:
    """Thread-safe; make one for each process.

    registries: the settings table `registries` (see hosts.py). deadline: seconds for a call that gets none; a stream
    that gets none may take as long as bytes keep coming. max_discard: bytes read for nothing when a host ignores Range.

    Every method raises RegistryError or its kinds AuthError and NotFoundError (`retryable`, `status`), IntegrityError
    for bytes that do not hash to what was asked for, and ConfigError for certificates that cannot be used.
    """

    def __init__(
        self,
        registries: Mapping[str, Any] | None = None,
        *,
        hooks: Hooks | None = None,
        credentials: CredentialStore | None = None,
        policy: RetryPolicy | None = None,
        pool_size: int = 16,
        connect_timeout: float = 10.0,
        read_timeout: float = 30.0,
        deadline: float = 60.0,
        max_discard: int = MAX_DISCARD,
        certs_dirs: Sequence[str] = CERTS_DIRS,
        inside: Callable[[str], bool] | None = None,
    ) -> None:
        """inside(host[:port]): whether a name may lead to this machine or its link; None: any may, as people who type
        a name want it."""
        self._hooks = hooks or Hooks()
        self._hosts = Hosts(registries, certs_dirs)
        self._credentials = credentials or CredentialStore(hooks=self._hooks)
        self._policy = policy or RetryPolicy()
        self._deadline = deadline
        self._max_discard = max_discard
        self._inside = inside
        self._transport = Transport(
            self._hooks, pool_size=pool_size, connect_timeout=connect_timeout, read_timeout=read_timeout
        )
        self._lock = threading.Lock()
        self._endpoints: OrderedDict[str, list[Endpoint]] = OrderedDict()

    @property
    def counters(self) -> Counters:
        """Requests and bytes by host and kind."""
        return self._transport.counters

    def close(self) -> None:
        """Close idle connections. The client can be used again."""
        self._transport.close()

    def resolve(self, ref: ImageRef, platform: str | None = None) -> Manifest:
        """The manifest, config and layers of the image for `platform` (os/arch[/variant]; None is the host's).

        A single-platform image is taken as it is when `platform` is None, with a warning if it is for another one; with
        a platform given it must suit. Foreign layers (kept at URLs outside the registry) are refused.
        """
        wanted = platforms.parse(platform)
        document = self.manifest(ref)
        return ImageFinder(self, ref, wanted, strict=bool(platform), hooks=self._hooks).find(document)

    def manifest(self, ref: ImageRef) -> Document:
        """The manifest or index that `ref` names, verified against its digest if it has one."""
        capability = PULL if ref.digest else RESOLVE
        call = Call("GET", ref.repository, f"manifests/{ref.reference}", "manifest", (("Accept", manifests.ACCEPT),))

        def read(endpoint: Endpoint, deadline: float | None) -> Document:
            response = endpoint.request(call, deadline)
            _must_be_whole(response, str(ref))
            raw = response.read_all(manifests.MAX_MANIFEST)
            promised = ref.digest or _sound_digest(response.headers.get("Docker-Content-Digest"))
            digest = manifests.hash_of(raw, promised.partition(":")[0] if promised else "sha256")
            if promised and digest != promised:
                raise IntegrityError(f"{endpoint.name} sent a manifest for {ref} that hashes to {digest}")
            kind = manifests.media_type_of(raw, response.headers.get("Content-Type"), f"the manifest of {ref}")
            return Document(digest, kind, raw)

        return self._over_hosts(ref, capability, read, None)[1]

    def referrers(self, ref: ImageRef, artifact_type: str) -> list[Document]:
        """What the registry lists as referring to `ref`'s digest, page by page, MAX_PAGES at most.

        RegistryError (404 …) from one without that API."""
        query = urlencode({"artifactType": artifact_type})
        path = f"referrers/{ref.digest}"
        call = Call("GET", ref.repository, path, "manifest", (("Accept", OCI_INDEX),), target=f"{path}?{query}")

        def read(endpoint: Endpoint, deadline: float | None) -> list[Document]:
            pages: list[Document] = []
            page = call
            while len(pages) < MAX_PAGES:
                response = endpoint.request(page, deadline)
                _must_be_whole(response, f"what refers to {ref}")
                raw = response.read_all(manifests.MAX_MANIFEST)
                kind = manifests.media_type_of(raw, response.headers.get("Content-Type"), f"the referrers of {ref}")
                if kind != OCI_INDEX:
                    raise NotFoundError(f"{endpoint.name} does not list referrers", status=404)
                pages.append(Document(manifests.hash_of(raw), kind, raw))
                following = _NEXT.search(response.headers.get("Link", ""))
                if following is None:
                    break
                page = replace(call, target=endpoint.target(response.url, following[1]))
            return pages

        return self._over_hosts(ref, PULL, read, None)[1]

    def blob(self, ref: ImageRef, item: Descriptor | str, max_bytes: int = MAX_CONFIG) -> bytes:
        """A small blob (a config), whole and verified. `item`: its descriptor or digest."""
        digest = check_digest(item if isinstance(item, str) else item.digest)
        size = None if isinstance(item, str) else item.size
        what = f"blob {digest} of {ref.name}"
        if size is not None and size > max_bytes:
            raise RegistryError(f"{what} has {size} bytes, more than the {max_bytes} that are allowed")
        call = Call("GET", ref.repository, f"blobs/{digest}", "config")

        def read(endpoint: Endpoint, deadline: float | None) -> bytes:
            response = endpoint.request(call, deadline)
            _must_be_whole(response, what)
            raw = response.read_all(max_bytes if size is None else size)
            actual = manifests.hash_of(raw, digest.partition(":")[0])
            if actual != digest:
                raise IntegrityError(f"{endpoint.name} sent {len(raw)} bytes for {what} that hash to {actual}")
            return raw

        return self._over_hosts(ref, PULL, read, None)[1]

    def open_blob(
        self, ref: ImageRef, digest: str, start: int = 0, end: int | None = None, *, deadline: float | None = None
    ) -> BlobStream:
        """The compressed bytes [start, end) of a blob (end None: to its end), not verified.

        deadline: an instant on `hooks.clock` (time.monotonic) by which all bytes must be there. The first answer has
        come when this returns. Give `end` when it is known: without it a connection that ends early cannot always be
        told from a blob that ends.
        """
        check_digest(digest)
        if start < 0 or (end is not None and end < start):
            raise ValueError(f"not a range: [{start}, {end})")
        what = f"blob {digest} of {ref.name}"

        def open_at(position: int, stop: int | None, limit: float | None) -> tuple[Endpoint, Response]:
            headers: tuple[tuple[str, str], ...] = ()
            if position or stop is not None:
                headers = (("Range", f"bytes={position}-{'' if stop is None else stop - 1}"),)
            call = Call("GET", ref.repository, f"blobs/{digest}", "blob", headers, memo=digest)

            def read(endpoint: Endpoint, until: float | None) -> Response:
                response = endpoint.request(call, until)
                try:
                    check_range(response, position, stop, what)
                except RegistryError:
                    response.close()
                    raise
                return response

            return self._over_hosts(ref, PULL, read, limit, streams=True)

        return BlobStream(
            open_at,
            what,
            start,
            end,
            deadline=deadline,
            hooks=self._hooks,
            policy=self._policy,
            max_discard=self._max_discard,
        )

    def check_access(self, ref: ImageRef, digest: str, *, deadline: float | None = None) -> None:
        """Return when the registry lets these credentials read the blob; else raise AuthError or NotFoundError.

        deadline: an instant on `hooks.clock`. A registry that has no HEAD is asked for one byte.
        """
        path = f"blobs/{check_digest(digest)}"
        calls = [
            Call("HEAD", ref.repository, path, "check", follow=False),
            Call("GET", ref.repository, path, "check", (("Range", "bytes=0-0"),), follow=False),
        ]

        def ask(endpoint: Endpoint, deadline: float | None) -> None:
            try:
                endpoint.request(calls[0], deadline).close()
            except RegistryError as error:
                if error.status not in _NO_HEAD:
                    raise
                endpoint.request(calls[1], deadline).close()

        self._over_hosts(ref, PULL, ask, deadline)

    def on_writer(self, registry: str, work: Callable[[Endpoint], T]) -> T:
        """Do `work` with the host that takes what is pushed to `registry`, again as the policy says."""
        able = self._for(registry, "push") or [e for e in self._for(registry, PULL) if not e.host.is_mirror]
        if not able:
            raise RegistryError(f"no host of {registry} may push", hint="see `capabilities` in `registries`")
        return self._attempt(able[0], lambda endpoint, _: work(endpoint), self._policy.attempts, None)

    def pause(self, failures: int, error: RegistryError) -> bool:
        """Wait as long as the policy says after the `failures`-th failure in a row; False: it says to give up."""
        return pause(self._policy, self._hooks, failures, error, None)

    def hosts(self, ref: ImageRef) -> list[str]:
        """The host[:port] names that are asked for `ref`, in order."""
        return [endpoint.name for endpoint in self._for(ref.registry, PULL)]

    def _for(self, registry: str, capability: str) -> list[Endpoint]:
        with self._lock:
            known = self._endpoints.get(registry)
            if known is None:
                known = [
                    Endpoint(host, self._transport, self._credentials, self._inside)
                    for host in self._hosts.of(registry)
                ]
                self._endpoints[registry] = known
                while len(self._endpoints) > MAX_REGISTRIES:
                    self._endpoints.popitem(last=False)
        able = [endpoint for endpoint in known if capability in endpoint.host.capabilities]
        return sorted(able, key=lambda endpoint: endpoint.is_away)

    def _over_hosts(
        self,
        ref: ImageRef,
        capability: str,
        work: Callable[[Endpoint, float | None], T],
        deadline: float | None,
        *,
        streams: bool = False,
    ) -> tuple[Endpoint, T]:
        """Do `work` with the first host that can, trying each again as the policy says."""
        if deadline is None and not streams:
            deadline = self._hooks.clock() + self._deadline
        endpoints = self._for(ref.registry, capability)
        if not endpoints:
            raise RegistryError(
                f"no host of {ref.registry} may {capability}", hint="see `capabilities` in `registries`"
            )
        failures: list[tuple[Endpoint, ShimError]] = []
        for n, endpoint in enumerate(endpoints):
            last = n + 1 == len(endpoints)
            attempts = self._policy.attempts if last else self._policy.mirror_attempts
            limit = deadline
            if deadline is not None and not last:  # a host that hangs must leave time for the next
                limit = self._hooks.clock() + (deadline - self._hooks.clock()) / 2
            try:
                return endpoint, self._attempt(endpoint, work, attempts, limit)
            except (RegistryError, IntegrityError) as error:
                failures.append((endpoint, error))
                if len(endpoints) > 1 and (isinstance(error, IntegrityError) or error.retryable):
                    endpoint.put_off(AWAY_SECONDS)
        raise _worst(failures)

    def _attempt(
        self, endpoint: Endpoint, work: Callable[[Endpoint, float | None], T], attempts: int, deadline: float | None
    ) -> T:
        failures = 0
        while True:
            try:
                return work(endpoint, deadline)
            except RegistryError as error:
                failures += 1
                if not error.retryable or failures >= attempts:
                    raise
                if not pause(self._policy, self._hooks, failures, error, deadline):
                    raise
                self.counters.add(endpoint.name, "retry", retries=1)


def _worst(failures: list[tuple[Endpoint, ShimError]]) -> ShimError:
    """What to tell of several failures: the registry's own, with the mirrors' behind it."""
    error = next((e for endpoint, e in failures if not endpoint.host.is_mirror), failures[-1][1])
    others = [f"{endpoint.name}: {e}" for endpoint, e in failures if e is not error]
    if others:
        error.args = (f"{error} (also tried {'; '.join(others)[:1000]})",)
    return error


def _must_be_whole(response: Response, what: str) -> None:
    if response.status != 200:
        response.close()
        raise RegistryError(f"{response.host} answered {response.status} for {what}", status=response.status)


def _sound_digest(text: str | None) -> str | None:
    try:
        return check_digest(text) if text else None
    except ShimError:
        return None
