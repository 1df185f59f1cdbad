"""Go's `gob` encoding, as far as clip files use it: a decoder that takes any types as they come, and an encoder.

Source: the documentation of Go's package encoding/gob and its doc.go. A stream is messages, each a length and either
a type's definition (a negative id and a `wireType`) or a value (its type's id and its bytes).

The decoder is for bytes from outside: whatever they are, it ends with a value or IndexFormatError, in time and memory
proportional to them. Its bounds: MAX_BYTES, MAX_TYPES, MAX_FIELDS, MAX_DEPTH, and MAX_VALUES items of slices and maps.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Any

from shim.errors import IndexFormatError

MAX_BYTES = 512 << 20
MAX_TYPES = 1000
MAX_FIELDS = 1000  # of one struct
MAX_DEPTH = 64
MAX_VALUES = 16_000_000

BOOL, INT, UINT, FLOAT, BYTES, STRING, COMPLEX, INTERFACE = range(1, 9)
FIRST_OWN = 64  # ids below are Go's

Value = Any
_Read = Callable[[bytes, int, int], tuple[Value, int]]
"""(data, position, depth) -> (value, position behind it). An IndexError means: the data end too early."""


def decode(data: bytes) -> Value:
    """The first value of a gob stream. Structs come as dicts of the fields that were sent (Go leaves out zeros), string
    and []byte as bytes, slices and arrays as lists, maps as dicts if their keys are strings and else as lists of pairs
    (numbers can be chosen so that a dict becomes slow), interfaces and values of types with an encoding of their own
    (time.Time) as bytes. Raises IndexFormatError."""
    if len(data) > MAX_BYTES:
        raise _bad(f"{len(data)} bytes long, at most {MAX_BYTES} are allowed")
    try:
        return _Decoder().stream(data)
    except (IndexError, struct.error) as error:
        raise _bad("cut short") from error


def _bad(what: str) -> IndexFormatError:
    return IndexFormatError(f"the Go data are damaged: {what}", hint="make the file again with the program it is from")


def _uint(data: bytes, pos: int) -> tuple[int, int]:
    first = data[pos]
    pos += 1
    if first < 128:
        return first, pos
    size = 256 - first
    end = pos + size
    if size > 8 or end > len(data):
        raise _bad("a number that is too long")
    return int.from_bytes(data[pos:end], "big"), end


def _read_uint(data: bytes, pos: int, _depth: int) -> tuple[Value, int]:
    return _uint(data, pos)


def _read_int(data: bytes, pos: int, _depth: int) -> tuple[Value, int]:
    raw, pos = _uint(data, pos)
    return (~(raw >> 1) if raw & 1 else raw >> 1), pos


def _read_bool(data: bytes, pos: int, _depth: int) -> tuple[Value, int]:
    raw, pos = _uint(data, pos)
    return raw != 0, pos


def _read_float(data: bytes, pos: int, _depth: int) -> tuple[Value, int]:
    raw, pos = _uint(data, pos)  # the float's bytes, reversed, so that few digits make few bytes
    return struct.unpack("<d", raw.to_bytes(8, "big"))[0], pos


def _read_complex(data: bytes, pos: int, depth: int) -> tuple[Value, int]:
    real, pos = _read_float(data, pos, depth)
    imaginary, pos = _read_float(data, pos, depth)
    return complex(real, imaginary), pos


def _read_bytes(data: bytes, pos: int, _depth: int) -> tuple[Value, int]:
    size, pos = _uint(data, pos)
    end = pos + size
    if end > len(data):
        raise _bad("a text that is too long")
    return data[pos:end], end


_BASIC: dict[int, _Read] = {
    BOOL: _read_bool,
    INT: _read_int,
    UINT: _read_uint,
    FLOAT: _read_float,
    BYTES: _read_bytes,
    STRING: _read_bytes,
    COMPLEX: _read_complex,
}
# The shape of a type's definition itself (Go's type.go: wireType, CommonType and the rest).
_COMMON = [("Name", STRING), ("Id", INT)]
_BOOTSTRAP: dict[int, list[tuple[str, int]]] = {
    16: [("ArrayT", 17), ("SliceT", 19), ("StructT", 20), ("MapT", 23), ("GobT", 24), ("BinaryT", 24), ("TextT", 24)],
    17: [("CommonType", 18), ("Elem", INT), ("Len", INT)],
    18: _COMMON,
    19: [("CommonType", 18), ("Elem", INT)],
    20: [("CommonType", 18), ("Field", 22)],
    21: _COMMON,
    23: [("CommonType", 18), ("Key", INT), ("Elem", INT)],
    24: [("CommonType", 18)],
}


class _Decoder:
    """Types seen so far, each as a function that reads its values. A type may be used before it is defined."""

    def __init__(self) -> None:
        self._left = MAX_VALUES
        self._types: dict[int, _Read] = dict(_BASIC)
        self._types[INTERFACE] = self._interface
        for number, fields in _BOOTSTRAP.items():
            self._types[number] = self._struct(fields)
        self._types[22] = self._list(21, None)
        self._own = 0

    def stream(self, data: bytes) -> Value:
        pos, end = 0, len(data)
        while pos < end:
            size, pos = _uint(data, pos)
            stop = pos + size
            if stop > end:
                raise _bad("cut short")
            message = data if stop == end else data[:stop]  # so that no value reads beyond its message
            number, pos = _read_int(message, pos, 0)
            if number >= 0:
                value, pos = self._top(message, pos, number)
                if pos != stop:
                    raise _bad("a value is shorter than its message")
                return value
            pos = self._define(message, pos, -number)
            if pos != stop:
                raise _bad("a definition is shorter than its message")
        raise _bad("no value in it")

    def _top(self, data: bytes, pos: int, number: int) -> tuple[Value, int]:
        """A value that is no struct stands behind a zero byte."""
        read = self._lookup(number)
        if getattr(read, "is_struct", False):
            return read(data, pos, 0)
        if data[pos] != 0:
            raise _bad("a value without its leading zero")
        return read(data, pos + 1, 0)

    def _lookup(self, number: int) -> _Read:
        read = self._types.get(number)
        if read is None:
            raise _bad(f"type {number} is not defined")
        return read

    def _define(self, data: bytes, pos: int, number: int) -> int:
        self._own += 1
        if number < FIRST_OWN or number in self._types or self._own > MAX_TYPES:
            raise _bad(f"type {number} cannot be defined")
        wire, pos = self._types[16](data, pos, 0)
        if len(wire) != 1:
            raise _bad(f"type {number} has no definition, or two")
        [(kind, body)] = wire.items()
        if kind == "StructT":
            fields = [(field.get("Name", b"").decode("utf-8", "replace"), field.get("Id", 0)) for field in
                      body.get("Field", [])]  # fmt: skip
            if len(fields) > MAX_FIELDS:
                raise _bad(f"type {number} has {len(fields)} fields")
            self._types[number] = self._struct(fields)
        elif kind == "MapT":
            self._types[number] = self._map(body.get("Key", 0), body.get("Elem", 0))
        elif kind == "SliceT":
            self._types[number] = self._list(body.get("Elem", 0), None)
        elif kind == "ArrayT":
            self._types[number] = self._list(body.get("Elem", 0), body.get("Len", 0))
        else:
            self._types[number] = _read_bytes
        return pos

    def _struct(self, fields: list[tuple[str, int]]) -> _Read:
        count = len(fields)
        types = self._types

        def read(data: bytes, pos: int, depth: int) -> tuple[Value, int]:
            if depth > MAX_DEPTH:
                raise _bad("nested too deeply")
            out: dict[str, Value] = {}
            at = -1
            while True:
                delta = data[pos]
                if delta < 128:
                    pos += 1
                else:
                    delta, pos = _uint(data, pos)
                if not delta:
                    return out, pos
                at += delta
                if at >= count:
                    raise _bad("a field that its type does not have")
                name, number = fields[at]
                # Most of a large index is this: numbers and short texts, read here without a call.
                first = data[pos]
                if INT <= number <= STRING and number != FLOAT:
                    pos += 1
                    if first >= 128:
                        end = pos + 256 - first
                        if first < 248 or end > len(data):
                            raise _bad("a number that is too long")
                        first = int.from_bytes(data[pos:end], "big")
                        pos = end
                    if number == UINT:
                        out[name] = first
                    elif number == INT:
                        out[name] = ~(first >> 1) if first & 1 else first >> 1
                    else:
                        end = pos + first
                        if end > len(data):
                            raise _bad("a text that is too long")
                        out[name] = data[pos:end]
                        pos = end
                    continue
                reader = types.get(number)
                if reader is None:
                    raise _bad(f"type {number} is not defined")
                out[name], pos = reader(data, pos, depth + 1)

        read.is_struct = True  # type: ignore[attr-defined]
        return read

    def _take(self, count: int, left: int, depth: int) -> None:
        """Whether `count` items may follow in `left` bytes: each takes one at least."""
        self._left -= count
        if count > left or self._left < 0:
            raise _bad("more items than there can be")
        if depth > MAX_DEPTH:
            raise _bad("nested too deeply")

    def _list(self, element: int, length: int | None) -> _Read:
        def read(data: bytes, pos: int, depth: int) -> tuple[Value, int]:
            count, pos = _uint(data, pos)
            self._take(count, len(data) - pos, depth)
            if length is not None and count != length:
                raise _bad("an array of the wrong length")
            reader = self._lookup(element)
            out = []
            for _ in range(count):
                value, pos = reader(data, pos, depth + 1)
                out.append(value)
            return out, pos

        return read

    def _map(self, key: int, element: int) -> _Read:
        def read(data: bytes, pos: int, depth: int) -> tuple[Value, int]:
            count, pos = _uint(data, pos)
            self._take(2 * count, len(data) - pos, depth)
            read_key, reader = self._lookup(key), self._lookup(element)
            pairs = []
            for _ in range(count):
                name, pos = read_key(data, pos, depth + 1)
                value, pos = reader(data, pos, depth + 1)
                pairs.append((name, value))
            return (dict(pairs) if key == STRING else pairs), pos

        return read

    def _interface(self, data: bytes, pos: int, depth: int) -> tuple[Value, int]:
        """Its concrete type's name, definitions, its id, and its length, over which it is skipped."""
        name, pos = _read_bytes(data, pos, depth)
        if not name:
            return b"", pos
        number, pos = _read_int(data, pos, depth)
        while number < 0:
            pos = self._define(data, pos, -number)
            _, pos = _uint(data, pos)
            number, pos = _read_int(data, pos, depth)
        return _read_bytes(data, pos, depth)
