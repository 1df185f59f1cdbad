"""What a test image must look like: unpacked by umoci, kept beside the images.

Known ways of umoci (0.4.7) that are not the image's: directories no layer names, the root among them, get the time
of unpacking (see `unset`); layers in zstd it cannot read, so the variants of `small` are compared with `small` itself.
"""

from __future__ import annotations

import subprocess
from pathlib import Path

from tests.support import images, smallimage

ESTARGZ_EXTRAS = (b".no.prefetch.landmark", b"stargz.index.json")


def tree(image: images.Image) -> Path:
    """The unpacked tree of an image: made once, never to be written to."""
    name = "small" if image.name.startswith("small-") else image.name
    source = images.image(name)

    def build(directory: Path) -> None:
        subprocess.run(
            ["umoci", "raw", "unpack", "--image", f"{source.layout}:latest", directory / "rootfs"],
            check=True,
            capture_output=True,
        )

    with images.built("trees", name, source.digest.removeprefix("sha256:")[:16], build) as directory:
        return directory / "rootfs"


def unset(image: images.Image) -> tuple[bytes, ...]:
    """Directories of the image that no layer names."""
    if image.name in ("debian", "science"):
        return ()  # the base layer's tar names all, `./` too
    return (b"", *smallimage.ODD_UNSET) if image.name == "odd" else (b"",)
