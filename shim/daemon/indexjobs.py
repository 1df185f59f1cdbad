"""Jobs about indexes: what burns CPU (indexing an image) or loads much (boto3), kept out of the server."""

from __future__ import annotations

from contextlib import closing
from hashlib import sha256
from pathlib import Path

from shim import log
from shim.archive import remote
from shim.cache.seed import Seed
from shim.daemon.trust import registry_client
from shim.errors import AbsentError
from shim.index import codec, container
from shim.index.build import build_index
from shim.registry.ref import ImageRef
from shim.settings import Settings
from shim.stores import urls
from shim.stores.base import archive_name
from shim.stores.directory import DirectoryStore
from shim.stores.s3 import S3Store
from shim.stores.transfer import Stores
from shim.stores.urls import S3Place

_ARCHIVED = "archive:"  # begins the tag of an archive's index


def index_image(settings: Settings, image: ImageRef, path: str) -> str:
    """Write the index of `image` (by its platform's manifest) to `path`; the index's own digest.

    All its bytes come by, and a container is about to read some: they are put into the cache.
    """
    client = registry_client(settings)
    cache = settings.state_dir / "cache"
    with codec.Encoder() as encoder, closing(client):
        index = build_index(
            image,
            client,
            warn=lambda line: log.warning("indexing", image=str(image), note=line),
            taps=lambda: Seed(cache, settings["cache.free_low"]),
            on_layer=encoder.layer,
        )
        data = encoder.finish(index)
    codec.write_file(Path(path), data)
    return codec.index_digest(data)


def find_in_store(settings: Settings, url: str, image: ImageRef, path: str) -> bool:
    """Write the index that the store at `url` has of `image` to `path`; False: it has none."""
    with Stores(settings, registry_client(settings)) as stores, open(path, "wb") as out:
        return stores.store(url).find(image, out)


def fetch_by_name(settings: Settings, url: str, name: str, path: str) -> bool:
    """Write what the store at `url` has under `name` to `path`; False: nothing, or it has no names."""
    with Stores(settings, registry_client(settings)) as stores, open(path, "wb") as out:
        store = stores.store(url)
        return isinstance(store, S3Store | DirectoryStore) and store.fetch(name, out)


def archive_in_s3(settings: Settings, url: str, image: ImageRef, path: str) -> bool:
    """Write the index of the archive that the S3 store at `url` has of `image` to `path`; False: it has none."""
    with Stores(settings) as stores:
        store = stores.store(url)
        base = urls.parse(url)
        assert isinstance(store, S3Store)
        assert isinstance(base, S3Place)
        prefix = base.key if base.is_store else f"{base.key}/"
        try:
            data = remote.read_index(store, S3Place(base.bucket, prefix + archive_name(image)))
        except AbsentError:
            return False
    if data is None:
        return False
    Path(path).write_bytes(data)
    return True


def keep_in_store(settings: Settings, url: str, image: ImageRef, path: str) -> str:
    """Store the index at `path` in the store at `url`, unless it has one of `image`; where it is."""
    with Stores(settings, registry_client(settings)) as stores:
        return stores.store(url).keep(image, Path(path))


def pull_url(settings: Settings, url: str, path: str, known: str | None) -> str | None:
    """`Stores.pull` of an index to `path`. Of an archive its index alone comes, which says where the data are."""
    place = urls.parse(url)
    if isinstance(place, S3Place) and not place.is_store and (known is None or known.startswith(_ARCHIVED)):
        with Stores(settings, registry_client(settings)) as stores:
            data = remote.read_index(stores.s3(place), place)
        if data is not None:
            tag = _ARCHIVED + sha256(data).hexdigest()
            if tag == known:
                return None
            Path(path).write_bytes(data)
            return tag
    with Stores(settings, registry_client(settings)) as stores, open(path, "w+b") as out:
        return stores.pull(url, out, known=known, limit=container.MAX_FILE)
