"""References: the distribution grammar, Docker's short forms, and the refusal of everything local."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shim.errors import ImageReferenceError, UsageError
from shim.registry import platform as platforms
from shim.registry.platform import Platform
from shim.registry.ref import ImageRef

HEX = "0123456789abcdef" * 4
DIGEST = "sha256:" + HEX


@pytest.mark.parametrize(
    ("text", "canonical"),
    [
        ("ubuntu", "docker.io/library/ubuntu:latest"),
        ("ubuntu:24.04", "docker.io/library/ubuntu:24.04"),
        ("docker.io/ubuntu", "docker.io/library/ubuntu:latest"),
        ("index.docker.io/ubuntu", "docker.io/library/ubuntu:latest"),
        ("registry-1.docker.io/library/ubuntu", "docker.io/library/ubuntu:latest"),
        ("bitnami/redis", "docker.io/bitnami/redis:latest"),
        ("docker://quay.io/a/b/c:v1", "quay.io/a/b/c:v1"),
        ("localhost/x", "localhost/x:latest"),
        ("localhost:5000/x:y", "localhost:5000/x:y"),
        ("127.0.0.1:5000/x", "127.0.0.1:5000/x:latest"),
        ("[::1]:5000/x/y:z", "[::1]:5000/x/y:z"),
        ("[fe80::1]/x", "[fe80::1]/x:latest"),
        ("Uppercase/lower", "Uppercase/lower:latest"),
        (f"ubuntu@{DIGEST}", f"docker.io/library/ubuntu@{DIGEST}"),
        (f"r.io/x:t@{DIGEST}", f"r.io/x:t@{DIGEST}"),
        ("r.io/a__b/c--d.e_f", "r.io/a__b/c--d.e_f:latest"),
        ("docker.io/library/oci:1.2", "docker.io/library/oci:1.2"),
        ("dir", "docker.io/library/dir:latest"),
        ("r.io/x:" + "t" * 128, "r.io/x:" + "t" * 128),
        ("r.io/" + "a" * 255, "r.io/" + "a" * 255 + ":latest"),
        (f"x@sha512:{HEX}{HEX}", f"docker.io/library/x@sha512:{HEX}{HEX}"),
    ],
)
def test_canonical(text: str, canonical: str) -> None:
    ref = ImageRef.parse(text)
    assert str(ref) == canonical
    assert ImageRef.parse(canonical) == ref


@pytest.mark.parametrize(
    "text",
    [
        "",
        "Ubuntu",
        "ubuntu:",
        "ubuntu:-x",
        "ubuntu:" + "t" * 129,
        "ubuntu@sha256:" + "a" * 63,
        "ubuntu@sha256:" + "A" * 64,
        "ubuntu@md5:" + "a" * 32,
        f"ubuntu@{DIGEST}@{DIGEST}",
        "r.io/" + "a" * 256,
        "r.io/",
        "r.io//x",
        "r.io/x/",
        "r.io/x..y",
        "r.io/../x",
        "r.io:99999/x",
        "r.io:0/x",
        "-r.io/x",
        "[::1/x",
        "[zz::1]:5/x",
        "a b",
        "a\nb",
        "a\0b",
        "r.io/x\n",
        HEX,
        "http://r.io/x",
        "https://r.io/x:y",
        "user@r.io/x",
        "user:pw@r.io/x",
        "r.io/x?y=z",
        "r.io/x#y",
        "x" * 5000,
        "r.io/x:tag\n",
        "r.io\u0131/x",
        "r.io/x:\u0661",
    ],
)
def test_malformed(text: str) -> None:
    with pytest.raises(ImageReferenceError) as caught:
        ImageRef.parse(text)
    assert caught.value.hint
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 500
    assert caught.value.exit_code == 2


@pytest.mark.parametrize(
    "text",
    [
        "/tmp/ubuntu:latest",
        "/tmp/ubuntu",
        "./ubuntu",
        "../x:y",
        "~/x",
        ".",
        "oci:/tmp/ubuntu",
        "oci:layout/dir:tag",
        "oci:./x",
        "oci:",
        "oci:ubuntu",
        "oci:ubuntu:24.04",
        "oci://tmp/x",
        "oci-archive:x.tar",
        "oci-archive:/tmp/x.tar:latest",
        "docker-archive:x.tar",
        "docker-daemon:ubuntu:latest",
        "containers-storage:localhost/x",
        "dir:/tmp/x",
        "file:///tmp/x",
        "file:/tmp/x",
    ],
)
def test_local_is_refused_with_the_way_out(text: str) -> None:
    with pytest.raises(ImageReferenceError, match="registry reference is needed") as caught:
        ImageRef.parse(text)
    assert "docker.io/library/ubuntu:24.04" in (caught.value.hint or "")
    assert "local" in str(caught.value) or "this machine" in str(caught.value)


def test_a_name_that_is_a_local_file(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "build").mkdir()
    (tmp_path / "build" / "image").mkdir()
    (tmp_path / "ubuntu").mkdir()
    (tmp_path / "image.tar").write_bytes(b"")
    for text in ("build/image", "build/image:latest", f"build/image@{DIGEST}", "image.tar", "image.tar:x"):
        with pytest.raises(ImageReferenceError, match="local file") as caught:
            ImageRef.parse(text)
        assert f"docker://{text}" in (caught.value.hint or "")
    assert ImageRef.parse("ubuntu").repository == "library/ubuntu"  # no path separator: a short name
    assert ImageRef.parse("docker://build/image").name == "docker.io/build/image"
    assert ImageRef.parse("build/image", local_paths=False).name == "docker.io/build/image"


def test_url_hint_shows_the_same_image() -> None:
    with pytest.raises(ImageReferenceError) as caught:
        ImageRef.parse("https://quay.io/org/app:1")
    assert "quay.io/org/app:1" in (caught.value.hint or "")


@given(st.text(max_size=80))
def test_any_text_parses_to_a_fixed_point_or_is_refused(text: str) -> None:
    try:
        ref = ImageRef.parse(text, local_paths=False)
    except ImageReferenceError:
        return
    assert ImageRef.parse(str(ref), local_paths=False) == ref


def test_with_digest() -> None:
    ref = ImageRef.parse("ubuntu:24.04")
    assert str(ref.with_digest(DIGEST)) == f"docker.io/library/ubuntu:24.04@{DIGEST}"
    assert ref.with_digest(DIGEST).reference == DIGEST
    assert ref.reference == "24.04"
    with pytest.raises(ImageReferenceError):
        ref.with_digest("sha256:zz")


@pytest.mark.parametrize(
    ("text", "normal"),
    [
        ("linux/amd64", "linux/amd64"),
        ("linux/x86_64", "linux/amd64"),
        ("linux/amd64/v1", "linux/amd64"),
        ("linux/amd64/v3", "linux/amd64/v3"),
        ("linux/aarch64", "linux/arm64"),
        ("linux/arm64/v8", "linux/arm64"),
        ("linux/arm", "linux/arm/v7"),
        ("linux/arm/7", "linux/arm/v7"),
        ("linux/armhf", "linux/arm/v7"),
        ("LINUX/AMD64", "linux/amd64"),
        ("arm64", "linux/arm64"),
        ("linux/i686", "linux/386"),
    ],
)
def test_platform_normal_form(text: str, normal: str) -> None:
    assert str(platforms.parse(text)) == normal


@pytest.mark.parametrize("text", ["linux/", "/amd64", "linux/arm/v7/x", "a b", "linux/../x/..", "vax", "x" * 300])
def test_platform_malformed(text: str) -> None:
    with pytest.raises(UsageError, match="not a platform"):
        platforms.parse(text)


def test_platform_default_is_the_host() -> None:
    assert platforms.parse(None) == platforms.parse("") == platforms.host()
    assert platforms.host().os == "linux"


@pytest.mark.parametrize(
    ("wanted", "offered", "chosen"),
    [
        ("linux/amd64", ["linux/arm64", "linux/amd64"], "linux/amd64"),
        ("linux/amd64", ["linux/amd64/v3", "linux/amd64/v1"], "linux/amd64"),
        ("linux/amd64/v3", ["linux/amd64", "linux/amd64/v2"], "linux/amd64/v2"),
        ("linux/amd64", ["linux/amd64/v2"], None),
        ("linux/amd64", ["linux/386"], "linux/386"),
        ("linux/arm/v7", ["linux/arm/v5", "linux/arm/v6"], "linux/arm/v6"),
        ("linux/arm/v6", ["linux/arm/v7"], None),
        ("linux/arm64", ["linux/arm/v7", "linux/arm64/v8"], "linux/arm64"),
        ("linux/arm64/v9", ["linux/arm64"], "linux/arm64"),
        ("linux/arm64", ["unknown/unknown"], None),
        ("linux/amd64", ["windows/amd64"], None),
    ],
)
def test_platform_choice(wanted: str, offered: list[str], chosen: str | None) -> None:
    items: list[tuple[Platform | None, str]] = [(None, "without")]
    for text in offered:
        platform = Platform(*text.split("/")) if "unknown" in text else platforms.parse(text)
        items.append((platform, str(platform)))
    assert platforms.choose(platforms.parse(wanted), items) == chosen
