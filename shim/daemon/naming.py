"""Job: which files of an image lie at an offset of a layer. For messages: nothing depends on it."""

from __future__ import annotations

import os
from collections.abc import Sequence

from shim.index import codec

Range = tuple[int, int]  # offset in the uncompressed layer, length


def name_files(index: str, layer: int, ranges: Sequence[Range]) -> list[list[str]]:
    """For each range the paths of the index's files that have bytes of it, in the order of the layer; at most 8.

    index: path of the index file; layer: its number there. Raises IndexFormatError, OSError.
    """
    tree = codec.decode_tree(codec.read_file(index))
    low = min(offset for offset, _ in ranges)
    high = max(offset + length for offset, length in ranges)
    near = []
    for path, node in tree.walk():
        near += [
            (extent.offset, extent.length, os.fsdecode(path))
            for extent in node.extents or ()
            if extent.layer == layer and extent.offset < high and extent.offset + extent.length > low
        ]
    near.sort()
    return [
        list(dict.fromkeys(path for start, size, path in near if start < offset + length and start + size > offset))[:8]
        for offset, length in ranges
    ]
