"""The values a query asks for, row by row, straight from the store's arrays."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from gradtrace.errors import SelectionError, StoreError
from gradtrace.store.rows import Status
from gradtrace.store.schema import INNER_PRODUCT, metric_variable, status_variable
from gradtrace.store.selection import COSINE, Selected

BLOCK_ROWS = 2048  # steps read at a time


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


def records(selected: Selected) -> Iterator[Record]:
    """What the store holds of the selection, parameter by parameter; groups absent from a step are left out."""
    for parameter in selected.parameters:
        for start in range(0, len(selected.rows), BLOCK_ROWS):
            rows = selected.rows[start : start + BLOCK_ROWS]
            for kind in selected.kinds:
                yield from _of_kind(selected, parameter, kind, rows)
            if COSINE in selected.metrics:
                yield from _cosines(selected, parameter, rows)


def _of_kind(selected: Selected, parameter: str, kind: str, rows: np.ndarray) -> Iterator[Record]:
    names = [name for name in selected.metrics if name != COSINE]
    available = selected.stream.variables(parameter)
    if status_variable(kind) not in available or (selected.metrics and not names):
        return
    codes = _read(selected, parameter, status_variable(kind), rows)
    values = _metrics(selected, parameter, kind, rows, names) if names else _spectra(selected, parameter, kind, rows)
    labels = names or [str(place + 1) for place in range(values.shape[2])]
    _check_measured(selected, parameter, kind, codes, values)
    steps, epochs = selected.stream.steps[rows], selected.stream.per_step("epoch")[rows]
    for i, group in np.argwhere((codes != Status.GROUP_ABSENT) & (codes != Status.KIND_ABSENT)):
        yield Record(
            step=int(steps[i]),
            epoch=float(epochs[i]),
            parameter=parameter,
            kind=kind,
            group=selected.stream.groups[selected.groups[group]],
            group_other=None,
            status=Status.NAMES[codes[i, group]],
            values=dict(zip(labels, shortest(values[i, group]), strict=True)),
        )


def _spectra(selected: Selected, parameter: str, kind: str, rows: np.ndarray) -> np.ndarray:
    if kind not in selected.stream.variables(parameter):
        return np.empty((len(rows), len(selected.groups), 0), dtype=np.float32)
    return _read(selected, parameter, kind, rows)[..., : selected.components]


def _metrics(selected: Selected, parameter: str, kind: str, rows: np.ndarray, names: list[str]) -> np.ndarray:
    columns = []
    for name in names:
        variable = metric_variable(kind, name)
        if variable in selected.stream.variables(parameter):
            columns.append(_read(selected, parameter, variable, rows))
        elif name == "sigma1":
            spectrum = _spectra(selected, parameter, kind, rows)
            columns.append(spectrum[..., 0] if spectrum.shape[-1] else np.full(spectrum.shape[:-1], np.nan))
        elif kind in selected.stream.variables(parameter):
            raise SelectionError(f"This run did not record the metric {name!r} of {kind}s. Choose another.")
        else:
            columns.append(np.full((len(rows), len(selected.groups)), np.nan))
    return np.stack(columns, axis=-1)


def _cosines(selected: Selected, parameter: str, rows: np.ndarray) -> Iterator[Record]:
    inner = _read(selected, parameter, INNER_PRODUCT, rows)[:, :, list(selected.groups)].astype(np.float64)
    norms = np.sqrt(np.einsum("igg->ig", inner))
    with np.errstate(invalid="ignore", divide="ignore"):
        cosines = (inner / norms[:, :, None]) / norms[:, None, :]
    steps, epochs = selected.stream.steps[rows], selected.stream.per_step("epoch")[rows]
    names = [selected.stream.groups[group] for group in selected.groups]
    for i in range(len(rows)):
        for g in range(len(names)):
            for h in range(g + 1, len(names)):
                if np.isnan(inner[i, g, h]):
                    continue
                value = {COSINE: shortest(cosines[i, g, h : h + 1])[0]}
                yield Record(
                    int(steps[i]), float(epochs[i]), parameter, "gradient", names[g], names[h], "measured", value
                )


def _read(selected: Selected, parameter: str, variable: str, rows: np.ndarray) -> np.ndarray:
    """(rows, groups, ...): the block that spans the rows is read, then thinned."""
    first = int(rows[0])
    block = selected.stream.read(parameter, variable, slice(first, int(rows[-1]) + 1))
    return block[rows - first][:, list(selected.groups)]


def _check_measured(selected: Selected, parameter: str, kind: str, codes: np.ndarray, values: np.ndarray) -> None:
    """A value said to be measured is a number: where it is not, a chunk was lost."""
    if values.shape[-1] and (np.isnan(values[..., 0]) & (codes == Status.MEASURED)).any():
        raise StoreError(
            f"The store is damaged: some {kind} values of {parameter!r} in {selected.stream.name!r} are marked as "
            "measured, but their chunks are missing. Restore the run from a copy."
        )


def shortest(values: np.ndarray) -> list[float]:
    """The values as Python floats that print with no more digits than float32 has."""
    return [float(text) for text in values.astype(np.float32).astype("U32")]
