"""A part of an array, chosen along each of its axes, that reads like an array itself."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import zarr


class Taken:
    """An array at chosen places, read when it is indexed, by whole numbers, slices and `...`.

    chosen: dimension -> the places along it in this order, or one place, which drops the dimension; all of it where it
    is not named.
    """

    def __init__(self, array: zarr.Array[Any], chosen: Mapping[str, np.ndarray | int]) -> None:
        names = dims_of(array)
        self._array = array
        self._places = [chosen.get(name, np.arange(n)) for name, n in zip(names, array.shape, strict=True)]
        kept = [axis for axis, places in enumerate(self._places) if isinstance(places, np.ndarray)]
        self.dims = tuple(names[axis] for axis in kept)
        self.shape = tuple(np.size(self._places[axis]) for axis in kept)
        self.chunks = tuple(array.chunks[axis] for axis in kept)
        self.path, self.dtype = array.path, np.dtype(array.dtype)

    def __getitem__(self, key: Any) -> np.ndarray:
        keys = iter(_whole(key if isinstance(key, tuple) else (key,), len(self.shape)))
        places = [np.array(at)[next(keys)] if isinstance(at, np.ndarray) else at for at in self._places]
        many = [np.atleast_1d(at) for at in places]
        spans = [slice(int(at.min()), int(at.max()) + 1) if len(at) else slice(0, 0) for at in many]
        found = np.asarray(self._array[tuple(spans)])
        for axis, (at, span) in enumerate(zip(many, spans, strict=True)):
            if len(at) != span.stop - span.start or (np.diff(at) != 1).any():
                found = found.take(at - span.start, axis)
        return found[tuple(slice(None) if np.ndim(at) else 0 for at in places)]


def dims_of(array: zarr.Array[Any] | Taken) -> tuple[str, ...]:
    """The names of its dimensions."""
    if isinstance(array, Taken):
        return array.dims
    return tuple(str(name) for name in getattr(array.metadata, "dimension_names", None) or ())


def _whole(key: tuple[Any, ...], ndim: int) -> list[Any]:
    """One index for each axis."""
    parts = list(key)
    if Ellipsis not in parts:
        parts.append(Ellipsis)
    place = parts.index(Ellipsis)
    return [*parts[:place], *[slice(None)] * (ndim - len(parts) + 1), *parts[place + 1 :]]
