"""The selected values of many parameters at once, as many rows at a time as can be held."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby

import numpy as np

from gradtrace.errors import StoreError
from gradtrace.metrics import Spectra, find
from gradtrace.store.queries.query import Whole, lost_values
from gradtrace.store.queries.selection import Selected
from gradtrace.store.reading.stream import Variable
from gradtrace.store.rows import Status
from gradtrace.store.schema import GROUP, metric_variable, status_variable

SIGMA1 = "sigma1"
BLOCK_VALUES = 1 << 20  # numbers held of one variable


@dataclass(frozen=True)
class Part:
    """Some rows of parameters whose values stand together: they are read at once.

    rows: positions along the step axis. names: positions among the selected parameters. places: those of the same
    parameters in the store's arrays.
    """

    selected: Selected
    rows: np.ndarray
    names: np.ndarray
    places: np.ndarray
    variables: Mapping[str, Variable]
    whole: Whole

    def read(self, variable: str) -> np.ndarray:
        """(parameters, rows, ...) of what is selected."""
        return self._load(self.variables[variable])

    def status(self) -> np.ndarray:
        """The status codes: (parameters, rows, kinds, groups)."""
        found = np.full(self._shape, Status.KIND_ABSENT, np.uint8)
        for place, kind in enumerate(self.selected.kinds):
            if status_variable(kind) in self.variables:
                found[:, :, place] = self.read(status_variable(kind))
        if found.size and found.max() >= len(Status.NAMES):
            raise StoreError(f"The store is damaged: it holds the status {found.max()}, which there is not.")
        return found

    def spectra(self, components: int | None) -> np.ndarray:
        """Singular values: (parameters, rows, kinds, groups, components), in the end NaN where there are fewer."""
        there = {
            place: self._load(self.variables[kind], components)
            for place, kind in enumerate(self.selected.kinds)
            if kind in self.variables
        }
        width = max((values.shape[-1] for values in there.values()), default=0)
        found = np.full((*self._shape, width), np.nan, np.float32)
        for place, values in there.items():
            found[:, :, place] = values
        return found

    def metrics(self, names: Sequence[str]) -> dict[str, np.ndarray]:
        """Name -> (parameters, rows, kinds, groups); what is not stored is made of the stored spectra, if it can be."""
        whole: dict[str, np.ndarray] = {}
        found = {name: np.full(self._shape, np.nan, np.float32) for name in names}
        for name, values in found.items():
            for place, kind in enumerate(self.selected.kinds):
                variable = self.variables.get(metric_variable(kind, name))
                if variable is not None:
                    path = variable.array.path
                    if path not in whole:  # all metrics stand in one array
                        whole[path] = self._load(variable._replace(at=()))
                    of_kind, of_metric = variable.at
                    values[:, :, place] = whole[path][..., of_kind, of_metric]
                elif name == SIGMA1 and kind in self.variables:
                    values[:, :, place] = self._load(self.variables[kind], 1)[..., 0]
                elif (metric := find(name)) and not metric.whole and kind in self.variables:
                    values[:, :, place] = metric.leniently(Spectra(self._load(self.variables[kind])))
        return found

    def check(self, status: np.ndarray, nothing: np.ndarray) -> None:
        """A value said to be measured is a number: where there is nothing, a chunk was lost."""
        lost = np.argwhere(nothing & (status == Status.MEASURED))
        if len(lost):
            parameter, _, kind, _ = lost[0]
            name = self.selected.parameters[self.names[parameter]]
            raise lost_values(self.selected, name, self.selected.kinds[kind])

    @property
    def _shape(self) -> tuple[int, int, int, int]:
        return len(self.places), len(self.rows), len(self.selected.kinds), len(self.selected.groups)

    def _load(self, variable: Variable, components: int | None = None) -> np.ndarray:
        rows, places = (slice(int(at[0]), int(at[-1]) + 1) for at in (self.rows, self.places))
        cut = (slice(None), slice(0, components)) if components else (Ellipsis,)
        with self.whole():
            values = self.selected.stream.load(variable.array, (rows, places, *cut, *variable.at))
        thinned = values[self.rows - rows.start][:, self.places - places.start].swapaxes(0, 1)
        return thinned[:, :, list(self.selected.groups)] if GROUP in variable.dims else thinned


def parts(selected: Selected, whole: Whole) -> Iterator[Part]:
    """Everything that is selected: one chunk of parameters after another, each from its first row to its last."""
    stream = selected.stream
    standing = sorted((*stream.places[name][:2], at) for at, name in enumerate(selected.parameters))
    for _, found in groupby(standing, key=lambda place: place[0]):
        together = list(found)
        variables = dict(stream.variables(selected.parameters[together[0][2]]))
        shape, chunks = _layout(selected, variables)
        for _, chunk in groupby(together, key=lambda place, many=chunks[1]: place[1] // many):  # type: ignore[misc]
            _, places, names = (np.array(column) for column in zip(*chunk, strict=True))
            size = len(names) * len(selected.kinds) * len(selected.groups) * shape[-1]
            for rows in _blocks(selected.rows, BLOCK_VALUES // max(1, size), chunks[0]):
                yield Part(selected, rows, names, places, variables, whole)


def _layout(selected: Selected, variables: Mapping[str, Variable]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shape and chunks of the largest arrays there are: of spectra, else of status codes."""
    names = [*selected.kinds, *map(status_variable, selected.kinds)]
    array = next(variables[name].array for name in names if name in variables)
    return array.shape, array.chunks


def _blocks(rows: np.ndarray, most: int, chunk: int) -> Iterator[np.ndarray]:
    """At most so many of the rows at a time; whole chunks, if it can be, as each is read for every block it is in."""
    size = max(1, most // chunk * chunk or most)
    for _, block in groupby(rows.tolist(), key=lambda row: row // size):
        yield np.array(list(block))
