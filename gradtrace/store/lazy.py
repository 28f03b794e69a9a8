"""One parameter's slice of an array over parameters, read only when its values are looked at."""

from __future__ import annotations

from typing import Any

import numpy as np
from xarray.backends import BackendArray
from xarray.core.indexing import ExplicitIndexer, IndexingSupport, explicit_indexing_adapter

from gradtrace.store.stream import Stream


class ParameterArray(BackendArray):
    """A zarr array (step, parameter, ...) at one parameter, as xarray's lazy arrays want it."""

    def __init__(self, stream: Stream, parameter: str, variable: str) -> None:
        place = stream.places[parameter]
        self._stream, self._position = stream, place.position
        self._array = stream.array(parameter, variable)
        inner = self._array.shape[2:]
        if "component" in self.dims:
            inner = (*inner[:-1], place.width)
        self.shape = (self._array.shape[0], *inner)
        self.dtype = np.dtype(self._array.dtype)

    @property
    def dims(self) -> tuple[str, ...]:
        """The dimensions of the slice."""
        names: tuple[str, ...] = getattr(self._array.metadata, "dimension_names", None) or ()
        return tuple(name for name in names if name != "parameter")

    def __getitem__(self, key: ExplicitIndexer) -> Any:
        return explicit_indexing_adapter(key, self.shape, IndexingSupport.BASIC, self._read)

    def _read(self, key: tuple[Any, ...]) -> np.ndarray:
        bounded = tuple(self._bounded(part, size) for part, size in zip(key, self.shape, strict=True))
        return self._stream.load(self._array, (bounded[0], self._position, *bounded[1:]))

    @staticmethod
    def _bounded(key: Any, size: int) -> Any:
        return slice(*key.indices(size)) if isinstance(key, slice) else key
