"""Where layers' bytes come from: registries and archives, the first that has them."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

from shim.archive.source import ArchiveBytes
from shim.daemon.archives import ArchiveStream
from shim.daemon.trust import registry_client
from shim.errors import IntegrityError, RegistryError, ShimError, StoreError
from shim.registry.client import RegistryClient
from shim.registry.credentials import CredentialStore
from shim.registry.hooks import Hooks
from shim.registry.ref import ImageRef
from shim.registry.retry import RetryPolicy
from shim.registry.stream import BlobStream
from shim.settings import Settings

_IMPATIENT_SECONDS = 4.0


@dataclass(slots=True)
class Source:
    """Where a layer's compressed bytes can be had: an image's repository, and the blob's digest there.

    failed: when it last did (monotonic), 0 for never.
    """

    ref: ImageRef
    digest: str
    failed: float = 0.0
    archive: ArchiveBytes | None = None  # where they are instead, if the image is an archive

    @property
    def place(self) -> str:
        """The host, for messages."""
        return self.archive.reader.place if self.archive is not None else self.ref.registry

    def is_same(self, other: Source) -> bool:
        """Whether it is the same blob of the same repository, whatever the tag."""
        return (self.place, self.ref.name, self.digest) == (other.place, other.ref.name, other.digest)

    def stream(self, client: RegistryClient, start: int, end: int) -> BlobStream | ArchiveStream:
        if self.archive is not None:
            return ArchiveStream(self.archive, start, end)
        return client.open_blob(self.ref, self.digest, start, end)


class Origins:
    """The node's clients of registries, one for each temper. Thread-safe. `client`: the patient one."""

    def __init__(self, settings: Settings) -> None:
        hooks = Hooks()
        credentials = CredentialStore(hooks=hooks)
        pool_size = settings["fetch.threads"] * 2
        self.client = registry_client(settings, hooks=hooks, credentials=credentials, pool_size=pool_size)
        # for a layer that another repository has too: a host that hangs is left after seconds, not after half a minute
        self._impatient = registry_client(
            settings,
            hooks=hooks,
            credentials=credentials,
            policy=RetryPolicy(attempts=1, mirror_attempts=1),
            pool_size=pool_size,
            connect_timeout=_IMPATIENT_SECONDS,
            read_timeout=_IMPATIENT_SECONDS,
        )

    @contextmanager
    def open(self, layer: str, sources: Iterable[Source], start: int, end: int) -> Iterator[Iterator[bytes]]:
        """Compressed bytes of a layer from the first of its sources that has it; one that failed lately comes last.

        Raises RegistryError, StoreError, IntegrityError, also while the bytes come.
        """
        order = sorted(sources, key=lambda source: source.failed)
        trouble: ShimError = RegistryError(f"nobody knows where layer {layer[:12]} is")
        for source in order:
            client = self.client if source is order[-1] else self._impatient
            try:
                stream = source.stream(client, start, end)
                stream.__enter__()
            except (RegistryError, StoreError, IntegrityError) as error:
                source.failed = time.monotonic()
                if not (isinstance(trouble, RegistryError | StoreError) and trouble.retryable):
                    trouble = error  # one that may pass counts more than another repository's "no such blob"
                continue
            try:
                yield iter(stream)
            except IntegrityError:
                stream.report_corrupt()
                source.failed = time.monotonic()
                raise
            except (RegistryError, StoreError):
                source.failed = time.monotonic()
                raise
            finally:
                stream.close()
            return
        raise trouble

    def traffic(self) -> dict[str, Any]:
        """Requests and bytes from registries since the start, by host and kind."""
        total: dict[str, dict[str, int]] = {}
        for client in (self.client, self._impatient):
            for (host, kind), count in sorted(client.counters.snapshot().items()):
                row = total.setdefault(f"{host} {kind}", {})
                for name, number in asdict(count).items():
                    row[name] = row.get(name, 0) + number
        return total

    def close(self) -> None:
        """Close idle connections."""
        self.client.close()
        self._impatient.close()
