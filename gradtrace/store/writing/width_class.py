"""The parameters whose spectra are about equally wide, written together: arrays over parameters, few keys a commit."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from gradtrace.store import schema
from gradtrace.store.forms import ALWAYS, SOMETIMES
from gradtrace.store.metadata import ArraySpec
from gradtrace.store.places.keys import Keys
from gradtrace.store.rows import ParameterRow, Status
from gradtrace.store.schema import (
    COMPONENT,
    GROUP,
    GROUP_OTHER,
    INNER_PRODUCT,
    KIND,
    METRIC,
    METRICS,
    OWNER_RESIDUAL,
    PARAMETER,
    RESIDUAL,
    STATUS,
)
from gradtrace.store.writing.column import Column, Labels
from gradtrace.store.writing.past import Past

_FORMS = {**ALWAYS, **SOMETIMES}

Positions = slice | np.ndarray  # where a row's groups stand along the group axis


class WidthClass:
    """One zarr group below a stream: a `parameter` axis of its own, one array per kind, one of all metrics."""

    def __init__(
        self,
        path: str,
        keys: Keys,
        *,
        kinds: Sequence[str],
        metrics: Labels,
        keep: int | None,
        flush_every: int,
        chunks: Mapping[str, int],
        past: Past | None = None,
    ) -> None:
        self.path = path
        self.parameters = Labels(f"{path}/{PARAMETER}", PARAMETER, keys, past)
        self.columns: dict[str, Column] = {}
        self.widths: list[int] = []
        self._keys = keys
        self._kinds, self._metrics, self._keep, self._flush_every = tuple(kinds), metrics, keep, flush_every
        self._widest = 0
        self._chunks = dict(chunks)
        keys.make(path)

    def resume(self, past: Past, rows: int) -> None:
        """Go on after `rows` rows of what is there already."""
        self.widths = list(past.members[self.path]["attributes"]["widths"])
        self._widest = max(self.widths, default=0)
        for name in past.below(self.path):
            spec = past.spec(f"{self.path}/{name}")
            if spec is not None and name != PARAMETER:
                self.columns[name] = Column(spec, self._keys)
                self.columns[name].resume(past, rows)

    def attributes(self) -> dict[str, Any]:
        """The zarr group's attributes: how many components each parameter really has, the rest being padding."""
        return {"widths": list(self.widths)}

    def place(self, index: int, rows: Mapping[str, ParameterRow], *, groups: Positions, count: int) -> None:
        """Fill in what these parameters measured in row `index`; `count` is the length of the group axis.

        Values are gathered first and assigned array by array: one by one takes six times as long.
        """
        positions, given = self.parameters.find(rows), list(rows.values())
        self.widths.extend([0] * (len(self.parameters) - len(self.widths)))
        self._place_spectra(index, positions, given, groups, count)
        inner = self._row(INNER_PRODUCT, index, count)
        inner[_crossed(positions, groups, twice=True)] = np.array([row.inner_product for row in given])
        self._place_metrics(index, positions, given, groups, count)
        self._place_status(index, positions, given, groups, count)
        self._row(RESIDUAL, index, count)[positions] = [row.residual for row in given]
        self._row(OWNER_RESIDUAL, index, count)[positions] = [row.owner_residual for row in given]

    def _place_spectra(
        self, index: int, positions: list[int], rows: Sequence[ParameterRow], groups: Positions, count: int
    ) -> None:
        """The spectra of each kind, those of one width together."""
        alike: dict[tuple[str, int], dict[int, np.ndarray]] = {}
        for position, row in zip(positions, rows, strict=True):
            for kind, spectrum in row.spectra.items():
                values = np.asarray(spectrum)[:, : self._keep]
                width = values.shape[1]
                self.widths[position] = max(self.widths[position], width)
                alike.setdefault((kind, width), {})[position] = values
        self._widest = max([self._widest, *(width for _, width in alike)])
        for (kind, width), found in alike.items():
            target = self._row(kind, index, count)[..., :width]
            target[_crossed(list(found), groups)] = np.array(list(found.values()))

    def _place_metrics(
        self, index: int, positions: list[int], rows: Sequence[ParameterRow], groups: Positions, count: int
    ) -> None:
        """The metrics of each kind, those of parameters that have the same ones together."""
        alike: dict[tuple[str, tuple[str, ...]], dict[int, list[Any]]] = {}
        for position, row in zip(positions, rows, strict=True):
            for kind, metrics in row.metrics.items():
                alike.setdefault((kind, tuple(metrics)), {})[position] = list(metrics.values())
        places = {names: self._metrics.find(names) for _, names in alike}
        for (kind, names), found in alike.items():
            target = self._row(METRICS, index, count)
            measured = np.array(list(found.values()), dtype=np.float64).reshape(len(found), len(names), -1)
            of_kind = target[:, :, self._kinds.index(kind)]
            for place, values in zip(places[names], measured.swapaxes(0, 1), strict=True):
                of_kind[..., place][_crossed(list(found), groups)] = values

    def _place_status(
        self, index: int, positions: list[int], rows: Iterable[ParameterRow], groups: Positions, count: int
    ) -> None:
        target = self._row(STATUS, index, count)
        for position, row in zip(positions, rows, strict=True):
            for place, kind in enumerate(self._kinds):
                if kind in row.status:
                    target[position, groups, place] = row.status[kind]
                elif kind not in row.spectra:
                    target[position, groups, place] = Status.KIND_ABSENT

    def arrays(self, rows: int) -> Iterator[tuple[ArraySpec, tuple[int, ...]]]:
        """Every array with its exact shape when the stream has `rows` rows."""
        yield self.parameters.spec, (len(self.parameters),)
        for column in self.columns.values():
            yield column.spec, column.shape(rows)

    def grow(self, groups: int) -> None:
        """Make every array as long as its axes now are, whether or not this step has values for it."""
        for column in self.columns.values():
            column.grow(self._inner(column.spec.dims, groups))

    def write(self) -> None:
        """Put everything that has changed."""
        self.parameters.write()
        for column in self.columns.values():
            column.write()

    def _row(self, name: str, index: int, groups: int) -> np.ndarray:
        column, (dims, dtype) = self.columns.get(name), _FORMS[name]
        if column is None:
            chunks = schema.chunk_shape(dims, self._chunks, steps=self._flush_every)
            attributes: Mapping[str, Any] = schema.STATUS_ATTRIBUTES if name == STATUS else {}
            spec = ArraySpec(f"{self.path}/{name}", dims, dtype, chunks, attributes)
            column = self.columns[name] = Column(spec, self._keys)
        column.grow(self._inner(dims, groups))
        return column.row(index)

    def _inner(self, dims: Sequence[str], groups: int) -> list[int]:
        """The present lengths of the axes after the step."""
        lengths = {
            PARAMETER: len(self.parameters),
            GROUP: groups,
            GROUP_OTHER: groups,
            COMPONENT: self._widest,
            KIND: len(self._kinds),
            METRIC: len(self._metrics),
        }
        return [lengths[dim] for dim in dims[1:]]


def _crossed(positions: list[int], groups: Positions, *, twice: bool = False) -> Any:
    """The index of these parameters and groups, or groups twice, in an array (parameter, group, ...)."""
    if isinstance(groups, slice):
        return (positions, groups, groups) if twice else (positions, groups)
    of = np.array(positions)
    return np.ix_(of, groups, groups) if twice else np.ix_(of, groups)
