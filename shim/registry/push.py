"""Writes to registries: blobs and manifests (OCI distribution-spec 1.1 "Pushing").

    pusher = Pusher(client)
    layer = pusher.push_blob(ref, Path("layer.tar.gz"), media_type)
    pusher.put_manifest(ref, manifest_bytes, manifests.OCI_MANIFEST)

Everything here may be done again after a failure: what is there already is not sent twice.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from urllib.parse import quote, urljoin, urlsplit, urlunsplit

from shim.errors import IntegrityError, NotFoundError, RegistryError
from shim.registry.client import RegistryClient
from shim.registry.endpoint import Call, Endpoint
from shim.registry.manifest import Descriptor
from shim.registry.ref import ImageRef, check_digest
from shim.registry.transport import Response

CHUNK = 16 << 20  # bytes sent, and kept in memory, at a time; what is not longer goes in one piece
MAX_CHUNK = 256 << 20
OCTETS = "application/octet-stream"
ACTIONS = "pull,push"
_RESUMES = 8  # times an upload goes on after an error without a byte having come through

Progress = Callable[[int], None]
"""Bytes of the blob that the registry has."""


@dataclass(frozen=True, slots=True)
class Put:
    """A manifest that was put: its digest, and the subject's, if the registry keeps the list of referrers itself."""

    digest: str
    subject: str | None


@dataclass(slots=True)
class _Upload:
    """An upload session (distribution-spec "Pushing a blob in chunks"): where it goes on, and how far it is."""

    location: str
    offset: int = 0
    least: int = 0  # OCI-Chunk-Min-Length


class Pusher:
    """Thread-safe. Uses the client's credentials and settings, and the host that may be pushed to: one whose
    `capabilities` name push, else the registry itself, never another mirror.

    Methods raise RegistryError and its kinds AuthError and NotFoundError (no such repository, and none is made), and
    IntegrityError: a file changed while it was sent, or the registry stored something else.
    """

    def __init__(self, client: RegistryClient, *, chunk: int = CHUNK) -> None:
        self._client = client
        self._chunk = chunk

    def has_blob(self, ref: ImageRef, digest: str) -> bool:
        """Whether the repository of `ref` has the blob."""
        call = Call("HEAD", ref.repository, f"blobs/{check_digest(digest)}", "check", actions=ACTIONS, follow=False)

        def ask(endpoint: Endpoint) -> bool:
            endpoint.request(call, None).close()
            return True

        try:
            return self._client.on_writer(ref.registry, ask)
        except NotFoundError:
            return False

    def push_blob(
        self,
        ref: ImageRef,
        data: bytes | Path,
        media_type: str = OCTETS,
        *,
        mount_from: str | None = None,
        progress: Progress | None = None,
    ) -> Descriptor:
        """Have the repository of `ref` hold `data`; its descriptor. Nothing is sent if it is there.

        mount_from: another repository of the registry that may have it, from which it then is taken.
        """
        digest, size = _measure(data)
        if not self.has_blob(ref, digest) and not (mount_from and self._mount(ref, digest, mount_from)):
            if size <= self._chunk:
                content = data if isinstance(data, bytes) else _read(data, 0, size)
                self._client.on_writer(ref.registry, lambda endpoint: self._whole(endpoint, ref, content, digest))
            else:
                self._client.on_writer(
                    ref.registry, lambda endpoint: self._pieces(endpoint, ref, data, digest, size, progress)
                )
        if progress is not None:
            progress(size)
        return Descriptor(media_type, digest, size)

    def put_manifest(self, ref: ImageRef, raw: bytes, media_type: str) -> Put:
        """Put a manifest or index under `ref`'s tag; without a tag, under its own digest (`ref.digest` is not used)."""
        digest = f"sha256:{sha256(raw).hexdigest()}"
        target = ref.tag or digest
        headers = (("Content-Type", media_type),)
        call = Call("PUT", ref.repository, f"manifests/{target}", "manifest", headers, actions=ACTIONS, body=raw)

        def put(endpoint: Endpoint) -> Put:
            response = endpoint.request(call, None)
            stored, subject = response.headers.get("Docker-Content-Digest"), response.headers.get("OCI-Subject")
            response.discard()
            if stored is not None and stored.startswith("sha256:") and stored != digest:
                raise IntegrityError(f"{endpoint.name} stored {digest} of {ref.name} as {stored[:80]!r}")
            return Put(digest, subject)

        return self._client.on_writer(ref.registry, put)

    def _mount(self, ref: ImageRef, digest: str, source: str) -> bool:
        """Whether the registry took the blob from its repository `source`. No is no error: it is sent then."""
        target = f"blobs/uploads/?mount={quote(digest, safe='')}&from={quote(source, safe='')}"
        call = Call("POST", ref.repository, f"blobs/{digest}", "upload", actions=ACTIONS, body=b"", target=target)

        def mount(endpoint: Endpoint) -> bool:
            response = endpoint.request(call, None)
            response.discard()
            if response.status == 202:  # the session of an upload that will not come
                self._cancel(endpoint, ref, digest, _location(endpoint, response))
            return response.status == 201

        return self._client.on_writer(ref.registry, mount)

    def _cancel(self, endpoint: Endpoint, ref: ImageRef, digest: str, location: str) -> None:
        try:
            endpoint.request(self._call("DELETE", ref, digest, location, b""), None).discard()
        except RegistryError:
            pass  # registries throw sessions away by themselves, later

    def _begin(self, endpoint: Endpoint, ref: ImageRef, digest: str) -> _Upload:
        response = endpoint.request(self._call("POST", ref, digest, "blobs/uploads/", b""), None)
        response.discard()
        if response.status != 202:
            raise RegistryError(f"{endpoint.name} answered {response.status} where an upload of {ref.name} begins")
        least = response.headers.get("OCI-Chunk-Min-Length", "0")
        return _Upload(
            _location(endpoint, response), 0, min(int(least), MAX_CHUNK) if re.fullmatch(r"\d{1,12}", least) else 0
        )

    def _call(
        self, method: str, ref: ImageRef, digest: str, target: str, body: bytes | None, *headers: tuple[str, str]
    ) -> Call:
        return Call(
            method, ref.repository, f"blobs/{digest}", "upload", headers, None, ACTIONS, body=body, target=target
        )

    def _whole(self, endpoint: Endpoint, ref: ImageRef, data: bytes, digest: str) -> None:
        """A blob in one piece ("POST then PUT")."""
        upload = self._begin(endpoint, ref, digest)
        self._finish(endpoint, ref, upload, data, digest)

    def _finish(self, endpoint: Endpoint, ref: ImageRef, upload: _Upload, data: bytes, digest: str) -> None:
        parts = urlsplit(upload.location)
        query = f"{parts.query}&" if parts.query else ""
        target = urlunsplit(parts._replace(query=f"{query}digest={quote(digest, safe='')}"))
        response = endpoint.request(self._call("PUT", ref, digest, target, data, ("Content-Type", OCTETS)), None)
        response.discard()
        if response.status not in (201, 204):
            raise RegistryError(f"{endpoint.name} answered {response.status} at the end of an upload to {ref.name}")

    def _pieces(
        self, endpoint: Endpoint, ref: ImageRef, data: bytes | Path, digest: str, size: int, progress: Progress | None
    ) -> None:
        """A blob in chunks; after an error it goes on where the registry says it stopped."""
        upload = self._begin(endpoint, ref, digest)
        chunk = min(max(self._chunk, upload.least), MAX_CHUNK)
        failures = 0
        while upload.offset < size:
            length = min(chunk, size - upload.offset)
            content = data[upload.offset :][:length] if isinstance(data, bytes) else _read(data, upload.offset, length)
            before = upload.offset
            try:
                self._patch(endpoint, ref, upload, content, digest)
            except RegistryError as error:
                failures += 1
                resumable = failures <= _RESUMES and (error.retryable or error.status == 416)
                if not resumable or not self._client.pause(failures, error):
                    raise
                self._resume(endpoint, ref, upload, digest)
            if upload.offset > before:
                failures = 0
            if upload.offset > size:
                raise RegistryError(f"{endpoint.name} has more of an upload to {ref.name} than was sent")
            if progress is not None:
                progress(upload.offset)
        self._settle(endpoint, ref, upload, digest)

    def _settle(self, endpoint: Endpoint, ref: ImageRef, upload: _Upload, digest: str) -> None:
        """Finish an upload in chunks. After an error it may be finished already, only the answer was lost."""
        failures = 0
        while True:
            try:
                self._finish(endpoint, ref, upload, b"", digest)
                return
            except RegistryError as error:
                failures += 1
                if failures > 1 and isinstance(error, NotFoundError) and self.has_blob(ref, digest):
                    return
                if failures > _RESUMES or not error.retryable or not self._client.pause(failures, error):
                    raise

    def _patch(self, endpoint: Endpoint, ref: ImageRef, upload: _Upload, content: bytes, digest: str) -> None:
        last = upload.offset + len(content) - 1
        headers = (("Content-Type", OCTETS), ("Content-Range", f"{upload.offset}-{last}"))
        response = endpoint.request(self._call("PATCH", ref, digest, upload.location, content, *headers), None)
        response.discard()
        if response.status == 416:
            raise RegistryError(f"{endpoint.name} does not take an upload's bytes from {upload.offset}", status=416)
        upload.location = _location(endpoint, response)
        upload.offset = last + 1

    def _resume(self, endpoint: Endpoint, ref: ImageRef, upload: _Upload, digest: str) -> None:
        """Ask how far an upload is. RegistryError (retryable, as a whole) when the session is lost."""
        try:
            response = endpoint.request(self._call("GET", ref, digest, upload.location, None), None)
        except NotFoundError:
            raise RegistryError(f"{endpoint.name} lost an upload to {ref.name}", retryable=True) from None
        response.discard()
        found = re.fullmatch(r"(?:bytes=)?0-(\d{1,18})", response.headers.get("Range", ""))
        end = int(found[1]) if found else 0
        upload.offset = end + 1 if end else 0  # "0-0" is what an empty session says
        upload.location = _location(endpoint, response)


def _location(endpoint: Endpoint, response: Response) -> str:
    where = response.headers.get("Location")
    if not where:
        raise RegistryError(f"{response.host} does not say where an upload goes on")
    here = urlsplit(response.url)
    try:
        there = urlsplit(urljoin(response.url, where))
    except ValueError:
        raise RegistryError(f"{response.host} leads to a URL that is not valid") from None
    if (here.scheme, there.scheme) == ("https", "http") and here.hostname == there.hostname:
        # a registry behind a proxy that ends TLS, and does not know
        there = there._replace(scheme="https", netloc=here.netloc)
    return endpoint.target(response.url, urlunsplit(there))


def _measure(data: bytes | Path) -> tuple[str, int]:
    """(digest, size). Raises OSError when a file cannot be read."""
    if isinstance(data, bytes):
        return f"sha256:{sha256(data).hexdigest()}", len(data)
    hasher, size = sha256(), 0
    with open(data, "rb") as file:
        while piece := file.read(1 << 20):
            hasher.update(piece)
            size += len(piece)
    return f"sha256:{hasher.hexdigest()}", size


def _read(path: Path, offset: int, length: int) -> bytes:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        data = os.pread(fd, length, offset)
        while len(data) < length and (more := os.pread(fd, length - len(data), offset + len(data))):
            data += more
    finally:
        os.close(fd)
    if len(data) != length:
        raise IntegrityError(f"{path} was cut short while it was sent", hint="leave the file alone meanwhile")
    return data
