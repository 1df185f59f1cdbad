"""Go's `gob` encoding, the writing side: values of types that are given, as Go's encoding/gob writes them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from shim.goclip.gob import BOOL, BYTES, FIRST_OWN, INT, STRING, UINT


@dataclass(frozen=True, eq=False)
class Basic:
    """One of Go's own types. Zero is what is left out of a struct."""

    number: int
    zero: Any


@dataclass(frozen=True, eq=False)
class Struct:
    """fields: (name, type) in Go's order. Values are mappings; what is absent is zero, and a pointer to nothing."""

    name: str
    fields: tuple[tuple[str, Type], ...]


@dataclass(frozen=True, eq=False)
class Slice:
    element: Type


@dataclass(frozen=True, eq=False)
class Map:
    """Written in the order of its keys, so that equal maps give equal bytes."""

    key: Type
    element: Type


@dataclass(frozen=True, eq=False)
class Opaque:
    """A type with an encoding of its own; values are bytes."""

    name: str


Type = Basic | Struct | Slice | Map | Opaque
GO_BOOL, GO_INT, GO_UINT = Basic(BOOL, False), Basic(INT, 0), Basic(UINT, 0)
GO_BYTES, GO_STRING = Basic(BYTES, b""), Basic(STRING, b"")


def encode(kind: Type, value: Any) -> bytes:
    """One value as a whole gob stream, its types' definitions first. Texts are bytes or str (UTF-8)."""
    encoder = _Encoder()
    number = encoder.number(kind)
    out = bytearray(signed(number))
    if not isinstance(kind, Struct):
        out.append(0)
    encoder.write(out, kind, value)
    return b"".join([*encoder.messages, unsigned(len(out)), out])


def unsigned(value: int) -> bytes:
    if value < 128:
        return _SMALL[value]
    size = (value.bit_length() + 7) // 8
    return bytes([256 - size]) + value.to_bytes(size, "big")


def signed(value: int) -> bytes:
    return unsigned(~value << 1 | 1 if value < 0 else value << 1)


_SMALL = [bytes([value]) for value in range(128)]


class _Encoder:
    def __init__(self) -> None:
        self.messages: list[bytes] = []
        self._numbers: dict[int, int] = {}  # id of a Type -> Go's number of it

    def number(self, kind: Type) -> int:
        """The type's number; its definition, and those of its parts, are written when it is first met."""
        if isinstance(kind, Basic):
            return kind.number
        number = self._numbers.get(id(kind))
        if number is not None:
            return number
        number = self._numbers[id(kind)] = FIRST_OWN + 1 + len(self._numbers)
        where = len(self.messages)
        self.messages += [b""]
        body = bytearray(signed(-number)) + self._definition(kind, number)
        self.messages[where] = unsigned(len(body)) + bytes(body)
        return number

    def _definition(self, kind: Type, number: int) -> bytes:
        """A `wireType`: which of its fields is set, and in it CommonType (name, id) and what the type is made of."""
        name = getattr(kind, "name", "").encode()
        common = (
            b"\x01" + (b"\x01" + unsigned(len(name)) + name + b"\x01" if name else b"\x02") + signed(number) + b"\0"
        )
        if isinstance(kind, Struct):
            fields = bytearray()
            for field, of in kind.fields:
                fields += b"\x01" + unsigned(len(field)) + field.encode() + b"\x01" + signed(self.number(of)) + b"\0"
            return b"\x03" + common + b"\x01" + unsigned(len(kind.fields)) + fields + b"\0\0"
        if isinstance(kind, Slice):
            return b"\x02" + common + b"\x01" + signed(self.number(kind.element)) + b"\0\0"
        if isinstance(kind, Map):
            parts = b"\x01" + signed(self.number(kind.key)) + b"\x01" + signed(self.number(kind.element))
            return b"\x04" + common + parts + b"\0\0"
        return b"\x05" + common + b"\0\0"

    def write(self, out: bytearray, kind: Type, value: Any) -> None:
        if isinstance(kind, Basic):
            self._basic(out, kind.number, value)
        elif isinstance(kind, Struct):
            self._struct(out, kind, value)
        elif isinstance(kind, Slice):
            self._slice(out, kind.element, value)
        elif isinstance(kind, Map):
            out += unsigned(len(value))
            for key in sorted(value):
                self.write(out, kind.key, key)
                self.write(out, kind.element, value[key])
        else:
            out += unsigned(len(value)) + value

    def _basic(self, out: bytearray, number: int, value: Any) -> None:
        if number == INT:
            out += signed(value)
        elif number in (UINT, BOOL):
            out += unsigned(value)
        else:
            data = value.encode() if isinstance(value, str) else value
            out += unsigned(len(data)) + data

    def _struct(self, out: bytearray, kind: Struct, value: Mapping[str, Any]) -> None:
        last = -1
        for at, (name, of) in enumerate(kind.fields):
            item = value.get(name)
            if item is None or (not isinstance(of, Struct) and not item):
                continue
            out += unsigned(at - last)
            last = at
            self.write(out, of, item)
        out.append(0)

    def _slice(self, out: bytearray, element: Type, values: Iterable[Any]) -> None:
        items = list(values)
        out += unsigned(len(items))
        for item in items:
            self.write(out, element, item)
