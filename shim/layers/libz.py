"""The only binding of zlib's C library: what Python's `zlib` does not offer (Z_BLOCK, inflatePrime, dictionaries).

Raw deflate only (RFC 1951); the gzip wrapper is read by `gzipformat`. ctypes releases the GIL during every call.
Meaning of flush values, status codes and `data_type`: zlib.h of zlib 1.2.x.

zlib-ng inflates the same streams, stopping at the same blocks, in three fifths of the time: it is used where it is
found, as the system's library or inside the Python package `zlib-ng`, whose extension module exports it; else zlib.
"""

from __future__ import annotations

import ctypes
import glob
import importlib.util
import os
from functools import cache
from typing import Any

from shim.errors import LayerError, ShimError
from shim.index.model import WINDOW_SIZE

Z_NO_FLUSH = 0
Z_BLOCK = 5  # stop at the next deflate block boundary
Z_OK = 0
Z_STREAM_END = 1
Z_BUF_ERROR = -5  # no progress was possible: not an error, more input or room is needed

# Bits of data_type after inflate(): unused bits of the last byte taken, in the last block, just after a block's end.
UNUSED_BITS = 7
LAST_BLOCK = 64
BLOCK_END = 128

_RAW = -15  # windowBits of a raw stream with a 32 KiB window


class _ZStream(ctypes.Structure):
    """z_stream of zlib.h. zlib-ng's zng_stream differs only behind data_type, where nothing is used."""

    _fields_ = (
        ("next_in", ctypes.c_void_p),
        ("avail_in", ctypes.c_uint),
        ("total_in", ctypes.c_ulong),
        ("next_out", ctypes.c_void_p),
        ("avail_out", ctypes.c_uint),
        ("total_out", ctypes.c_ulong),
        ("msg", ctypes.c_char_p),
        ("state", ctypes.c_void_p),
        ("zalloc", ctypes.c_void_p),
        ("zfree", ctypes.c_void_p),
        ("opaque", ctypes.c_void_p),
        ("data_type", ctypes.c_int),
        ("adler", ctypes.c_ulong),
        ("reserved", ctypes.c_ulong),
    )


class _Library:
    """The functions of one C library, zlib or zlib-ng, under zlib's names; each returns a status."""

    def __init__(self, lib: ctypes.CDLL, prefix: str) -> None:
        """Raises AttributeError if the library lacks one of them."""
        self.lib = lib
        stream = ctypes.POINTER(_ZStream)
        number, address, size = ctypes.c_int, ctypes.c_void_p, ctypes.c_uint

        def function(name: str, *arguments: Any) -> Any:
            found = getattr(lib, prefix + name)
            found.argtypes, found.restype = list(arguments), number
            return found

        self.inflate = function("inflate", stream, number)
        self.prime = function("inflatePrime", stream, number, number)
        self.set_dictionary = function("inflateSetDictionary", stream, ctypes.c_char_p, size)
        self.get_dictionary = function("inflateGetDictionary", stream, address, ctypes.POINTER(size))
        self.reset2 = function("inflateReset2", stream, number)
        self.end = function("inflateEnd", stream)
        if prefix:
            self.init = function("inflateInit2", stream, number)
        else:  # a macro in zlib.h, which passes version and size
            lib.zlibVersion.restype = ctypes.c_char_p
            init2 = function("inflateInit2_", stream, number, ctypes.c_char_p, number)
            self.init = lambda pointer, bits: init2(pointer, bits, lib.zlibVersion(), ctypes.sizeof(_ZStream))


def zlib_ng() -> _Library | None:
    """zlib-ng, if it is installed."""
    names = ["libz-ng.so.2"]
    package = importlib.util.find_spec("zlib_ng")
    for place in (package.submodule_search_locations if package else None) or ():
        names += glob.glob(os.path.join(glob.escape(place), "zlib_ng.*.so"))
    for name in names:
        try:
            return _Library(ctypes.CDLL(name), "zng_")
        except (OSError, AttributeError):
            continue
    return None


def zlib() -> _Library:
    """The system's zlib. Raises ShimError if there is none."""
    try:
        return _Library(ctypes.CDLL("libz.so.1"), "")
    except OSError as error:
        raise ShimError(f"cannot load libz.so.1: {error}", hint="install zlib (Debian: zlib1g)") from error


@cache
def _library() -> _Library:
    return zlib_ng() or zlib()


def address_of(data: bytes) -> int:
    """Where the bytes lie. Good for as long as the caller holds `data`."""
    return ctypes.cast(ctypes.c_char_p(data), ctypes.c_void_p).value or 0


def address_of_buffer(buffer: bytearray) -> int:
    """Where a bytearray lies. The caller must hold it and must not resize it."""
    return ctypes.addressof(ctypes.c_char.from_buffer(buffer))


class RawInflate:
    """One raw inflate stream. Not thread-safe; each thread uses its own."""

    __slots__ = ("_inflate", "_lib", "_open", "_pointer", "_stream")

    def __init__(self, library: _Library | None = None) -> None:
        """library: another than the fastest."""
        self._open = False
        self._lib = library or _library()
        self._stream = _ZStream()
        self._pointer = ctypes.byref(self._stream)
        self._inflate = self._lib.inflate
        self._check(self._lib.init(self._pointer, _RAW))
        self._open = True

    def __del__(self) -> None:
        self.close()

    def close(self) -> None:
        """Free the stream's memory. Safe to call twice."""
        if self._open:
            self._open = False
            self._lib.end(self._pointer)

    def reset(self) -> None:
        """Begin a new stream, without a window."""
        self._check(self._lib.reset2(self._pointer, _RAW))

    def prime(self, bits: int, byte: int) -> None:
        """Begin inside a byte: its upper `bits` bits (0..7) are the stream's first ones."""
        if bits:
            self._check(self._lib.prime(self._pointer, bits, byte >> (8 - bits)))

    def set_window(self, window: bytes) -> None:
        """The bytes (at most WINDOW_SIZE) that came before the stream's position."""
        self._check(self._lib.set_dictionary(self._pointer, window, len(window)))

    def get_window(self) -> bytes:
        """The last bytes of output (at most WINDOW_SIZE), fewer near the start of the stream."""
        buffer = ctypes.create_string_buffer(WINDOW_SIZE)
        size = ctypes.c_uint(0)
        self._check(self._lib.get_dictionary(self._pointer, buffer, ctypes.byref(size)))
        return buffer.raw[: size.value]

    def inflate(self, source: int, available: int, target: int, room: int, flush: int) -> tuple[int, int, int, int]:
        """Inflate from address `source` (`available` bytes) to address `target` (`room` bytes).

        Returns (status, bytes consumed, bytes produced, data_type); status is Z_OK, Z_STREAM_END or Z_BUF_ERROR.
        Raises LayerError if the stream is not valid deflate.
        """
        stream = self._stream
        stream.next_in, stream.avail_in = source, available
        stream.next_out, stream.avail_out = target, room
        status: int = self._inflate(self._pointer, flush)
        if status not in (Z_OK, Z_STREAM_END, Z_BUF_ERROR):
            self._check(status)
        return status, available - stream.avail_in, room - stream.avail_out, stream.data_type

    def _check(self, status: int) -> None:
        if status != Z_OK:
            message = self._stream.msg
            detail = message.decode("ascii", "replace") if message else f"zlib status {status}"
            raise LayerError(f"not valid deflate data: {detail}")
