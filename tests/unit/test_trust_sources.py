"""Where references may lead, by where they stand: repositories, buckets, and rules of one source."""

from __future__ import annotations

import os
from typing import Any

import pytest

from shim import settings
from shim.daemon.trust import Trust, check_registry
from shim.errors import ConfigError, TrustError
from shim.registry.ref import ImageRef
from shim.settings import Settings
from shim.stores.urls import S3Place

HOST = "registry.example.com:5000"


def make(**more: Any) -> Settings:
    loaded = settings.load(env={"CLIP_SHIM_CONFIG": os.devnull})
    return Settings({**loaded.values, **more}, loaded.source)


@pytest.mark.parametrize(
    ("repository", "item", "good"),
    [
        ("team/app", f"{HOST}/team", True),
        ("team/app", f"{HOST}/team/", True),
        ("team/app", f"{HOST}/team/*", True),
        ("team/app", f"{HOST}/team/app", True),
        ("team/app", "registry.example.com/team", True),
        ("team/app", "*/team", True),
        ("team/app", HOST, True),
        ("teamx/app", f"{HOST}/team", False),
        ("team", f"{HOST}/team/app", False),
        ("other", f"{HOST}/team", False),
        ("team/app", "other.example.com/team", False),
        ("", f"{HOST}/team", False),
    ],
)
def test_a_repository(repository: str, item: str, good: bool) -> None:
    if good:
        check_registry(HOST, (item,), repository)
    else:
        with pytest.raises(TrustError):
            check_registry(HOST, (item,), repository)


def test_loopback_is_not_any_host() -> None:
    with pytest.raises(TrustError):
        check_registry("127.0.0.1:5000", ("*/team",), "team/app")


def test_a_source_has_rules_of_its_own() -> None:
    rules = {"annotation": {"registries": [f"{HOST}/team"]}, "marker": {"stores": []}}
    trust = Trust(make(**{"trust.sources": rules, "stores.lookup": ("s3://indexes/team/", "oci")}))
    inside, outside = ImageRef(HOST, "team/app", "v1"), ImageRef(HOST, "other", "v1")
    trust.check_registry("annotation", inside)
    trust.check_registry("marker", outside)
    with pytest.raises(TrustError):
        trust.check_registry("annotation", outside)
    assert [trust.is_narrowed(source) for source in ("annotation", "marker", "env")] == [True, True, False]
    place = S3Place("indexes", "team/x.clip")
    trust.check_store("annotation", place)
    with pytest.raises(TrustError):
        trust.check_store("marker", place)


@pytest.mark.parametrize(
    ("place", "trusted", "good"),
    [
        (S3Place("indexes", "team/x"), ("s3://indexes",), True),
        (S3Place("indexes", "team/x"), ("s3://indexes/team/",), True),
        (S3Place("indexes", "team/x"), ("s3://indexes/team/x",), True),
        (S3Place("indexes", "team/x"), ("*",), True),
        (S3Place("indexes", "teamx/x"), ("s3://indexes/team",), False),
        (S3Place("indexesx", "team/x"), ("s3://indexes",), False),
        (S3Place("indexes", "team/x"), ("",), False),
        (S3Place("indexes", "team/x"), (), False),
    ],
)
def test_a_bucket(place: S3Place, trusted: tuple[str, ...], good: bool) -> None:
    trust = Trust(make(**{"trust.stores": trusted}))
    if good:
        trust.check_store("annotation", place)
    else:
        with pytest.raises(TrustError, match=r"neither `stores` nor `trust.stores`"):
            trust.check_store("annotation", place)


@pytest.mark.parametrize(
    ("rules", "said"),
    [
        ({"anotation": {}}, "is no source"),
        ({"annotation": ["x"]}, "must be a table of registries and stores"),
        ({"annotation": {"registry": []}}, "must be a table of registries and stores"),
        ({"annotation": {"registries": "x"}}, "must be a list of texts"),
        ({"annotation": {"stores": [1]}}, "must be a list of texts"),
    ],
)
def test_rules_that_are_wrong(rules: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        Trust(make(**{"trust.sources": rules}))
