"""The start profile of an index (section PROF): which spans a container's start reads, in that order.

It is advice: who mounts the tree fetches them ahead. A wrong one costs bytes, never right ones.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from shim.errors import IndexFormatError
from shim.index.columns import join, pack, split, unpack, unzigzag, zigzag

MAX_PROFILE = 1 << 16  # spans: 32 GiB of 512 KiB
MAX_RAW = 1 << 20  # of the section
Profile = tuple[tuple[int, int], ...]


def encode(profile: Profile) -> bytes:
    """Section PROF of a valid profile. Column 0: the layers; 1: the spans, less the one before in the same layer."""
    last: dict[int, int] = {}
    steps = []
    for layer, span in profile:
        steps.append(zigzag(span - last.get(layer, 0)))
        last[layer] = span
    return join([pack(layer for layer, _ in profile), pack(steps)])


def decode(raw: bytes) -> Profile:
    """The profile of a PROF section. Raises IndexFormatError; what it names is `check`'s part."""
    parts = split(raw, 2, "PROF")
    layers, steps = (unpack(part, MAX_PROFILE) for part in parts)
    if len(layers) != len(steps):
        raise IndexFormatError("the start profile is damaged: its columns differ in length")
    last: dict[int, int] = {}
    profile = []
    for layer, step in zip(layers, steps, strict=True):
        last[layer] = last.get(layer, 0) + unzigzag(step)
        profile.append((layer, last[layer]))
    return tuple(profile)


def check(profile: Iterable[tuple[int, int]], counts: Sequence[int]) -> None:
    """counts: the spans of each layer. Raises IndexFormatError for spans that are not there, named twice, too many."""
    seen = set()
    for layer, span in profile:
        if not (0 <= layer < len(counts) and 0 <= span < counts[layer]):
            raise IndexFormatError(f"the start profile names span {span} of layer {layer}, which is not there")
        seen.add((layer, span))
    total = sum(1 for _ in profile)
    if total != len(seen) or total > MAX_PROFILE:
        raise IndexFormatError(f"the start profile names spans twice, or more than {MAX_PROFILE}")
