"""What the test images are made of. `images.py` builds and keeps them; a key changes when the contents would."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.support import appimage, ocitar, smallimage

PATH = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
SCIENCE = (("numpy",), ("pandas", "scikit-learn"), ("matplotlib",))  # a layer each
_READ = 1 << 20


@dataclass(frozen=True)
class Entries:
    """A layer of hand-made entries, held in memory."""

    name: str
    entries: Callable[[], list[ocitar.Entry]]
    compression: str = "gzip"
    record: int = 1024

    def key(self) -> tuple[object, ...]:
        return (self.name, smallimage.VERSION, self.compression, self.record)


@dataclass(frozen=True)
class Tree:
    """A large layer, as a stream of tar bytes made by tools in a working directory."""

    name: str
    tar: Callable[[Path], Iterator[bytes]]
    recipe: tuple[object, ...]

    def key(self) -> tuple[object, ...]:
        return (self.name, *self.recipe)


Layer = Entries | Tree


@dataclass(frozen=True)
class Recipe:
    layers: tuple[Layer, ...]
    config: dict[str, object]
    foreign: tuple[Layer, ...] = ()  # layers of the other platform, if the image has two


def _read(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        while piece := file.read(_READ):
            yield piece


def _release() -> dict[str, str]:
    lines = Path("/etc/os-release").read_text().splitlines()
    return {key: value.strip('"') for key, _, value in (line.partition("=") for line in lines)}


def _sources() -> list[str]:
    """This machine's own package sources of the running release, as one-line apt sources."""
    wanted = _release()["VERSION_CODENAME"]
    form = "$(ORIGIN)|$(SITE)|$(REPO_URI)|$(CODENAME)|$(RELEASE)|$(COMPONENT)"
    listing = subprocess.run(
        ["apt-get", "indextargets", "--format", form, "Created-By: Packages"],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    ).stdout
    found = []
    for line in listing.splitlines():
        origin, _, uri, codename, _, component = line.split("|")
        if origin in ("Debian", "Ubuntu") and codename.startswith(wanted):
            found.append(f"deb {uri.rstrip('/')} {codename} {component}")
    if not found:
        raise RuntimeError(f"no package source of {wanted}: run apt-get update first")
    return sorted(set(found))


def _debian(work: Path) -> Iterator[bytes]:
    """A minimal system of this machine's own release with Python, from its own package sources."""
    tar = work / "debian.tar"
    command = ["mmdebstrap", "--quiet", "--variant=minbase", "--include=python3,ca-certificates", "--format=tar"]
    sources = "\n".join(_sources()) + "\n"
    subprocess.run([*command, _release()["VERSION_CODENAME"], str(tar), "-"], input=sources, text=True, check=True)
    yield from _read(tar)


def _python_version() -> str:
    """Of the system's python3, which is the one that the Debian layer gets."""
    code = "import sys; print('%d.%d' % sys.version_info[:2])"
    return subprocess.run(
        ["/usr/bin/python3", "-c", code], stdout=subprocess.PIPE, text=True, check=True
    ).stdout.strip()


def _wheels(packages: tuple[str, ...], all_packages: tuple[str, ...]) -> Callable[[Path], Iterator[bytes]]:
    """`packages` and what they need beyond the layers below, as pip unpacks and compiles them."""

    def tar(work: Path) -> Iterator[bytes]:
        root = work / "root"
        target = root / f"usr/local/lib/python{_python_version()}/dist-packages"
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--only-binary=:all:"]
        subprocess.run(
            [*pip, f"--python-version={_python_version()}", "--no-compile", f"--target={target}", *packages], check=True
        )
        for below in all_packages:  # numpy comes again as a dependency; its layer is below
            subprocess.run(
                f"rm -rf '{target}/{below}' '{target}/{below}'-* '{target}/{below}'.libs", shell=True, check=True
            )
        subprocess.run(
            ["/usr/bin/python3", "-m", "compileall", "-q", "-j2", "-s", root, "-p", "/", target], check=False
        )
        out = work / "layer.tar"
        options = [
            "--format=pax",
            "--sort=name",
            "--numeric-owner",
            "--owner=0",
            "--group=0",
            "--pax-option=delete=atime,delete=ctime",
        ]
        subprocess.run(["tar", *options, "-C", root, "-cf", out, "usr"], check=True)
        yield from _read(out)

    return tar


def _debian_layer() -> Tree:
    return Tree("debian", _debian, (_release()["ID"], _release()["VERSION_CODENAME"], 1))


def _small(compression: str) -> Recipe:
    names = ("base", "data", "change", "kinds", "nothing")
    layers = tuple(
        Entries(
            f"small-{name}-{compression}", lambda n=n: smallimage.layers()[n], compression, 10_240 if n == 1 else 1024
        )  # type: ignore[misc]
        for n, name in enumerate(names)
    )
    config: dict[str, object] = {
        "Env": [PATH, "SMALL=yes"],
        "Cmd": ["/bin/sh"],
        "Labels": {"purpose": "test"},
        "WorkingDir": "/data",
    }
    foreign = (
        (Entries("small-foreign", lambda: [ocitar.Entry(b"other-platform", data=b"arm64\n")]),)
        if compression == "gzip"
        else ()
    )
    return Recipe(layers, config, foreign)


def _odd() -> Recipe:
    return Recipe((*_small("gzip").layers, Entries("odd", smallimage.odd_layer)), {"Env": [PATH], "Cmd": ["/bin/sh"]})


def _shared(which: str) -> Recipe:
    """Two images, `shared-a` and `shared-b`, over the same two layers."""

    def own() -> list[ocitar.Entry]:
        return [ocitar.Entry(f"only-{which}".encode(), data=smallimage.text(ord(which), 300_000))]

    def common() -> list[ocitar.Entry]:
        files = [ocitar.Entry(b"common/%02d" % n, data=smallimage.noise(100 + n, 400_000)) for n in range(20)]
        return [ocitar.Entry(b"common", ocitar.DIR, 0o755), *files]

    layers = (_small("gzip").layers[0], Entries("shared-common", common), Entries(f"shared-{which}", own))
    return Recipe(layers, {"Env": [PATH], "Cmd": ["/bin/sh"]})


def _blank() -> Recipe:
    """Nothing but a file: the engine's part of a root whose rest is lazy."""
    layer = Entries("blank", lambda: [ocitar.Entry(b"only-in-blank", data=b"blank\n")])
    return Recipe((layer,), {"Env": [PATH], "Cmd": ["/bin/sh"]})


def _app() -> Recipe:
    layers = (_small("gzip").layers[0], Entries("app-2", appimage.layer))
    return Recipe(layers, appimage.CONFIG)


def _debian_image() -> Recipe:
    return Recipe((_debian_layer(),), {"Env": [PATH], "Cmd": ["python3"]})


def _science() -> Recipe:
    """Debian with Python, numpy, then pandas and scikit-learn, then matplotlib: 700 MB unpacked."""
    layers, below = [_debian_layer()], ()
    for packages in SCIENCE:
        name = "science-" + packages[0]
        layers.append(
            Tree(name, _wheels(packages, below), (packages, _python_version(), _release()["VERSION_CODENAME"], 1))
        )
        below += packages
    return Recipe(tuple(layers), {"Env": [PATH], "Cmd": ["python3"]})


IMAGES: dict[str, Callable[[], Recipe]] = {
    "small": lambda: _small("gzip"),
    **{f"small-{kind}": (lambda kind=kind: _small(kind)) for kind in ocitar.COMPRESS if kind != "gzip"},  # type: ignore[misc]
    "odd": _odd,
    "app": _app,
    "blank": _blank,
    "shared-a": lambda: _shared("a"),
    "shared-b": lambda: _shared("b"),
    "debian": _debian_image,
    "science": _science,
}
SMALL_VARIANTS = tuple(name for name in IMAGES if name.startswith("small"))
