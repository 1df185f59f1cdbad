"""The test images: built once from Debian packages and hand-made layers, kept between runs as OCI layouts.

    python -m tests.support.images [NAME…]      build, and print where they are

Kept in `CLIP_SHIM_TEST_CACHE` (default /var/cache/clip-shim-tests): `layers/NAME-KEY/{blob,meta.json}` and
`images/NAME-KEY` (an OCI layout; its blobs are hard links). KEY is a hash of the recipe. Everything is built beside and
renamed, so an interrupted build leaves only a `.partial` directory, removed by the next one. Format: OCI image-spec
v1.0, image-layout.md and manifest.md.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import requests

from tests.support import ocitar, recipes

VERSION = 1  # part of every key: raise it when this module's output changes
MANIFEST = "application/vnd.oci.image.manifest.v1+json"
INDEX = "application/vnd.oci.image.index.v1+json"
CONFIG = "application/vnd.oci.image.config.v1+json"


@dataclass(frozen=True)
class Blob:
    """A file that is content-addressed: `digest` of its bytes, `diff_id` of what they are when inflated."""

    path: Path
    digest: str
    diff_id: str
    size: int
    media_type: str

    @property
    def descriptor(self) -> dict[str, object]:
        return {"mediaType": self.media_type, "digest": self.digest, "size": self.size}


@dataclass(frozen=True)
class Image:
    """An OCI layout with a tag `latest` (one platform). `layers` lowest first; `config` as the layout has it."""

    name: str
    layout: Path
    digest: str
    config: bytes
    layers: tuple[Blob, ...]

    @property
    def size(self) -> int:
        """Compressed bytes of all layers."""
        return sum(layer.size for layer in self.layers)


def cache_dir() -> Path:
    path = Path(os.environ.get("CLIP_SHIM_TEST_CACHE", "/var/cache/clip-shim-tests"))
    path.mkdir(parents=True, exist_ok=True, mode=0o755)
    return path


def _key(*parts: object) -> str:
    return hashlib.sha256(repr((VERSION, parts)).encode()).hexdigest()[:16]


@contextmanager
def built(kind: str, name: str, key: str, build: Callable[[Path], None]) -> Iterator[Path]:
    """The directory `kind`/`name`-`key`, made by `build` if it is not there; older keys are removed."""
    parent = cache_dir() / kind
    parent.mkdir(exist_ok=True)
    final = parent / f"{name}-{key}"
    with (parent / f".{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not final.exists():
            for old in parent.glob(f"{name}-*"):
                if old.name.removesuffix(".partial").rpartition("-")[0] == name:
                    shutil.rmtree(old)
            partial = parent / f"{name}-{key}.partial"
            partial.mkdir()
            build(partial)
            subprocess.run(["sync", "-f", partial], check=True)
            partial.rename(final)
        yield final


class _Hashing:
    """A file that hashes and counts what is written to it."""

    def __init__(self, path: Path) -> None:
        self.file = path.open("wb")
        self.sha = hashlib.sha256()
        self.size = 0

    def write(self, data: bytes) -> int:
        self.sha.update(data)
        self.size += len(data)
        return self.file.write(data)

    def flush(self) -> None:
        self.file.flush()

    def close(self) -> None:
        self.file.close()


def store(directory: Path, tar: Iterator[bytes] | bytes, compression: str, packed: bytes | None = None) -> None:
    """Write `blob` (`packed`, or `tar` compressed) and `meta.json`. A large layer comes as an iterator and is
    compressed as a stream (gzip)."""
    compress, media_type = ocitar.COMPRESS[compression]
    out = _Hashing(directory / "blob")
    if isinstance(tar, bytes):
        diff_id = ocitar.digest(tar)
        out.write(compress(tar) if packed is None else packed)
    else:
        import gzip

        inner = hashlib.sha256()
        with gzip.GzipFile(fileobj=out, mode="wb", compresslevel=6, mtime=0, filename="") as stream:  # type: ignore[call-overload]
            for piece in tar:
                inner.update(piece)
                stream.write(piece)
        diff_id = "sha256:" + inner.hexdigest()
    out.close()
    meta = {"digest": "sha256:" + out.sha.hexdigest(), "diff_id": diff_id, "size": out.size, "media_type": media_type}
    (directory / "meta.json").write_text(json.dumps(meta))


def blob(directory: Path) -> Blob:
    return Blob(directory / "blob", **json.loads((directory / "meta.json").read_text()))


def layer(recipe: recipes.Layer) -> Blob:
    """The layer, built if it is not kept."""

    def build(directory: Path) -> None:
        print(f"building layer {recipe.name}", file=sys.stderr, flush=True)
        if isinstance(recipe, recipes.Tree):
            with tempfile.TemporaryDirectory(prefix="clip-test-", dir="/var/tmp") as work:
                store(directory, recipe.tar(Path(work)), "gzip")
        elif recipe.compression == "estargz":
            tar, packed = ocitar.estargz(recipe.entries())
            store(directory, tar, "estargz", packed)
        else:
            store(directory, ocitar.tar(recipe.entries(), record=recipe.record), recipe.compression)

    with built("layers", recipe.name, _key(recipe.key()), build) as directory:
        return blob(directory)


def make_config(diff_ids: list[str], config: dict[str, object], architecture: str) -> bytes:
    body = {
        "architecture": architecture,
        "os": "linux",
        "created": "2024-01-01T00:00:00Z",
        "config": config,
        "rootfs": {"type": "layers", "diff_ids": diff_ids},
        "history": [{"created": "2024-01-01T00:00:00Z", "created_by": f"layer {n}"} for n, _ in enumerate(diff_ids)],
    }
    return json.dumps(body, indent=1).encode()


def host_architecture() -> str:
    """As Go names it."""
    machine = os.uname().machine
    return {"x86_64": "amd64", "aarch64": "arm64"}.get(machine, machine)


def _put(layout: Path, data: bytes, media_type: str) -> dict[str, object]:
    digest = ocitar.digest(data)
    (layout / "blobs/sha256" / digest.removeprefix("sha256:")).write_bytes(data)
    return {"mediaType": media_type, "digest": digest, "size": len(data)}


def write_layout(
    layout: Path, blobs: list[Blob], config: dict[str, object], *, foreign: list[Blob] | None = None
) -> None:
    """An OCI layout at `layout`: `latest` for this machine; with `foreign` layers also `multi`, an index of two
    platforms."""
    (layout / "blobs/sha256").mkdir(parents=True)
    (layout / "oci-layout").write_text('{"imageLayoutVersion": "1.0.0"}')

    def manifest(layers: list[Blob], architecture: str) -> dict[str, object]:
        for blob in layers:
            target = layout / "blobs/sha256" / blob.digest.removeprefix("sha256:")
            if not target.exists():
                try:
                    os.link(blob.path, target)
                except OSError:  # another file system
                    shutil.copyfile(blob.path, target)
        raw = make_config([b.diff_id for b in layers], config, architecture)
        body = {
            "schemaVersion": 2,
            "mediaType": MANIFEST,
            "config": _put(layout, raw, CONFIG),
            "layers": [blob.descriptor for blob in layers],
        }
        return _put(layout, json.dumps(body, indent=1).encode(), MANIFEST)

    own = manifest(blobs, host_architecture())
    manifests = [own | {"annotations": {"org.opencontainers.image.ref.name": "latest"}}]
    if foreign is not None:
        other = "arm64" if host_architecture() != "arm64" else "amd64"
        both = [
            manifest(foreign, other) | {"platform": {"os": "linux", "architecture": other}},
            own | {"platform": {"os": "linux", "architecture": host_architecture()}},
        ]
        index = json.dumps({"schemaVersion": 2, "mediaType": INDEX, "manifests": both}).encode()
        manifests.append(_put(layout, index, INDEX) | {"annotations": {"org.opencontainers.image.ref.name": "multi"}})
    (layout / "index.json").write_text(json.dumps({"schemaVersion": 2, "manifests": manifests}))


def read_layout(name: str, layout: Path) -> Image:
    """The image tagged `latest` of a layout that `write_layout` made."""
    blobs = layout / "blobs/sha256"
    (digest,) = (
        m["digest"]
        for m in json.loads((layout / "index.json").read_text())["manifests"]
        if m["annotations"]["org.opencontainers.image.ref.name"] == "latest"
    )
    manifest = json.loads((blobs / digest.removeprefix("sha256:")).read_text())
    config = (blobs / manifest["config"]["digest"].removeprefix("sha256:")).read_bytes()
    layers = tuple(
        Blob(blobs / d["digest"].removeprefix("sha256:"), d["digest"], diff_id, d["size"], d["mediaType"])
        for d, diff_id in zip(manifest["layers"], json.loads(config)["rootfs"]["diff_ids"], strict=True)
    )
    return Image(name, layout, digest, config, layers)


def config_of(source: Image) -> dict[str, object]:
    """The `config` object of an image: Env, Cmd, Labels …"""
    found: dict[str, object] = json.loads(source.config)["config"]
    return found


def image(name: str) -> Image:
    """The image of that name (see `recipes.IMAGES`), built if it is not kept."""
    recipe = recipes.IMAGES[name]()

    def build(directory: Path) -> None:
        foreign = [layer(item) for item in recipe.foreign] if recipe.foreign else None
        write_layout(directory, [layer(item) for item in recipe.layers], recipe.config, foreign=foreign)

    key = _key([item.key() for item in recipe.layers + recipe.foreign], sorted(recipe.config.items()))
    with built("images", name, key, build) as directory:
        return read_layout(name, directory)


def push(source: Image, registry: str, repository: str | None = None, tag: str = "latest") -> str:
    """Push to `registry` ("127.0.0.1:PORT", plain http) byte for byte (tools compress again). Returns the reference.

    Blobs that are there are not sent. The `multi` tag of the layout is pushed too. (OCI distribution-spec v1.0)
    """
    repository = repository or source.name
    base = f"http://{registry}/v2/{repository}"
    blobs = source.layout / "blobs/sha256"
    with requests.Session() as session:
        session.trust_env = False

        def send(descriptor: dict[str, str]) -> None:
            digest = descriptor["digest"]
            if session.head(f"{base}/blobs/{digest}", timeout=60).status_code == 200:
                return
            begin = session.post(f"{base}/blobs/uploads/", timeout=60)
            begin.raise_for_status()
            location = requests.compat.urljoin(base, begin.headers["Location"])
            with (blobs / digest.removeprefix("sha256:")).open("rb") as data:
                end = session.put(location, params={"digest": digest}, data=data, timeout=600, headers={
                    "Content-Type": "application/octet-stream"})  # fmt: skip
            end.raise_for_status()

        def put(descriptor: dict[str, str], name: str) -> None:
            raw = (blobs / descriptor["digest"].removeprefix("sha256:")).read_bytes()
            body = json.loads(raw)
            for child in body.get("manifests", ()):
                put(child, child["digest"])
            for blob in [body["config"], *body["layers"]] if "layers" in body else []:
                send(blob)
            kind = {"Content-Type": descriptor["mediaType"]}
            session.put(f"{base}/manifests/{name}", data=raw, headers=kind, timeout=60).raise_for_status()

        for entry in json.loads((source.layout / "index.json").read_text())["manifests"]:
            name = entry["annotations"]["org.opencontainers.image.ref.name"]
            put(entry, tag if name == "latest" else name)
    return f"{registry}/{repository}:{tag}"


def file_digest(path: Path) -> str:
    """SHA-256 of a file in hex, as sha256sum prints it."""
    return joined_digest([path])


def joined_digest(paths: Iterable[Path]) -> str:
    """SHA-256 of files one after the other, in hex."""
    sha = hashlib.sha256()
    for path in paths:
        sha.update(path.read_bytes())
    return sha.hexdigest()


if __name__ == "__main__":
    for wanted in sys.argv[1:] or recipes.IMAGES:
        built = image(wanted)
        print(f"{built.name:<18} {built.size / 1e6:8.1f} MB  {len(built.layers)} layers  {built.layout}")
