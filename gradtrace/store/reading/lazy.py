"""One parameter's slice of an array over parameters, read only when its values are looked at."""

from __future__ import annotations

from typing import Any

import numpy as np
from xarray.backends import BackendArray
from xarray.core.indexing import ExplicitIndexer, IndexingSupport, explicit_indexing_adapter

from gradtrace.store.reading.stream import Stream, Variable


class ParameterArray(BackendArray):
    """A zarr array (step, parameter, ...) at one parameter, as xarray's lazy arrays want it."""

    def __init__(self, stream: Stream, parameter: str, variable: Variable) -> None:
        place = stream.places[parameter]
        self._stream, self._position, self._variable = stream, place.position, variable
        shape = variable.array.shape
        inner = shape[2 : len(shape) - len(variable.at)]
        self.shape = (shape[0], *inner[:-1], place.width) if "component" in variable.dims else (shape[0], *inner)
        self.dtype = np.dtype(variable.array.dtype)

    def __getitem__(self, key: ExplicitIndexer) -> Any:
        return explicit_indexing_adapter(key, self.shape, IndexingSupport.BASIC, self._read)

    def _read(self, key: tuple[Any, ...]) -> np.ndarray:
        bounded = tuple(self._bounded(part, size) for part, size in zip(key, self.shape, strict=True))
        return self._stream.load(self._variable.array, (bounded[0], self._position, *bounded[1:], *self._variable.at))

    @staticmethod
    def _bounded(key: Any, size: int) -> Any:
        return slice(*key.indices(size)) if isinstance(key, slice) else key
