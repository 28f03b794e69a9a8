"""Merged runs as an xarray.DataTree: as the tree of a run, with the dimension `run` before all others."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from xarray import Dataset, DataTree, Variable
from xarray.backends import BackendArray
from xarray.core.indexing import ExplicitIndexer, IndexingSupport, LazilyIndexedArray, explicit_indexing_adapter

from gradtrace.store.names import node_name
from gradtrace.store.reading.runs import RECORDED
from gradtrace.store.reading.stream import Stream
from gradtrace.store.reading.stream import Variable as Found
from gradtrace.store.reading.taken import Taken
from gradtrace.store.rows import ParameterInfo
from gradtrace.store.schema import (
    COMPONENT,
    GROUP,
    GROUP_OTHER,
    KIND,
    METRIC,
    PARAMETER,
    PART,
    RUN,
    SCALAR,
    STATUS_ATTRIBUTES,
    STEP,
)

if TYPE_CHECKING:
    from gradtrace.store.reading.merged import MergedRun

TABLES = {
    "loss": (RUN, STEP),
    "epoch": (RUN, STEP),
    RECORDED: (RUN, STEP),
    "n_samples": (RUN, STEP, GROUP),
    "scalars": (RUN, STEP, SCALAR),
    "cost": (RUN, STEP, PART),
}


def tree_of_runs(run: MergedRun, stream: Stream) -> DataTree:
    """A stream of all runs; the values of parameters are read when they are looked at."""
    names = {
        RUN: run.runs,
        GROUP: stream.groups,
        GROUP_OTHER: stream.groups,
        SCALAR: stream.scalar_names,
        PART: stream.cost_parts,
    }
    labels = {dim: np.array(list(of), dtype=np.dtypes.StringDType()) for dim, of in names.items()}
    tables = {name: Variable(dims, stream.per_step(name)) for name, dims in TABLES.items()}
    about = {**run.attrs, "closed": run.closed, "stream": stream.name}
    root = Dataset(tables, coords={**labels, STEP: stream.steps}, attrs=about)
    nodes = {
        node_name(name): DataTree(_node(stream, info, tables["n_samples"])) for name, info in run.parameters.items()
    }
    return DataTree(root, children=nodes)


def _node(stream: Stream, info: ParameterInfo, n_samples: Variable) -> Dataset:
    variables = {"n_samples": n_samples}
    for name, found in stream.variables(info.name).items():
        array = _OfParameter(stream, info.name, found)
        attributes = STATUS_ATTRIBUTES if array.dtype == np.uint8 else {}
        variables[name] = Variable(array.dims, LazilyIndexedArray(array), attributes, fastpath=True)
    return Dataset(variables, attrs={"parameter": info.name, "shape": list(info.shape), **info.attrs})


class _OfParameter(BackendArray):
    """A zarr array (run, step, parameter, ...) at one parameter, as xarray's lazy arrays want it."""

    def __init__(self, stream: Stream, parameter: str, found: Found) -> None:
        place = stream.places[parameter]
        at = dict(zip((KIND, METRIC), found.at, strict=False))
        width = np.arange(place.width)
        self._stream = stream
        self._array = Taken(found.array, {PARAMETER: place.position, COMPONENT: width, **at})
        self.dims, self.shape, self.dtype = self._array.dims, self._array.shape, self._array.dtype

    def __getitem__(self, key: ExplicitIndexer) -> Any:
        return explicit_indexing_adapter(key, self.shape, IndexingSupport.BASIC, self._read)

    def _read(self, key: tuple[Any, ...]) -> np.ndarray:
        return self._stream.load(self._array, key)  # type: ignore[arg-type]
