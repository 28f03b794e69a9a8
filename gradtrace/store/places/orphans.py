"""What a kill leaves behind: keys that the last commit knows nothing of."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from gradtrace.store.places.keys import PARTIAL, ROOT_KEY


def orphans(keys: Iterable[str], members: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    """Those of `keys` that were written for rows, arrays or groups that were never committed, or are not whole.

    members: path -> metadata of everything that the root's last commit names. Keys that no writer makes are left alone.
    """
    for key in keys:
        path, _, name = key.rpartition("/")
        if name.endswith(PARTIAL):
            yield key
        elif name == ROOT_KEY:
            if path and path not in members:
                yield key
        elif _chunk_index(name) is not None and path and not _is_inside(name, members.get(path)):
            yield key


def _chunk_index(name: str) -> tuple[int, ...] | None:
    """The index of a chunk in its grid, or None where a name is not that of a chunk."""
    first, *parts = name.split(".")
    return tuple(map(int, parts)) if first == "c" and parts and all(part.isdecimal() for part in parts) else None


def _is_inside(name: str, document: Mapping[str, Any] | None) -> bool:
    """Whether a chunk holds something of the array's committed shape."""
    index = _chunk_index(name)
    if document is None or document.get("node_type") != "array" or index is None:
        return False
    shape, chunks = document["shape"], document["chunk_grid"]["configuration"]["chunk_shape"]
    grid = [math.ceil(size / chunk) for size, chunk in zip(shape, chunks, strict=True)]
    return len(index) == len(grid) and all(place < size for place, size in zip(index, grid, strict=True))
