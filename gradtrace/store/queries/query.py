"""The values a query asks for, row by row, straight from the store's arrays."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from itertools import combinations

import numpy as np

from gradtrace.errors import SelectionError, StoreError
from gradtrace.metrics import BUILT_IN, Spectra, find
from gradtrace.store.queries.selection import COSINE, SHARE, Selected
from gradtrace.store.rows import Status
from gradtrace.store.schema import INNER_PRODUCT, metric_variable, status_variable

WHOLE = "all"
BLOCK_ROWS = 2048  # steps read at a time
BLOCK_VALUES = 1 << 22  # held at a time where all parameters of a step come before the next step

Whole = Callable[[], AbstractContextManager[None]]


@dataclass(frozen=True)
class Record:
    """Values of one parameter and kind in one step for one group (or, for a cosine, two)."""

    step: int
    epoch: float
    parameter: str
    kind: str
    group: str
    group_other: str | None
    status: str
    values: Mapping[str, float]  # metric name, or the singular value's place from 1 on -> value


def records(selected: Selected, whole: Whole = nullcontext) -> Iterator[Record]:
    """What the store holds of the selection, parameter by parameter; groups absent from a step are left out.

    whole: what every reading is done within, see `Snapshot.whole`; no record is given of a reading that failed.
    """
    for parameter in selected.parameters:
        for start in range(0, len(selected.rows), BLOCK_ROWS):
            rows = selected.rows[start : start + BLOCK_ROWS]
            for part in _parts(selected, parameter, rows, whole):
                for row in range(len(rows)):
                    yield from part.records(row)


def blocks_of_steps(selected: Selected) -> Iterator[np.ndarray]:
    """The selected rows, as many at a time as can be held of all parameters."""
    widths = (1 if selected.metrics else selected.stream.places[name].width for name in selected.parameters)
    size = sum(widths) * len(selected.kinds) * len(selected.stream.groups)
    most = max(1, min(BLOCK_ROWS, BLOCK_VALUES // max(1, size)))
    for start in range(0, len(selected.rows), most):
        yield selected.rows[start : start + most]


def records_by_step(selected: Selected, rows: np.ndarray, whole: Whole = nullcontext) -> Iterator[Record]:
    """The same as `records` of some rows, one step after another."""
    parts = [part for parameter in selected.parameters for part in _parts(selected, parameter, rows, whole)]
    for row in range(len(rows)):
        for part in parts:
            yield from part.records(row)


class _Part(ABC):
    """What was read of one parameter in some rows."""

    @abstractmethod
    def records(self, row: int) -> Iterator[Record]:
        """The records of one of the rows."""


@dataclass(frozen=True)
class _Measured(_Part):
    """One kind: codes (rows, groups), values (rows, groups, labels)."""

    parameter: str
    kind: str
    steps: np.ndarray
    epochs: np.ndarray
    groups: Sequence[str]
    codes: np.ndarray
    values: np.ndarray
    labels: Sequence[str]

    def records(self, row: int) -> Iterator[Record]:
        codes = self.codes[row]
        for group in np.flatnonzero((codes != Status.GROUP_ABSENT) & (codes != Status.KIND_ABSENT)).tolist():
            yield Record(
                step=int(self.steps[row]),
                epoch=float(self.epochs[row]),
                parameter=self.parameter,
                kind=self.kind,
                group=self.groups[group],
                group_other=None,
                status=Status.NAMES[codes[group]],
                values=dict(zip(self.labels, shortest(self.values[row, group]), strict=True)),
            )


@dataclass(frozen=True)
class _Products(_Part):
    """The cosines between groups: (rows, groups, groups), NaN where one of two is absent."""

    parameter: str
    steps: np.ndarray
    epochs: np.ndarray
    groups: Sequence[str]
    inner: np.ndarray
    cosines: np.ndarray

    def records(self, row: int) -> Iterator[Record]:
        for g, h in combinations(range(len(self.groups)), 2):
            if not np.isnan(self.inner[row, g, h]):
                yield Record(
                    step=int(self.steps[row]),
                    epoch=float(self.epochs[row]),
                    parameter=self.parameter,
                    kind="gradient",
                    group=self.groups[g],
                    group_other=self.groups[h],
                    status=Status.NAMES[Status.MEASURED],
                    values={COSINE: shortest(self.cosines[row, g, h : h + 1])[0]},
                )


def _parts(selected: Selected, parameter: str, rows: np.ndarray, whole: Whole) -> Iterator[_Part]:
    names = [name for name in selected.metrics if name != COSINE]
    available = selected.stream.variables(parameter)
    for kind in selected.kinds if names or not selected.metrics else ():
        own = [name for name in names if name != SHARE or kind == "gradient"]
        if status_variable(kind) in available and (own or not names):
            with whole():
                part = _measured(selected, parameter, kind, rows, own)
            yield part
    if COSINE in selected.metrics:
        with whole():
            products = _products(selected, parameter, rows)
        yield products


def _measured(selected: Selected, parameter: str, kind: str, rows: np.ndarray, names: list[str]) -> _Measured:
    codes = _read(selected, parameter, status_variable(kind), rows)
    if names:
        values = _metrics(selected, parameter, kind, rows, names, measured=(codes == Status.MEASURED).any())
    else:
        values = _spectra(selected, parameter, kind, rows)
    labels = names or [str(place + 1) for place in range(values.shape[2])]
    certain = [place for place, label in enumerate(labels) if not names or label in BUILT_IN]
    _check_measured(selected, parameter, kind, codes, values[..., certain])
    return _Measured(
        parameter=parameter,
        kind=kind,
        steps=selected.stream.steps[rows],
        epochs=selected.stream.per_step("epoch")[rows],
        groups=selected.group_names,
        codes=codes,
        values=values,
        labels=labels,
    )


def _spectra(selected: Selected, parameter: str, kind: str, rows: np.ndarray) -> np.ndarray:
    if kind not in selected.stream.variables(parameter):
        return np.empty((len(rows), len(selected.groups), 0), dtype=np.float32)
    return _read(selected, parameter, kind, rows)[..., : selected.components]


def _metrics(
    selected: Selected, parameter: str, kind: str, rows: np.ndarray, names: list[str], *, measured: bool
) -> np.ndarray:
    columns = []
    for name in names:
        variable, metric = metric_variable(kind, name), find(name)
        if variable in selected.stream.variables(parameter):
            columns.append(_read(selected, parameter, variable, rows))
        elif name == SHARE:
            columns.append(_shares(selected, parameter, rows))
        elif metric is not None and not metric.whole:
            spectrum = _spectra(replace(selected, components=None), parameter, kind, rows)
            columns.append(metric.leniently(Spectra(spectrum)))
        elif measured:
            needs = "" if metric is None else " It needs whole spectra, so it can only be had while recording."
            raise SelectionError(f"This run did not record the metric {name!r} of {kind}s.{needs} Choose another.")
        else:
            columns.append(np.full((len(rows), len(selected.groups)), np.nan))
    return np.stack(columns, axis=-1)


def _products(selected: Selected, parameter: str, rows: np.ndarray) -> _Products:
    inner = _read(selected, parameter, INNER_PRODUCT, rows)[:, :, list(selected.groups)]
    return _Products(
        parameter=parameter,
        steps=selected.stream.steps[rows],
        epochs=selected.stream.per_step("epoch")[rows],
        groups=selected.group_names,
        inner=inner,
        cosines=cosines_of(inner),
    )


def _shares(selected: Selected, parameter: str, rows: np.ndarray) -> np.ndarray:
    """(rows, groups): the part that each group's gradient has in that of all; those of a partition add up to 1."""
    first, whole = int(rows[0]), selected.stream.groups.index(WHOLE)
    block = selected.stream.read(parameter, INNER_PRODUCT, slice(first, int(rows[-1]) + 1))[rows - first]
    with np.errstate(invalid="ignore", divide="ignore"):
        shares = block[:, :, whole].astype(np.float64) / block[:, whole, whole].astype(np.float64)[:, None]
    return np.asarray(shares[:, list(selected.groups)])


def cosines_of(inner: np.ndarray) -> np.ndarray:
    """Inner products (..., groups, groups) by the norms on their diagonal."""
    wide = inner.astype(np.float64)
    norms = np.sqrt(np.einsum("...gg->...g", wide))
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.asarray((wide / norms[..., :, None]) / norms[..., None, :])


def _read(selected: Selected, parameter: str, variable: str, rows: np.ndarray) -> np.ndarray:
    """(rows, groups, ...): the block that spans the rows is read, then thinned."""
    first = int(rows[0])
    block = selected.stream.read(parameter, variable, slice(first, int(rows[-1]) + 1))
    return block[rows - first][:, list(selected.groups)]


def _check_measured(selected: Selected, parameter: str, kind: str, codes: np.ndarray, values: np.ndarray) -> None:
    """A value said to be measured is a number: where it is not, a chunk was lost."""
    if values.shape[-1] and (np.isnan(values[..., 0]) & (codes == Status.MEASURED)).any():
        raise lost_values(selected, parameter, kind)


def lost_values(selected: Selected, parameter: str, kind: str) -> StoreError:
    """What to say where values are marked as measured and are not there."""
    return StoreError(
        f"The store is damaged: some {kind} values of {parameter!r} in {selected.stream.name!r} are marked as "
        "measured, but their chunks are missing. Restore the run from a copy."
    )


def shortest(values: np.ndarray) -> list[float]:
    """The values as Python floats that print with no more digits than float32 has."""
    return [float(text) for text in values.astype(np.float32).astype("U32")]
