"""A portable tree over hand-made blob files, as the daemon starts it."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from shim.index import codec
from shim.index.merge import TreeMerger
from shim.index.model import Index, Layer
from shim.layers.scan import LayerScanner
from shim.layers.tar import TarWalker
from tests.support.ocitar import digest


def make_index(layers: Sequence[bytes]) -> Index:
    """The index of an image of these plain tars."""
    merger = TreeMerger()
    rows = []
    for number, layer in enumerate(layers):
        walker = TarWalker()
        with LayerScanner(None, 1 << 20, walker.feed) as scanner:
            scanner.feed(layer)
            result = scanner.finish()
        walker.finish()
        merger.apply(walker.entries, number)
        kind = "application/vnd.oci.image.layer.v1.tar"
        rows.append(
            Layer(
                result.digest,
                result.diff_id,
                result.size,
                result.uncompressed_size,
                kind,
                result.compression,
                result.spans,
            )
        )
    return Index("localhost/test:v1", digest(b"manifest"), "linux/amd64", b"{}", rows, merger.finish())


def blob_names(index: Index) -> list[str]:
    return [f"{layer.diff_id[7:]}-{layer.spans.table_digest().hex()[:16]}" for layer in index.layers]


@dataclass
class Portable:
    """A portable tree at `path`, of `index`; `said` is the line it reported."""

    base: Path
    index: Index
    blobs: Path
    names: list[str]
    said: str = ""
    children: list[subprocess.Popen[bytes]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.path = self.base / "tree"
        self.path.mkdir(exist_ok=True)
        self.log = self.base / "log"
        if not (self.base / "index.clip").exists():
            codec.write_index(self.base / "index.clip", self.index)
        self.start()

    def start(self) -> None:
        reader, writer = os.pipe()
        command = [sys.executable, "-m", "shim.tree.portable", "--index", str(self.base / "index.clip")]
        command += ["--blobs", str(self.blobs), "--names", ",".join(self.names), "--ready-fd", str(writer)]
        with open(self.log, "ab") as log:
            self.process = subprocess.Popen([*command, str(self.path)], pass_fds=[writer], stdout=log, stderr=log)
        os.close(writer)
        with os.fdopen(reader, "rb") as pipe:
            self.said = pipe.read().decode()

    def python(self, script: str, *args: object) -> subprocess.Popen[bytes]:
        """Run Python in another process, `path` being the tree."""
        head = f"import os, sys, signal, time\npath = {str(self.path)!r}\n"
        command = [sys.executable, "-c", head + script, *map(str, args)]
        self.children.append(subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT))
        return self.children[-1]

    def unmount(self) -> None:
        subprocess.run(["umount", str(self.path)], check=True, timeout=30)

    def close(self) -> None:
        for child in self.children:
            child.kill()
            child.communicate()
        if os.path.ismount(self.path) or self.process.poll() is None:
            subprocess.run(["umount", "-l", str(self.path)], capture_output=True, timeout=30)
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


Show = Callable[..., Portable]


def showing(base_directory: Path) -> Iterator[Show]:
    """For fixtures: a function that shows an image of plain tars, over blob files of its own if `blobs` is None."""
    shown: list[Portable] = []

    def mount(layers: Sequence[bytes], blobs: Path | None = None, names: list[str] | None = None) -> Portable:
        base = base_directory / str(len(shown))
        base.mkdir()
        index = make_index(layers)
        if blobs is None:
            blobs = base / "blobs"
            blobs.mkdir()
            for name, layer in zip(blob_names(index), layers, strict=True):
                (blobs / name).write_bytes(layer + bytes(-len(layer) % 512))
        shown.append(Portable(base, index, blobs, names if names is not None else blob_names(index)))
        return shown[-1]

    yield mount
    for tree in shown:
        tree.close()


def failure(call: Callable[..., object], *args: object, **more: object) -> int:
    """The errno a call fails with, 0 if it does not."""
    try:
        call(*args, **more)
    except OSError as error:
        return error.errno or -1
    return 0
