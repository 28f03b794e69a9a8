"""The view users work with: an xarray.DataTree with one node per parameter, of a store or of one batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from xarray import Dataset, DataTree, Variable
from xarray.core.indexing import LazilyIndexedArray

from gradtrace.store.names import node_name
from gradtrace.store.reading.lazy import ParameterArray
from gradtrace.store.reading.stream import Stream
from gradtrace.store.rows import ParameterInfo, ParameterRow, StepRow
from gradtrace.store.schema import (
    COMPONENT,
    GROUP,
    GROUP_OTHER,
    INNER_PRODUCT,
    OWNER_RESIDUAL,
    PART,
    RESIDUAL,
    SCALAR,
    STATUS_ATTRIBUTES,
    STEP,
    metric_variable,
    status_variable,
)

if TYPE_CHECKING:
    from gradtrace.store.reading.reader import Run


def tree_of(row: StepRow, infos: Sequence[ParameterInfo], *, attrs: Mapping[str, Any]) -> DataTree:
    """One batch as a tree: at its root loss, scalars and cost, below it a node per parameter, without a step axis."""
    groups = _labels(row.groups)
    root = Dataset(
        {
            "loss": ((), float(row.loss)),
            "epoch": ((), float(row.epoch)),
            "n_samples": ((GROUP,), np.asarray(row.n_samples)),
            "scalars": ((SCALAR,), np.array(list(row.scalars.values()), dtype=float)),
            "cost": ((PART,), np.array(list(row.cost.values()), dtype=float)),
        },
        coords={GROUP: groups, GROUP_OTHER: groups, SCALAR: _labels(row.scalars), PART: _labels(row.cost)},
        attrs=dict(attrs),
    )
    nodes = {node_name(info.name): _node_of_row(row, info) for info in infos}
    return _assemble(root, nodes)


def tree_of_stream(run: Run, stream: Stream) -> DataTree:
    """A stream of a store as a tree: as `tree_of`, with a step axis, its values read when they are looked at."""
    tables = {
        "loss": (STEP,),
        "epoch": (STEP,),
        "n_samples": (STEP, GROUP),
        "scalars": (STEP, SCALAR),
        "cost": (STEP, PART),
    }
    coords = {
        STEP: stream.steps,
        GROUP: _labels(stream.groups),
        GROUP_OTHER: _labels(stream.groups),
        SCALAR: _labels(stream.scalar_names),
        PART: _labels(stream.cost_parts),
    }
    data = {name: Variable(dims, stream.per_step(name)) for name, dims in tables.items()}
    root = Dataset(data, coords=coords, attrs={**run.attrs, "closed": run.closed, "stream": stream.name})
    nodes = {node_name(name): _node_of_stream(stream, info, data["n_samples"]) for name, info in run.parameters.items()}
    return _assemble(root, nodes)


def _assemble(root: Dataset, nodes: Mapping[str, Dataset]) -> DataTree:
    return DataTree(root, children={name: DataTree(node) for name, node in nodes.items()})


def _node_attributes(info: ParameterInfo) -> dict[str, Any]:
    return {"parameter": info.name, "shape": list(info.shape), **info.attrs}


def _node_of_stream(stream: Stream, info: ParameterInfo, n_samples: Variable) -> Dataset:
    variables = {}
    for name, found in stream.variables(info.name).items():
        array = ParameterArray(stream, info.name, found)
        attributes = STATUS_ATTRIBUTES if array.dtype == np.uint8 else {}
        variables[name] = Variable(found.dims, LazilyIndexedArray(array), attributes, fastpath=True)
    return Dataset({**variables, "n_samples": n_samples}, attrs=_node_attributes(info))


def _node_of_row(row: StepRow, info: ParameterInfo) -> Dataset:
    measured = row.parameters.get(info.name)
    variables: dict[str, Any] = {"n_samples": ((GROUP,), np.asarray(row.n_samples))}
    if measured is not None:
        variables |= _variables_of_row(measured)
    return Dataset(variables, attrs=_node_attributes(info))


def _variables_of_row(measured: ParameterRow) -> dict[str, Any]:
    width = max((values.shape[1] for values in measured.spectra.values()), default=0)
    variables: dict[str, Any] = {
        INNER_PRODUCT: ((GROUP, GROUP_OTHER), np.asarray(measured.inner_product)),
        RESIDUAL: ((), float(measured.residual)),
        OWNER_RESIDUAL: ((), float(measured.owner_residual)),
    }
    for kind, spectrum in measured.spectra.items():
        variables[kind] = ((GROUP, COMPONENT), _padded(np.asarray(spectrum), width))
    for kind, metrics in measured.metrics.items():
        for metric, values in metrics.items():
            variables[metric_variable(kind, metric)] = ((GROUP,), np.asarray(values))
    for kind, codes in measured.status.items():
        variables[status_variable(kind)] = ((GROUP,), np.asarray(codes, dtype=np.uint8), dict(STATUS_ATTRIBUTES))
    return variables


def _padded(spectrum: np.ndarray, width: int) -> np.ndarray:
    """The kinds of a parameter share the component axis; the shorter spectra end in NaN."""
    missing = width - spectrum.shape[1]
    return np.pad(spectrum, ((0, 0), (0, missing)), constant_values=np.nan) if missing else spectrum


def _labels(names: Any) -> np.ndarray:
    return np.array(list(names), dtype=np.dtypes.StringDType())
