"""What a build worker calls: make, store and fetch indexes. The command line is a thin layer over it.

    from shim import api

    info = api.create_from_oci_image(image_ref="docker.io/library/python:3.12", output_path="python.clip")
    url = api.push("python.clip", "s3://indexes/team/")

Everything raises `shim.errors.ShimError`s: one line, and `.hint`. Nothing is kept between calls: settings are read at
each call (/etc/clip-shim/config.yaml, CLIP_SHIM_*) unless given. Progress callbacks get (bytes done, bytes in all),
from any thread, one call at a time. Stable: names and arguments here change only with a new major version.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from shim import settings as settings_module
from shim.settings import Settings

Progress = Callable[[int, int], None]
PathLike = str | Path


@dataclass(frozen=True, slots=True)
class IndexInfo:
    """What an index is about. `digest` is the image's manifest for `platform`; sizes in bytes, image_bytes of the
    compressed layers; seek_points: places at which reading can begin."""

    image: str
    digest: str
    platform: str
    layers: int
    entries: int
    image_bytes: int
    index_bytes: int
    seek_points: int


@dataclass(frozen=True, slots=True)
class FileInfo:
    """A file that was fetched: `kind` is "index" or "archive", `image` what it was made of, if that was one."""

    kind: str
    image: str | None
    size: int


@dataclass(frozen=True, slots=True)
class ArchiveInfo:
    """What an archive holds. `digest` is the image's manifest (of a directory's archive: nothing that is anywhere);
    entries: names in its tree; data_bytes: of files; archive_bytes: of the file; left_out: names that Go clip cannot
    show, which clip-shim does."""

    image: str
    digest: str
    platform: str
    entries: int
    data_bytes: int
    archive_bytes: int
    left_out: int


def create_from_oci_image(
    image_ref: str,
    output_path: PathLike,
    checkpoint_mib: int = 2,
    *,
    platform: str | None = None,
    format: str = "native",  # noqa: A002 - what the command line calls it
    progress: Progress | None = None,
    warn: Callable[[str], None] | None = None,
    settings: Settings | None = None,
) -> IndexInfo:
    """Make the index of an image, straight from its registry, and write it to `output_path`, whole or not at all.

    checkpoint_mib: uncompressed MiB between restart points, 1 to 64. platform: os/arch[/variant], ours by default.
    format: "native", or "clip" for a file that Go clip mounts too, its own index before ours.
    warn: gets a line about what is left out. Raises ImageReferenceError (a local path, say), RegistryError, AuthError,
    NotFoundError, IntegrityError, LayerError, StoreError (the file cannot be written).
    """
    from shim.index import codec
    from shim.index.build import build_index
    from shim.registry.client import RegistryClient
    from shim.registry.hooks import Hooks
    from shim.registry.ref import ImageRef
    from shim.stores.base import whole_file

    ref = ImageRef.parse(image_ref)
    hooks = Hooks() if warn is None else Hooks(warn=warn)
    client = RegistryClient((settings or settings_module.load())["registries"], hooks=hooks)
    report = None if progress is None else lambda _layer, done, total: progress(done, total)
    with codec.Encoder() as encoder, closing(client):
        index = build_index(
            ref,
            client,
            platform=platform,
            checkpoint_mib=checkpoint_mib,
            progress=report,
            warn=warn,
            on_layer=encoder.layer,
        )
        data = encoder.finish(index)
    if format == "clip":
        from shim.goclip.write import encode_v2

        go, left_out = encode_v2(index)
        if left_out and warn is not None:
            warn(f"Go clip will not see {len(left_out)} of the names: devices, fifos, sockets, files with holes")
        data = go + data
    with whole_file(Path(output_path)) as out:
        out.write(data)
    return IndexInfo(**codec.summary(data))


def create_archive(
    output_path: PathLike,
    image_ref: str | None = None,
    *,
    rootfs: PathLike | None = None,
    platform: str | None = None,
    progress: Progress | None = None,
    warn: Callable[[str], None] | None = None,
    settings: Settings | None = None,
) -> ArchiveInfo:
    """Write a v1 archive, all data in it, to `output_path`, whole or not at all: of an image, straight from its
    registry, or of the directory `rootfs`. Go clip mounts it too.

    Raises UsageError (both or none given), ImageReferenceError, RegistryError, AuthError, NotFoundError,
    IntegrityError, LayerError, StoreError (the file cannot be written).
    """
    from shim.archive.create import archive_image
    from shim.archive.rootfs import archive_rootfs
    from shim.errors import UsageError
    from shim.index.codec import count_entries
    from shim.registry.client import RegistryClient
    from shim.registry.hooks import Hooks
    from shim.registry.ref import ImageRef
    from shim.stores.base import whole_file

    if (image_ref is None) == (rootfs is None):
        raise UsageError("an archive is made of an image or of a directory", hint="give a reference or a rootfs")
    with whole_file(Path(output_path)) as out:
        file = Path(out.name)
        if image_ref is None:
            assert rootfs is not None
            made = archive_rootfs(Path(rootfs), file, progress=progress, warn=warn)
        else:
            hooks = Hooks() if warn is None else Hooks(warn=warn)
            client = RegistryClient((settings or settings_module.load())["registries"], hooks=hooks)
            try:
                ref = ImageRef.parse(image_ref)
                made = archive_image(ref, client, file, platform=platform, progress=progress, warn=warn)
            finally:
                client.close()
    index = made.index
    return ArchiveInfo(
        index.image,
        index.digest,
        index.platform,
        count_entries(index.tree),
        index.layers[0].size,
        Path(output_path).stat().st_size,
        len(made.left_out),
    )


def push_archive(
    path: PathLike,
    url: str,
    pointer_path: PathLike,
    *,
    progress: Progress | None = None,
    settings: Settings | None = None,
) -> str:
    """Put an archive into S3 (`url`: s3://BUCKET/KEY) and write a small index of it to `pointer_path`, which containers
    and Go clip mount: data then come from S3 by ranges. The URL of the archive.

    Raises UsageError, IndexFormatError (no archive of `create_archive`), StoreError.
    """
    from shim.archive.remote import pointer
    from shim.errors import UsageError
    from shim.stores.base import whole_file
    from shim.stores.s3 import options_of
    from shim.stores.transfer import Stores
    from shim.stores.urls import S3Place, parse

    current = settings or settings_module.load()
    place = parse(url)
    if not isinstance(place, S3Place):
        raise UsageError(f"{url} is not in S3", hint="give s3://BUCKET/KEY")
    if place.is_store:
        place = S3Place(place.bucket, place.key + Path(path).name)
    data = pointer(Path(path), place, options_of(current["stores.s3"], place.bucket))
    with Stores(current) as stores:
        stores.s3(place).put(place, Path(path), replace=True, progress=progress)
    with whole_file(Path(pointer_path)) as out:
        out.write(data)
    return str(place)


def extract_archive(
    path: PathLike,
    directory: PathLike,
    *,
    progress: Progress | None = None,
    warn: Callable[[str], None] | None = None,
) -> int:
    """Unpack an archive, ours or Go clip's, into `directory` (new or empty); how many names were made.

    Every file's CRC-64 is checked. Raises UsageError, IndexFormatError, IntegrityError, StoreError.
    """
    from shim.archive.extract import extract

    return extract(Path(path), Path(directory), progress=progress, warn=warn)


def verify_archive(
    path: PathLike, *, progress: Progress | None = None, settings: Settings | None = None
) -> list[str] | None:
    """Read the data of an archive, or of a pointer to one, through; what is wrong with them, one line each. None: the
    file is the index of an image whose layers are in a registry. Raises IndexFormatError, StoreError."""
    import os

    from shim.archive.check import check_archive
    from shim.archive.source import FileReader, Reader, S3Reader
    from shim.index import codec
    from shim.stores.transfer import Stores
    from shim.stores.urls import S3Place, parse

    index = codec.read_index(path)
    if index.archive is None:
        return None
    if index.archive.location:
        place = parse(index.archive.location)
        assert isinstance(place, S3Place)
        with Stores(settings or settings_module.load()) as stores:
            reader: Reader = S3Reader(stores.s3(place), place)
            return check_archive(index, reader, progress=progress)
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        reader = FileReader(fd)
    finally:
        os.close(fd)
    return check_archive(index, reader, progress=progress)


def push(path: PathLike, url: str, *, progress: Progress | None = None, settings: Settings | None = None) -> str:
    """Store an index or archive; the URL it can be had at. URLs: see shim/stores/urls.py.

    s3://BUCKET/PREFIX/ (with the slash) and oci://REGISTRY/REPOSITORY call an index by its image, for image://REF to
    find. Raises UsageError, IndexFormatError, StoreError, RegistryError.
    """
    from shim.stores.transfer import Stores

    with Stores(settings or settings_module.load()) as stores:
        return stores.push(Path(path), url, progress)


def pull(url: str, output_path: PathLike, *, settings: Settings | None = None) -> FileInfo:
    """Fetch an index or archive to `output_path`, whole or not at all.

    oci://REGISTRY/REPOSITORY:TAG of an image fetches the index that is attached to it. Raises AbsentError, UsageError,
    IndexFormatError, StoreError, RegistryError, IntegrityError.
    """
    from shim.stores.transfer import Stores

    with Stores(settings or settings_module.load()) as stores:
        facts = stores.fetch(url, Path(output_path))
    return FileInfo(facts.kind, None if facts.image is None else str(facts.image), facts.size)


@dataclass(frozen=True, slots=True)
class BuildInfo:
    """What `build` stored: `kind` is "index" or "archive"; bytes: of the stored file; reason: why there is no index,
    "" if there is one. seconds: all of it."""

    kind: str
    url: str
    image: str
    digest: str
    platform: str
    bytes: int
    reason: str
    seconds: float


def build(
    image_ref: str,
    store: str,
    *,
    checkpoint_mib: int = 2,
    platform: str | None = None,
    progress: Progress | None = None,
    warn: Callable[[str], None] | None = None,
    settings: Settings | None = None,
) -> BuildInfo:
    """Index an image and store the index at the URL `store`; if it cannot be indexed, make an archive of it and store
    that instead, where the step `archive` of the setting `fallback` finds it.

    The files lie in a temporary directory (TMPDIR) meanwhile. Raises what `create_from_oci_image` does, when the
    archive fails too, and what `push` does. An image that is not there or not ours to read is not tried twice.
    """
    import tempfile
    import time

    from shim.errors import AuthError, ConfigError, NotFoundError, ShimError, UsageError
    from shim.stores import urls

    urls.parse(store)  # before any byte is fetched
    current = settings or settings_module.load()
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="clip-shim-") as directory:
        path, kind, reason = Path(directory) / "image.clip", "index", ""
        made: IndexInfo | ArchiveInfo
        try:
            made = create_from_oci_image(
                image_ref, path, checkpoint_mib, platform=platform, progress=progress, warn=warn, settings=current
            )
        except (UsageError, ConfigError, AuthError, NotFoundError):
            raise
        except ShimError as error:
            kind, reason = "archive", str(error)
            try:
                made = create_archive(
                    path, image_ref, platform=platform, progress=progress, warn=warn, settings=current
                )
            except ShimError as second:
                error.args = (f"{error} (and no archive: {second})",)
                raise error from None
        url = push(path, store, progress=progress, settings=current)
        size = path.stat().st_size
    seconds = round(time.monotonic() - started, 2)
    return BuildInfo(kind, url, made.image, made.digest, made.platform, size, reason, seconds)


def mount_archive(path: PathLike, directory: PathLike) -> None:
    """Mount an archive (a file, or s3://BUCKET/KEY of one that was pushed), or an index, read-only on a directory,
    until `unmount`. Data come when they are read, and every byte is checked.

    By way of the daemon, which is started if none runs: needs root. Raises MountError, TrustError, IndexFormatError …
    """
    from shim.attach import mount

    mount(str(path), Path(directory))


def unmount(directory: PathLike) -> None:
    """Undo `mount_archive`. Raises MountError: nothing of ours is mounted there, or it is in use."""
    from shim.attach import umount

    umount(Path(directory))
