"""Indexes as OCI artifacts, beside the image they describe: image-spec 1.1 manifest.md "Guidelines for Artifact Usage".

    {"artifactType": "application/vnd.clip-shim.index.v1", "config": {…empty…}, "subject": {the image's manifest},
     "layers": [{"mediaType": "application/vnd.clip-shim.index.v1", …}], "annotations": {…}}

The manifest has nothing in it that changes from run to run: who pushes the same index twice, pushes nothing new.
"""

from __future__ import annotations

import json
from hashlib import sha256
from pathlib import Path
from typing import BinaryIO

from shim.errors import AbsentError, IntegrityError, NotFoundError, StoreError
from shim.index import container
from shim.registry import manifest as manifests
from shim.registry.client import RegistryClient
from shim.registry.manifest import OCI_MANIFEST, Descriptor, Document
from shim.registry.push import Progress, Pusher
from shim.registry.ref import ImageRef
from shim.registry.referrers import attach, referrers
from shim.stores.base import digest_name

INDEX_TYPE = "application/vnd.clip-shim.index.v1"
ARCHIVE_TYPE = "application/vnd.clip-shim.archive.v1"  # a v1 archive, with all data
TYPES = (INDEX_TYPE, ARCHIVE_TYPE)
_EMPTY_TYPE = "application/vnd.oci.empty.v1+json"
_EMPTY = b"{}"
_TITLE = "org.opencontainers.image.title"
IMAGE_NOTE = "io.clip.image"
MAX_BLOB = 1 << 40


class OciStore:
    """The image's own registry. Thread-safe.

    A manifest is put when its blobs are there, so nobody meets half an index. Two that push an index of one image
    at once leave two artifacts, or one that is the same. `client` may have its own deadlines.
    """

    def __init__(self, client: RegistryClient) -> None:
        self._client = client

    @property
    def url(self) -> str:
        return "oci://"

    def find(self, image: ImageRef, out: BinaryIO) -> bool:
        return self._find(image, INDEX_TYPE, out, container.MAX_FILE)

    def find_archive(self, image: ImageRef, out: BinaryIO) -> bool:
        """Write the v1 archive of `image`, all of it; False if there is none."""
        return self._find(image, ARCHIVE_TYPE, out, MAX_BLOB)

    def _find(self, image: ImageRef, kind: str, out: BinaryIO, limit: int) -> bool:
        found = referrers(self._client, image, kind)
        if not found:
            return False
        self._read(image, self._client.manifest(image.with_digest(found[-1].digest)), out, limit)
        return True

    def keep(self, image: ImageRef, file: Path) -> str:
        return self.push(ImageRef(image.registry, image.repository), file, INDEX_TYPE, image)

    def push(
        self, ref: ImageRef, file: Path, kind: str, image: ImageRef | None, progress: Progress | None = None
    ) -> str:
        """Push `file`: under `ref`'s tag, else as a referrer of `image`. The URL of the artifact, by digest.

        kind: one of TYPES. image: what it describes, by its platform's manifest; with a tag, the artifact is a referrer
        too if that is in the same repository. Raises StoreError, RegistryError and IntegrityError.
        """
        subject = None if image is None or image.name != ref.name else self._subject(image)
        if subject is None and ref.tag is None:
            raise StoreError(
                f"oci://{ref.name} is not the repository of the image"
                + (f", which is {image.name}" if image is not None else ""),
                hint=f"give a tag: oci://{ref.name}:TAG",
            )
        pusher = Pusher(self._client)
        config = pusher.push_blob(ref, _EMPTY, _EMPTY_TYPE)
        blob = pusher.push_blob(ref, file, kind, progress=progress)
        title = digest_name(file)
        notes = {IMAGE_NOTE: f"{image.image}@{image.digest}"} if image is not None else {}
        manifest = {
            "schemaVersion": 2,
            "mediaType": OCI_MANIFEST,
            "artifactType": kind,
            "config": _descriptor(config),
            "layers": [{**_descriptor(blob), "annotations": {_TITLE: title}}],
            "annotations": notes,
        }
        if subject is not None:
            manifest["subject"] = subject
        raw = json.dumps(manifest, sort_keys=True).encode()
        if subject is not None and image is not None:
            attach(self._client, image, raw, kind, notes)
        if ref.tag is not None:
            pusher.put_manifest(ref, raw, OCI_MANIFEST)
        return f"oci://{ref.name}@{manifests.hash_of(raw)}"

    def pull(self, ref: ImageRef, out: BinaryIO, *, limit: int = MAX_BLOB, known: str | None = None) -> str | None:
        """Write what `ref` names: an artifact, or the index that is attached to an image (for this machine's platform).

        The digest of the artifact's blob; None, and nothing written, if that is `known`. Raises AbsentError,
        RegistryError, IntegrityError, and StoreError for what is neither.
        """
        try:
            document = self._client.manifest(ref)
        except NotFoundError as error:
            raise AbsentError(f"oci://{ref}: {error}") from None
        if document.is_index or _type_of(document) is None:
            image = ref.with_digest(self._client.resolve(ref).digest)
            found = referrers(self._client, image, INDEX_TYPE)
            if not found:
                raise AbsentError(f"no index is attached to {image} in its registry")
            document = self._client.manifest(image.with_digest(found[-1].digest))
        return self._read(ref, document, out, limit, known)

    def _subject(self, image: ImageRef) -> dict[str, object]:
        document = self._client.manifest(image)
        return {"mediaType": document.media_type, "digest": document.digest, "size": len(document.raw)}

    def _read(
        self, ref: ImageRef, document: Document, out: BinaryIO, limit: int, known: str | None = None
    ) -> str | None:
        what = f"the artifact {document.digest} of {ref.name}"
        layers = manifests.load_json(document.raw, what).get("layers")
        kind = _type_of(document)
        if kind is None or not isinstance(layers, list) or len(layers) != 1:
            raise StoreError(f"{what} is no index", hint="name an image that has an index, or an index that was pushed")
        blob = manifests.parse_descriptor(layers[0], f"the content of {what}")
        if blob.size > limit:
            raise StoreError(f"{what} has {blob.size} bytes, at most {limit} are allowed")
        if blob.digest == known:
            return None
        out.seek(0)
        out.truncate()
        hasher = sha256()
        with self._client.open_blob(ref, blob.digest, 0, blob.size) as stream:
            for chunk in stream:
                hasher.update(chunk)
                out.write(chunk)
        if f"sha256:{hasher.hexdigest()}" != blob.digest:
            raise IntegrityError(f"the content of {what} does not hash to {blob.digest}")
        return blob.digest


def _type_of(document: Document) -> str | None:
    kind = manifests.load_json(document.raw, f"manifest {document.digest}").get("artifactType")
    return kind if kind in TYPES else None


def _descriptor(item: Descriptor) -> dict[str, object]:
    return {"mediaType": item.media_type, "digest": item.digest, "size": item.size}
