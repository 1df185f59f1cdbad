"""Index stores against real servers: a directory, S3, registries without the referrers API, with and without auth."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from shim import settings
from shim.errors import AbsentError, AuthError, IndexFormatError, ShimError, StoreError, UsageError
from shim.index import codec
from shim.registry.client import MAX_PAGES, RegistryClient
from shim.registry.manifest import OCI_INDEX, OCI_MANIFEST
from shim.registry.ref import ImageRef
from shim.registry.referrers import referrers
from shim.settings import Settings
from shim.stores import urls
from shim.stores.base import IndexStore, name_of
from shim.stores.oci import INDEX_TYPE, OciStore
from shim.stores.s3 import S3Store
from shim.stores.transfer import Stores, look
from shim.stores.urls import S3Place
from tests.support.faultserver import FaultServer
from tests.support.indexes import sample
from tests.support.registry import Registry, TokenServer, gzip_of, make_client, tar_of
from tests.support.s3 import S3
from tests.unit.test_registry_auth import BASIC, write_docker_config


@pytest.fixture(scope="module")
def s3() -> Iterator[S3]:
    with S3() as server:
        yield server


@pytest.fixture(scope="module")
def registry() -> Iterator[Registry]:
    with Registry() as made:
        yield made


@pytest.fixture(autouse=True)
def credentials(s3: S3, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    for name, value in s3.env.items():
        monkeypatch.setenv(name, value)


def make_settings(s3: S3, **more: Any) -> Settings:
    loaded = settings.load(env={"CLIP_SHIM_CONFIG": os.devnull})
    return Settings({**loaded.values, "stores.s3": {"*": s3.options}, **more}, loaded.source)


def image_in(registry: Registry, name: str, content: bytes = b"x") -> ImageRef:
    """An image that is there, by its digest."""
    digest = registry.push_image(name, "v1", [gzip_of(tar_of({"file": content}))])
    return ImageRef(registry.host, name, "v1", digest)


def index_of(image: ImageRef, path: Path, spacing: int = 2) -> Path:
    """An index file that says it is of `image`."""
    index = sample()
    index.image, index.digest, index.checkpoint_mib = image.image, image.digest or "", spacing
    codec.write_index(path, index)
    return path


@pytest.fixture(params=["directory", "s3", "oci"])
def store(request: pytest.FixtureRequest, s3: S3, tmp_path: Path) -> IndexStore:
    if request.param == "directory":
        return Stores(make_settings(s3)).store(f"{tmp_path}/store/")
    if request.param == "s3":
        return Stores(make_settings(s3)).store(f"s3://{s3.bucket}/{tmp_path.name}/")
    return OciStore(make_client(tmp_path))


def found_in(store: IndexStore, image: ImageRef) -> bytes | None:
    out = io.BytesIO()
    return out.getvalue() if store.find(image, out) else None


def test_what_is_kept_is_found_and_the_first_stays(store: IndexStore, registry: Registry, tmp_path: Path) -> None:
    image = image_in(registry, f"kept/{tmp_path.name.lower()}")
    other = image_in(registry, f"kept/{tmp_path.name.lower()}-other")
    file = index_of(image, tmp_path / "a.clip")
    assert found_in(store, image) is None
    url = store.keep(image, file)
    assert found_in(store, image) == file.read_bytes()
    assert found_in(store, other) is None
    assert store.keep(image, file) == url
    if not isinstance(store, OciStore):
        store.keep(image, index_of(image, tmp_path / "b.clip", 4))
        assert found_in(store, image) == file.read_bytes()


def test_writers_at_once_leave_one_whole_index(store: IndexStore, registry: Registry, tmp_path: Path) -> None:
    image = image_in(registry, f"race/{tmp_path.name.lower()}")
    files = [index_of(image, tmp_path / f"{n}.clip", n + 1) for n in range(6)]
    whole = {file.read_bytes() for file in files}
    seen: list[bytes | None] = []

    def read() -> None:
        seen.extend(found_in(store, image) for _ in range(10))

    with ThreadPoolExecutor(8) as pool:
        done = [pool.submit(store.keep, image, file) for file in files]
        readers = [pool.submit(read) for _ in range(2)]
        for future in [*done, *readers]:
            future.result()
    assert found_in(store, image) in whole
    assert set(seen) <= {None, *whole}


@pytest.fixture(params=["open", "basic", "token"])
def guarded(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Registry]:
    if request.param == "token":
        tokens = TokenServer(tmp_path_factory.mktemp("tokens"))
        with Registry(tokens=tokens) as made:
            yield made
        tokens.close()
        return
    with Registry(htpasswd=request.param == "basic") as made:
        yield made


def logged_in(registry: Registry, home: Path) -> RegistryClient:
    write_docker_config(home, {"auths": {registry.host: {"auth": BASIC}}})
    return make_client(home)


def test_an_index_beside_its_image(guarded: Registry, s3: S3, tmp_path: Path) -> None:
    """As a referrer, under the fall-back tag; also by a tag of its own, and from the image's tag."""
    image = image_in(guarded, "team/app")
    file = index_of(image, tmp_path / "a.clip")
    client = logged_in(guarded, tmp_path)
    with Stores(make_settings(s3), client) as stores:
        base = f"oci://{guarded.host}/team/app"
        url = stores.push(file, base)
        listed = referrers(client, image, INDEX_TYPE)
        assert [f"{base}@{item.digest}" for item in listed] == [url]
        assert stores.push(file, base) == url
        assert len(referrers(client, image, INDEX_TYPE)) == 1
        manifest = json.loads(client.manifest(ImageRef.parse(url.removeprefix("oci://"))).raw)
        assert manifest["subject"]["digest"] == image.digest
        assert manifest["artifactType"] == INDEX_TYPE
        tagged = stores.push(file, f"{base}:index")
        for source in (url, tagged, f"{base}:v1", f"{base}@{image.digest}", f"{base}:index"):
            assert stores.fetch(source, tmp_path / "b.clip").image == image
            assert (tmp_path / "b.clip").read_bytes() == file.read_bytes()
        elsewhere = stores.push(file, f"oci://{guarded.host}/indexes/all:app")
        assert stores.fetch(elsewhere, tmp_path / "c.clip").image == image
        with pytest.raises(StoreError, match="is not the repository of the image"):
            stores.push(file, f"oci://{guarded.host}/indexes/all")
        image_in(guarded, "team/bare")
        with pytest.raises(AbsentError, match="no index is attached"):
            stores.fetch(f"oci://{guarded.host}/team/bare:v1", tmp_path / "d.clip")
        with pytest.raises(AbsentError):
            stores.fetch(f"oci://{guarded.host}/team/app:none", tmp_path / "d.clip")
    assert not (tmp_path / "d.clip").exists()
    if guarded.tokens is not None:
        with pytest.raises(AuthError):
            found_in(OciStore(make_client(tmp_path / "nobody")), image)


def test_two_writers_of_the_referrers_tag_are_both_listed(registry: Registry, tmp_path: Path) -> None:
    image = image_in(registry, "both")
    clients = [make_client(tmp_path) for _ in range(2)]
    files = [index_of(image, tmp_path / f"{n}.clip", n + 1) for n in range(2)]
    with ThreadPoolExecutor(2) as pool:
        jobs = [pool.submit(OciStore(client).keep, image, file) for client, file in zip(clients, files, strict=True)]
        kept = {job.result() for job in jobs}
    assert {f"oci://{image.name}@{item.digest}" for item in referrers(clients[0], image, INDEX_TYPE)} <= kept
    assert found_in(OciStore(clients[0]), image) in {file.read_bytes() for file in files}


def test_a_registry_with_the_referrers_api_is_asked_by_it(registry: Registry, tmp_path: Path) -> None:
    """distribution 2.8 has none: a proxy answers for it, and confirms the subject as such a registry does."""
    image = image_in(registry, "api")
    with FaultServer(upstream=registry.host) as server:
        server.faults.add("PUT", r"/manifests/sha256:", headers={"OCI-Subject": str(image.digest)})
        client = make_client(tmp_path)
        there = ImageRef(server.host, "api", "v1", image.digest)
        url = OciStore(client).keep(there, index_of(there, tmp_path / "a.clip"))
        assert server.count("PUT", r"/manifests/sha256-") == 0, "the tag is for registries without the API"
        digest = url.rpartition("@")[2]
        listed = {"mediaType": "application/vnd.oci.image.manifest.v1+json", "digest": digest, "size": 1}
        index = {"schemaVersion": 2, "mediaType": "application/vnd.oci.image.index.v1+json"}
        other = {**listed, "artifactType": "application/other", "digest": image.digest}
        body = json.dumps({**index, "manifests": [{**listed, "artifactType": INDEX_TYPE}, other]}).encode()
        server.faults.add("GET", r"/referrers/", status=200, body=body)
        assert found_in(OciStore(client), there) == (tmp_path / "a.clip").read_bytes()
        assert server.count("GET", r"/manifests/sha256-") == 0


def test_a_list_of_referrers_is_read_page_by_page(tmp_path: Path) -> None:
    """OCI distribution-spec 1.1 "Listing Referrers": a Link header leads on."""
    digests = ["sha256:" + f"{number:064x}" for number in range(MAX_PAGES + 4)]
    with FaultServer() as server, FaultServer() as other:
        image = ImageRef(server.host, "api", "v1", digests[0])
        path = f"/v2/api/referrers/{image.digest}"

        def page(number: int, link: str | None, at: str = "", where: FaultServer = server) -> None:
            entry = {"mediaType": OCI_MANIFEST, "digest": digests[number], "size": 1, "artifactType": INDEX_TYPE}
            index = {"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": [entry]}
            headers = {"Content-Type": OCI_INDEX, **({} if link is None else {"Link": link})}
            pattern = f"{path}.*{at or '[?]artifactType=[^&]*$'}"
            where.faults.add("GET", pattern, status=200, body=json.dumps(index).encode(), headers=headers)

        def listed() -> list[str]:
            return [item.digest for item in referrers(make_client(tmp_path), image, INDEX_TYPE)]

        page(0, f'<{path}?artifactType=x&last=1>; rel="next"')
        page(1, f'<?last=2>; title="a"; rel=next, <{path}>; rel="first"', "last=1")
        page(2, f'<{path}>; rel="prev", <{server.url}{path}?last=3>; rel="next"', "last=2")
        page(3, f'<{path}?last=4>; rel="nextish"', "last=3")
        assert listed() == digests[:4]
        server.faults.clear()
        for number in range(len(digests)):
            page(number, f'<{path}?last={number + 1}.>; rel="next"', f"last={number}[.]" if number else "")
        assert listed() == digests[:MAX_PAGES]
        server.faults.clear()
        page(0, f'<{path}?last=1>; rel="next"')
        server.faults.add("GET", "last=1", status=403)
        with pytest.raises(AuthError):
            listed()
        server.faults.clear()
        page(0, f'<{other.url}{path}?last=1>; rel="next"')
        page(1, None, "last=1", other)
        assert listed() == digests[:2]
        assert "authorization" not in other.requests()[0].headers


def test_s3_by_url(s3: S3, registry: Registry, tmp_path: Path) -> None:
    image = ImageRef("registry.example.com:5000", "team/app", "v1", "sha256:" + "0" * 64)
    file = index_of(image, tmp_path / "a.clip")
    base = f"s3://{s3.bucket}/by-url"
    with Stores(make_settings(s3)) as stores:
        url = stores.push(file, f"{base}/")
        assert url == f"{base}/{name_of(image)}"
        named = stores.push(file, f"{base}/named.clip")
        by_hash = f"{base}/{codec.index_digest(file.read_bytes()).replace(':', '-')}.clip"
        for source in (url, named, by_hash):
            assert stores.fetch(source, tmp_path / "b.clip").image == image
        tag = stores.pull(named, io.BytesIO())
        assert stores.pull(named, io.BytesIO(), known=tag) is None
        stores.push(index_of(image, tmp_path / "c.clip", 5), f"{base}/named.clip")
        assert stores.pull(named, io.BytesIO(), known=tag) not in (None, tag)
        with pytest.raises(AbsentError, match="no such object"):
            stores.fetch(f"{base}/none", tmp_path / "d.clip")
        with pytest.raises(AbsentError, match="no such bucket"):
            stores.fetch("s3://no-such-bucket/none", tmp_path / "d.clip")
        with pytest.raises(StoreError, match="at most 10"):
            stores.pull(named, io.BytesIO(), limit=10)
        (tmp_path / "text").write_text("not an index")
        s3.client().upload_file(str(tmp_path / "text"), s3.bucket, "by-url/text")
        with pytest.raises(IndexFormatError):
            stores.fetch(f"{base}/text", tmp_path / "d.clip")
        with pytest.raises(IndexFormatError):
            stores.push(tmp_path / "text", f"{base}/text")
    assert not (tmp_path / "d.clip").exists()
    assert [path.name for path in tmp_path.glob(".*clip*")] == []


def test_large_files_go_in_parts_and_a_failure_leaves_none(s3: S3, tmp_path: Path) -> None:
    part = 5 << 20
    store = S3Store(S3Place(s3.bucket, "parts/"), s3.options, part=part)
    file = tmp_path / "large"
    file.write_bytes(os.urandom(part) * 2 + b"rest")
    place = S3Place(s3.bucket, "parts/large")
    seen: list[int] = []
    assert store.put(place, file, progress=lambda done, _: seen.append(done))
    assert seen == sorted(seen)
    assert seen[-1] == 2 * part + 4
    assert not store.put(place, file)
    assert store.put(place, file, replace=True)
    out = io.BytesIO()
    store.get(place, out)
    assert out.getvalue() == file.read_bytes()
    with pytest.raises(RuntimeError, match="on purpose"):
        store.put(S3Place(s3.bucket, "parts/other"), file, progress=_fail)
    assert store.size(S3Place(s3.bucket, "parts/other")) is None
    assert s3.uploads() == 0


def _fail(_done: int, _total: int) -> None:
    raise RuntimeError("on purpose")


def test_s3_refuses_with_words_that_hold_no_secret(s3: S3, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "x"
    file.write_text("x")
    place = S3Place(s3.bucket, "refused")
    for env, said in (
        (s3.reader_env, "refused the credentials"),
        ({**s3.env, "AWS_SECRET_ACCESS_KEY": "wrong-secret-000"}, "refused the credentials"),
        ({"AWS_ACCESS_KEY_ID": "", "AWS_SECRET_ACCESS_KEY": ""}, "credentials"),
    ):
        for name, value in env.items():
            monkeypatch.setenv(name, value)
        with pytest.raises(StoreError, match=said) as caught:
            S3Store(place, s3.options).put(place, file)
        assert not any(len(value) > 8 and value in str(caught.value) for value in env.values())
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "x")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "x")
    with pytest.raises(StoreError, match="cannot be reached"):
        S3Store(place, {**s3.options, "endpoint": "http://127.0.0.1:1"}).size(place)


def test_a_server_without_conditional_writes(s3: S3, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Such a server answers 501 to the condition."""
    from botocore.exceptions import ClientError

    store = S3Store(S3Place(s3.bucket, "plain/"), s3.options)
    client = store._client()
    put: Callable[..., Any] = client.put_object

    def refuse(**more: Any) -> Any:
        if "IfNoneMatch" in more:
            raise ClientError(
                {"Error": {"Code": "NotImplemented"}, "ResponseMetadata": {"HTTPStatusCode": 501}}, "PutObject"
            )
        return put(**more)

    monkeypatch.setattr(client, "put_object", refuse)
    file, other = tmp_path / "x", tmp_path / "y"
    file.write_text("x")
    other.write_text("y")
    place = S3Place(s3.bucket, "plain/x")
    assert store.put(place, file)
    assert not store.put(place, other)
    out = io.BytesIO()
    store.get(place, out)
    assert out.getvalue() == b"x"


@pytest.mark.parametrize(
    "url",
    [
        "",
        "http://x/y",
        "s3://",
        "s3://UPPER/x",
        "s3://b/../x",
        "s3://bucket//x",
        f"s3://bucket/{'k' * 1025}",
        "oci://",
        "oci://registry.example.com/UPPER",
        "oci:///x",
        "file://relative",
        "a\nb",
    ],
)
def test_urls_that_mean_nothing(url: str) -> None:
    with pytest.raises(UsageError):
        urls.parse(url)


def test_tables_that_are_wrong(s3: S3) -> None:
    for table, said in (
        ({"*": {"endpont": "x"}}, "unknown key `endpont`"),
        ({"*": {"path_style": "yes"}}, "true or false"),
        ({"*": 3}, "must be a table"),
    ):
        with pytest.raises(ShimError, match=said):
            Stores(make_settings(s3, **{"stores.s3": table})).store("s3://bucket/x/")


def test_a_file_by_path(s3: S3, tmp_path: Path) -> None:
    image = ImageRef("registry.example.com", "team/app", "v1", "sha256:" + "0" * 64)
    file = index_of(image, tmp_path / "a.clip")
    with Stores(make_settings(s3)) as stores:
        assert stores.push(file, f"{tmp_path}/b.clip") == f"file://{tmp_path}/b.clip"
        assert stores.push(file, f"{tmp_path}/store/") == f"file://{tmp_path}/store/{name_of(image)}"
        assert stores.fetch(f"file://{tmp_path}/b.clip", tmp_path / "c.clip").image == image
        with pytest.raises(AbsentError):
            stores.fetch(f"{tmp_path}/none", tmp_path / "d.clip")
    assert look(tmp_path / "store" / name_of(image)).image == image
