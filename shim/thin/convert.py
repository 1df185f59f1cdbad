"""From a registry reference to a thin image in a registry: index, skeleton, layer, config, manifest, push."""

from __future__ import annotations

import gzip
import json
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import IO, Any, BinaryIO, cast

from shim.errors import UsageError
from shim.index import codec
from shim.index.build import Progress, build_index
from shim.index.model import Index
from shim.registry import manifest as manifests
from shim.registry import platform as platforms
from shim.registry.client import Descriptor, Document, Manifest, RegistryClient
from shim.registry.push import Pusher
from shim.registry.ref import ImageRef
from shim.thin.config import thin_config, volumes_of
from shim.thin.content import Spool
from shim.thin.skeleton import clean, select, write_tar

MAX_VOLUME_BYTES = 256 << 20
ALL = "all"
_LEVEL = 6  # of gzip: most of a layer is the index, which is packed already

OCI_LAYER = "application/vnd.oci.image.layer.v1.tar+gzip"
DOCKER_LAYER = "application/vnd.docker.image.rootfs.diff.tar.gzip"
OCI_CONFIG, DOCKER_CONFIG = manifests.IMAGE_CONFIGS


@dataclass(frozen=True, slots=True)
class ThinImage:
    """One platform's thin image, pushed. index: the facts of `clip-shim index`, of the original; digest: the thin
    image's manifest; layer: its only one; skeleton_entries, content_bytes: what that holds beside the index."""

    index: dict[str, Any]
    digest: str
    media_type: str
    manifest_bytes: int
    layer: Descriptor
    skeleton_entries: int
    content_bytes: int


@dataclass(frozen=True, slots=True)
class Converted:
    """digest: what the thin reference names now: an image's manifest, or an index of several platforms' ones."""

    digest: str
    images: list[ThinImage]


def convert(
    ref: ImageRef,
    target: ImageRef,
    client: RegistryClient,
    *,
    platform: str | None = None,
    volumes: Sequence[str] = (),
    max_volume_bytes: int = MAX_VOLUME_BYTES,
    index_file: bytes | None = None,
    progress: Progress | None = None,
    warn: Callable[[str], None] | None = None,
) -> Converted:
    """Index the image `ref` and push its thin image as `target` (a tag). The same input gives the same digests.

    platform: os/arch[/variant] (None: the host's); several with commas between, or "all" (Linux), give an image index.
    volumes: directories whose content the thin image is to have beside that of the declared volumes: engines copy it
    into new named volumes. index_file: the image's index that is there already, with its start profile if it has one,
    whose bytes become the thin image's; nothing is indexed then. Nothing of `target` is replaced before all is pushed.

    Raises UsageError, and what `build_index`, `codec.decode` and `Pusher` raise.
    """
    if target.digest is not None or target.tag is None:
        raise UsageError(f"{target}: a thin image is pushed under a tag", hint="leave the digest out")
    if target.image == ref.image:
        raise UsageError(
            f"{target} is the image itself: its tag would be lost, and what has no tag a registry may delete",
            hint=f"choose another name or tag, for example {target.name}:{target.tag}-thin",
        )
    if index_file is not None and (platform == ALL or "," in (platform or "")):
        raise UsageError("one index is of one platform", hint="convert the platforms one by one, each to its own tag")
    pusher = Pusher(client)
    document = client.manifest(ref)
    pinned = ref.with_digest(document.digest)
    chosen = _platforms(document, str(ref), platform)
    several = len(chosen) > 1 or platform == ALL
    made: list[tuple[ThinImage, Manifest]] = []
    for one in chosen:
        manifest = client.resolve(pinned, one)
        pusher.has_blob(target, manifest.config.digest)  # before hours of work: may we push there at all?
        where = replace(target, tag=None) if several else target
        image = _convert_one(
            pinned,
            one,
            manifest,
            where,
            client,
            pusher,
            index_file,
            volumes,
            max_volume_bytes,
            progress,
            warn or (lambda _: None),
        )
        made.append((image, manifest))
    digest = made[0][0].digest
    if several:
        raw, media_type = _image_index(document, made)
        digest = pusher.put_manifest(target, raw, media_type).digest
    return Converted(digest, [image for image, _ in made])


def _platforms(document: Document, what: str, platform: str | None) -> list[str | None]:
    if platform != ALL:
        return list(dict.fromkeys(platform.split(","))) if platform else [None]
    if not document.is_index:
        return [None]
    found = [entry.platform for entry in manifests.parse_index(document, f"the index of {what}")]
    linux = dict.fromkeys(str(one) for one in found if one is not None and one.os == "linux")
    if not linux:
        raise UsageError(f"the index of {what} names no image for Linux", hint="choose one with --platform")
    return list(linux)


def _convert_one(
    ref: ImageRef,
    platform: str | None,
    manifest: Manifest,
    target: ImageRef,
    client: RegistryClient,
    pusher: Pusher,
    index_file: bytes | None,
    volumes: Sequence[str],
    max_volume_bytes: int,
    progress: Progress | None,
    warn: Callable[[str], None],
) -> ThinImage:
    declared = volumes_of(manifest.config_raw)
    if index_file is not None:
        index, marker = _given(index_file, ref, manifest)
    else:
        with codec.Encoder() as encoder:
            index = build_index(ref, client, platform=platform, progress=progress, warn=warn, on_layer=encoder.layer)
            marker = encoder.finish(index)
    skeleton = select(index.tree, [*declared, *map(clean, volumes)], max_volume_bytes)
    for note in skeleton.notes:
        warn(note)
    with tempfile.TemporaryFile() as spooled, tempfile.NamedTemporaryFile(prefix="clip-thin-") as packed:
        spool = Spool(cast(BinaryIO, spooled))
        spool.fetch(index, ref, client, skeleton.files)
        diff_id = _write_layer(packed, lambda out: write_tar(skeleton, marker, out, spool.open))
        docker = manifest.media_type == manifests.DOCKER_MANIFEST  # its config may hold what OCI's does not know
        layer = pusher.push_blob(target, Path(packed.name), DOCKER_LAYER if docker else OCI_LAYER)
    created_by = f"clip-shim convert {index.image}@{index.digest}"
    raw_config = thin_config(index.config, diff_id, created_by)
    config = pusher.push_blob(target, raw_config, DOCKER_CONFIG if docker else OCI_CONFIG)
    raw = _json(
        {
            "schemaVersion": 2,
            "mediaType": manifest.media_type,
            "config": _descriptor(config),
            "layers": [_descriptor(layer)],
        }
    )
    digest = pusher.put_manifest(target, raw, manifest.media_type).digest
    return ThinImage(
        codec.summary(marker),
        digest,
        manifest.media_type,
        len(raw),
        layer,
        len(skeleton.entries),
        skeleton.content_bytes,
    )


def _given(data: bytes, ref: ImageRef, manifest: Manifest) -> tuple[Index, bytes]:
    """(index, its file) out of an index file that must be the image's. The file stays as it is, if it can: the daemon
    knows an index, and what its containers read, by the file's hash. Raises IndexFormatError and UsageError."""
    index = codec.decode(data)
    digests = [layer.digest for layer in manifest.layers]
    if (index.digest, index.config) != (manifest.digest, manifest.config_raw) or digests != [
        layer.digest for layer in index.layers
    ]:
        raise UsageError(
            f"the index is of {index.image}@{index.digest}, and {ref.image} for {manifest.platform} is"
            f" {manifest.digest}",
            hint="leave --index out, then the image is indexed now",
        )
    if index.image == ref.image:
        return index, data
    index = replace(index, image=ref.image)
    return index, codec.encode(index)


def _image_index(document: Document, made: list[tuple[ThinImage, Manifest]]) -> tuple[bytes, str]:
    media_type = document.media_type if document.is_index else manifests.OCI_INDEX
    entries = []
    for image, manifest in made:
        platform = platforms.parse(manifest.platform)
        named = {"architecture": platform.arch, "os": platform.os}
        if platform.variant:
            named["variant"] = platform.variant
        entry = _descriptor(Descriptor(image.media_type, image.digest, image.manifest_bytes))
        entries.append({**entry, "platform": named})
    return _json({"schemaVersion": 2, "mediaType": media_type, "manifests": entries}), media_type


class _Hashing:
    """Passes bytes on and hashes them."""

    def __init__(self, out: gzip.GzipFile) -> None:
        self.hasher = sha256()
        self._out = out

    def write(self, data: bytes) -> int:
        self.hasher.update(data)
        return self._out.write(data)


def _write_layer(file: IO[bytes], write: Callable[[BinaryIO], None]) -> str:
    """Write a tar, compressed, to `file`; its diff id. No name and no time goes into the gzip header."""
    with gzip.GzipFile(filename="", mode="wb", compresslevel=_LEVEL, fileobj=file, mtime=0) as packed:
        plain = _Hashing(packed)
        write(cast(BinaryIO, plain))
    file.flush()
    return f"sha256:{plain.hasher.hexdigest()}"


def _descriptor(item: Descriptor) -> dict[str, Any]:
    return {"mediaType": item.media_type, "digest": item.digest, "size": item.size}


def _json(value: object) -> bytes:
    return json.dumps(value, separators=(",", ":")).encode()
