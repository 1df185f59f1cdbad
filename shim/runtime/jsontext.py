"""JSON without the `json` module, whose import costs more than the whole rest of a create without a reference.

Decoding is the C scanner that `json` itself uses. What is decoded and encoded again keeps its meaning exactly: unknown
fields and their order, integers of any size, and the text of every number with a point or an exponent.
"""

from __future__ import annotations

from _json import encode_basestring_ascii, make_scanner

from shim.runtime.fastpath import Scanner

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

_SPACE = " \t\n\r"


class Number:
    """A number with a point or an exponent, as it was written. 1e400 or 1.10 would not survive a float."""

    __slots__ = ("text",)

    def __init__(self, text: str) -> None:
        self.text = text

    def __repr__(self) -> str:
        return f"Number({self.text})"


class _Keeping(Scanner):
    parse_float = Number  # type: ignore[assignment]  # called with the text


def decode(data: bytes) -> Any:
    """The value of a JSON text in UTF-8. ValueError says where it is none; numbers with a point are `Number`s."""
    text = data.decode("utf-8-sig" if data.startswith(b"\xef\xbb\xbf") else "utf-8")
    start = len(text) - len(text.lstrip(_SPACE))
    try:
        value, end = make_scanner(_Keeping())(text, start)  # type: ignore[arg-type]  # duck-typed in C
    except StopIteration as error:
        raise ValueError(f"a JSON value is missing at character {error.value}") from None
    except RecursionError:
        raise ValueError("too deeply nested") from None
    except SystemError:  # the scanner cannot raise json's error while json.decoder is not imported (Python 3.11)
        import json

        json.loads(text)
        raise ValueError("not JSON") from None
    if text[end:].strip(_SPACE):
        raise ValueError(f"more text after the JSON value, at character {end}")
    return value


def encode(value: Any) -> str:
    """JSON text, ASCII only, without spaces: what Go and C read back as it was. Only types that `decode` gives."""
    out: list[str] = []
    _encode(value, out)
    return "".join(out)


def _encode(value: Any, out: list[str]) -> None:
    if isinstance(value, str):
        out.append(encode_basestring_ascii(value))
    elif value is None:
        out.append("null")
    elif isinstance(value, bool):
        out.append("true" if value else "false")
    elif isinstance(value, int):
        out.append(int.__repr__(value))
    elif isinstance(value, Number):
        out.append(value.text)
    elif isinstance(value, dict):
        before = "{"
        for key, item in value.items():
            out.append(before + encode_basestring_ascii(key) + ":")
            _encode(item, out)
            before = ","
        out.append("}" if value else "{}")
    elif isinstance(value, list):
        before = "["
        for item in value:
            out.append(before)
            _encode(item, out)
            before = ","
        out.append("]" if value else "[]")
    else:
        raise TypeError(f"{type(value).__name__} is no JSON value")
