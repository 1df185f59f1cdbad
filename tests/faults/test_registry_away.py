"""A registry that is away for N seconds against a deadline of M, and tokens that live for a minute over an hour of
reading: in time that tests turn themselves. Real HTTP servers, the daemon's own client, cache and fetcher."""

from __future__ import annotations

import random
import threading
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path

import pytest

from shim.cache.fetch import LazyLayer
from shim.cache.pool import FetchPool
from shim.cache.store import LayerCache
from shim.errors import ShimError
from shim.registry.credentials import CredentialStore
from shim.registry.ref import ImageRef
from shim.registry.retry import RetryPolicy
from tests.support.faultserver import FaultServer
from tests.support.lazylayers import SampleLayer, sample_layer
from tests.support.registry import Registry, TokenServer, World, make_client, sha256

SAMPLE = sample_layer(8 << 20)
TROUBLE = {
    "no answer": {"drop": True},
    "503": {"status": 503},
    "404": {"status": 404},
    "401": {"status": 401},
    "cut short": {"truncate_at": 10},
    "wrong bytes": {"corrupt_at": 100},
}


@contextmanager
def lazy_layer(home: Path, host: str, world: World, deadline: float) -> Iterator[LazyLayer]:
    """SAMPLE as image team/app of a registry, read lazily; pauses and backoffs take no time but the world's."""
    lock = threading.Lock()

    def pause(seconds: float) -> None:
        with lock:
            world.extra += seconds

    client = make_client(home, hooks=world, policy=RetryPolicy(), credentials=CredentialStore({"HOME": str(home)}))
    ref = ImageRef.parse(f"{host}/team/app:v1")
    digest = sha256(SAMPLE.blob)
    cache, pool = LayerCache(home / "cache"), FetchPool(4)
    lazy = LazyLayer(
        node_id=20,
        name=b"x",
        compression=SAMPLE.compression,
        cached=cache.layer(SAMPLE.diff_id, SAMPLE.spans),
        open_range=lambda start, end: client.open_blob(ref, digest, start, end),
        pool=pool,
        readahead=0,
        read_deadline=deadline,
        clock=world.clock,
        pause=pause,
    )
    yield lazy
    lazy.close()
    pool.close()
    cache.close()
    client.close()


def read(lazy: LazyLayer, offset: int, size: int, sample: SampleLayer = SAMPLE) -> bool:
    """Whether the bytes are right; raises the read's error."""
    cached = lazy.read_cached(offset, size)
    if cached is None:
        future: Future[bytes] = Future()
        lazy.read_missing(
            offset,
            size,
            lambda got: future.set_exception(got) if isinstance(got, ShimError) else future.set_result(got),
        )
        cached = future.result(30)
    return bytes(cached) == sample.data[offset : offset + size]


@pytest.mark.parametrize("what", TROUBLE)
@pytest.mark.parametrize("deadline", [10, 60])
@pytest.mark.parametrize("share", [0.5, 2])
def test_away(tmp_path: Path, what: str, deadline: float, share: float) -> None:
    """Shorter than the deadline: the bytes. Longer: an error, not before the deadline is near, and the next read works
    as soon as the registry does."""
    world = World()
    with FaultServer() as server, lazy_layer(tmp_path, server.host, world, deadline) as lazy:
        server.serve(f"/v2/team/app/blobs/{sha256(SAMPLE.blob)}", SAMPLE.blob)
        began = world.clock()
        back = began + share * deadline
        server.faults.add("GET", "/blobs/", when=lambda: world.clock() < back, **TROUBLE[what])
        if share < 1:
            assert read(lazy, 0, 1000)
            return
        with pytest.raises(ShimError):
            read(lazy, 0, 1000)
        assert 0.6 * deadline < world.clock() - began < 1.6 * deadline
        world.extra = max(world.extra, back - began + world.extra)
        assert read(lazy, 0, 1000)


def test_tokens_that_live_for_a_minute(tmp_path: Path) -> None:
    """An hour of reads, a new span every half a minute: each token is replaced before it ends, no read fails."""
    world = World()
    tokens = TokenServer(tmp_path / "tokens", life=60, anonymous=True)
    try:
        with Registry(tokens=tokens) as registry, FaultServer(registry.host) as server:
            registry.push_image("team/app", "v1", [SAMPLE.blob])
            with lazy_layer(tmp_path, server.host, world, 60.0) as lazy:
                starts = [SAMPLE.spans.ustart(i) for i in range(SAMPLE.spans.count)]
                random.Random(1).shuffle(starts)
                for start in starts[:120]:
                    assert read(lazy, start, 10)
                    world.extra += 30
                asked = server.count("GET", "/blobs/")
                assert asked >= 40
                # each token serves two reads; nothing is asked with one that has ended: only the first is a 401
                assert asked - 1 <= 2 * tokens.issued + 1
                assert tokens.issued <= 61
    finally:
        tokens.close()
