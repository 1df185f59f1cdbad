"""A layer's span table as a file to map: the reader of a layer touches the pages it needs, nothing is loaded.

Machine-local state in native byte order, written once, then only read. Layout: a header (`_HEADER`), then arrays, each
8-aligned: ustarts u64[count + 1], cstarts u64[count + 1], window ends u64[count + 1] (the first is 0), window CRC-32s
u32[count], digests 32 bytes[count], bits u8[count], kinds u8[count], padding, and the windows' records (`sparse`).
The header holds the SHA-256 of the rest up to the records, and each record its CRC: a torn file is noticed, at opening
or at the latest when the damaged window is asked for. Against forgery a CRC is nothing: the header's `identity` hashes
the records too.
"""

from __future__ import annotations

import mmap
import os
import struct
import zlib
from array import array
from bisect import bisect_right
from hashlib import sha256
from itertools import accumulate
from pathlib import Path
from types import TracebackType
from typing import Self

from shim.errors import CacheError, IndexFormatError
from shim.index.codec import write_file
from shim.index.model import Compression, Layer, Restart
from shim.index.sparse import records_of, unpack_window
from shim.index.validate import MAX_SPANS, validate_spans

_MAGIC = b"clipspan"
_VERSION = 2
# magic, version, count, compressed size, uncompressed size, file length, compression, blob digest, diff id, identity,
# SHA-256
_HEADER = struct.Struct("=8sQQQQQQ32s32s32s32s")
_SUM = 32


def write_span_file(path: str | os.PathLike[str], layer: Layer) -> None:
    """Write `layer`'s spans to `path`: complete or not at all. Raises IndexFormatError (invalid layer), CacheError."""
    validate_spans(layer, 0)
    spans = layer.spans
    records = records_of(spans.windows)
    table = b"".join(
        [
            array("Q", spans.ustarts).tobytes(),
            array("Q", spans.cstarts).tobytes(),
            array("Q", accumulate(map(len, records), initial=0)).tobytes(),
            _aligned(array("I", map(zlib.crc32, records)).tobytes()),
            bytes(spans.digests),
            _aligned(bytes(spans.bits)),
            _aligned(bytes(spans.kinds)),
        ]
    )
    fields = (
        _MAGIC,
        _VERSION,
        spans.count,
        layer.size,
        layer.uncompressed_size,
        _HEADER.size + len(table) + sum(map(len, records)),
        int(layer.compression),
        bytes.fromhex(layer.digest.partition(":")[2]),
        bytes.fromhex(layer.diff_id.partition(":")[2]),
    )
    identity = sha256(_HEADER.pack(*fields, bytes(_SUM), bytes(_SUM)) + table)
    for record in records:
        identity.update(record)
    head = _HEADER.pack(*fields, identity.digest(), bytes(_SUM))[:-_SUM]
    try:
        write_file(Path(path), b"".join([head, sha256(head + table).digest(), table, *records]))
    except OSError as error:
        raise CacheError(f"cannot write span file {os.fspath(path)}: {error.strerror}") from error


def _aligned(data: bytes) -> bytes:
    return data + bytes(-len(data) % 8)


class SpanFile:
    """A mapped span file: `model.Spans`, and what the layer is. Threads may share it; `close` it when none reads it.

    size, uncompressed_size: the layer's bytes; compression; blob_digest, diff_id: "sha256:<hex>". identity: 32 bytes, a
    hash of all that decides how the layer is fetched and what it must hash to.
    """

    identity: bytes
    size: int
    uncompressed_size: int

    def __init__(self, path: str | os.PathLike[str]) -> None:
        """Map `path`. Raises CacheError: it is absent, torn, or of another version."""
        self.path = os.fspath(path)
        try:
            handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
            try:
                length = os.fstat(handle).st_size
                if length < _HEADER.size:
                    raise self._damaged("shorter than its header")
                self._map = mmap.mmap(handle, length, access=mmap.ACCESS_READ)
            finally:
                os.close(handle)
        except (OSError, ValueError) as error:
            raise CacheError(f"cannot map span file {self.path}: {error}") from error
        self._view = memoryview(self._map)
        try:
            self._open(length)
        except BaseException:
            self.close()
            raise

    def _damaged(self, what: str) -> CacheError:
        return CacheError(
            f"span file {self.path} is damaged: {what}", hint="remove it: it is made again from the index"
        )

    def _open(self, length: int) -> None:
        fields = _HEADER.unpack_from(self._view)
        magic, version, count, self.size, self.uncompressed_size, claimed, compression, blob, diff, own, digest = fields
        if magic != _MAGIC or version != _VERSION:
            raise self._damaged("not a span file of this version")
        if claimed != length or count > MAX_SPANS or compression not in set(Compression):
            raise self._damaged("its header is not true")
        widths = (8 * count + 8, 8 * count + 8, 8 * count + 8, 4 * count, 32 * count, count, count)
        starts = list(accumulate((width + 7 & -8 for width in widths), initial=_HEADER.size))
        self._records = starts.pop()
        if self._records > length:
            raise self._damaged("its table reaches past its end")
        check = sha256(self._view[: _HEADER.size - _SUM])
        check.update(self._view[_HEADER.size : self._records])
        if check.digest() != digest:
            raise self._damaged("its table does not match its checksum")
        if struct.unpack_from("=Q", self._view, starts[2] + 8 * count)[0] != length - self._records:
            raise self._damaged("its windows do not fill it")
        parts = [self._view[start : start + width] for start, width in zip(starts, widths, strict=True)]
        self._ustarts, self._cstarts, self._window_ends = (part.cast("Q") for part in parts[:3])
        self._window_crcs = parts[3].cast("I")
        self._digests, self._bits, self._kinds = parts[4:]
        self._count: int = count
        self.compression = Compression(compression)
        self.identity = own
        self.blob_digest, self.diff_id = f"sha256:{blob.hex()}", f"sha256:{diff.hex()}"

    @property
    def count(self) -> int:
        return self._count

    def ustart(self, i: int) -> int:
        return self._ustarts[i]

    def cstart(self, i: int) -> int:
        return self._cstarts[i]

    def bit(self, i: int) -> int:
        return self._bits[i]

    def kind(self, i: int) -> int:
        return self._kinds[i]

    def digest(self, i: int) -> bytes:
        return bytes(self._digests[32 * i : 32 * i + 32])

    def window(self, i: int) -> bytes:
        """As `model.Spans.window`. Raises CacheError if the window's bytes are damaged."""
        record = bytes(self._view[self._records + self._window_ends[i] : self._records + self._window_ends[i + 1]])
        if zlib.crc32(record) != self._window_crcs[i]:
            raise self._damaged(f"window {i} does not match its checksum")
        try:
            return unpack_window(record)
        except IndexFormatError as error:
            raise self._damaged(str(error)) from error

    def find(self, offset: int) -> int:
        return bisect_right(self._ustarts, offset) - 1

    def restart(self, i: int) -> int:
        while self._kinds[i] == Restart.CONTINUE:
            i -= 1
        return i

    def run_end(self, i: int) -> int:
        i += 1
        while i < self._count and self._kinds[i] == Restart.CONTINUE:
            i += 1
        return i

    def table_digest(self) -> bytes:
        check = sha256(self._count.to_bytes(8, "little"))
        check.update(self._ustarts)
        check.update(self._digests)
        return check.digest()

    def close(self) -> None:
        """Unmap. Harmless twice; any use afterwards raises ValueError."""
        for name in ("_ustarts", "_cstarts", "_window_ends", "_window_crcs", "_digests", "_bits", "_kinds"):
            part: memoryview | None = getattr(self, name, None)
            if part is not None:
                part.release()
        self._view.release()
        self._map.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
