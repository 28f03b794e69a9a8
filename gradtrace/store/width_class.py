"""The parameters whose spectra are about equally wide, written together: arrays over parameters, few keys a commit."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from gradtrace.store import schema
from gradtrace.store.column import Column, Labels
from gradtrace.store.keys import Keys
from gradtrace.store.metadata import ArraySpec
from gradtrace.store.past import Past
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
    STEP,
)

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
        known: Sequence[str] = (),
    ) -> None:
        self.path = path
        self.parameters = Labels(f"{path}/{PARAMETER}", PARAMETER, keys, known)
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
        positions = self.parameters.find(rows)
        self.widths.extend([0] * (len(self.parameters) - len(self.widths)))
        for position, row in zip(positions, rows.values(), strict=True):
            for kind, spectrum in row.spectra.items():
                values = np.asarray(spectrum)[:, : self._keep]
                self.widths[position] = max(self.widths[position], values.shape[1])
                self._widest = max(self._widest, values.shape[1])
                spectra = self._row(kind, (STEP, PARAMETER, GROUP, COMPONENT), index, count)
                spectra[position, groups, : values.shape[1]] = values
            inner = self._row(INNER_PRODUCT, (STEP, PARAMETER, GROUP, GROUP_OTHER), index, count)
            inner[(position, *_outer(groups))] = row.inner_product
        self._place_metrics(index, positions, rows.values(), groups, count)
        self._place_status(index, positions, rows.values(), groups, count)
        self._row(RESIDUAL, (STEP, PARAMETER), index, count)[positions] = [row.residual for row in rows.values()]
        self._row(OWNER_RESIDUAL, (STEP, PARAMETER), index, count)[positions] = [
            row.owner_residual for row in rows.values()
        ]

    def _place_metrics(
        self, index: int, positions: list[int], rows: Iterable[ParameterRow], groups: Positions, count: int
    ) -> None:
        found: dict[tuple[int, int], dict[int, Any]] = {}
        for position, row in zip(positions, rows, strict=True):
            for kind, metrics in row.metrics.items():
                of_kind = self._kinds.index(kind)
                for place, values in zip(self._metrics.find(metrics), metrics.values(), strict=True):
                    found.setdefault((of_kind, place), {})[position] = values
        if found:
            target = self._row(METRICS, (STEP, PARAMETER, GROUP, KIND, METRIC), index, count)
        for where, measured in found.items():
            block = np.array(list(measured.values())).reshape(len(measured), -1)
            target[(*_cross(list(measured), groups), *where)] = block

    def _place_status(
        self, index: int, positions: list[int], rows: Iterable[ParameterRow], groups: Positions, count: int
    ) -> None:
        target = self._row(STATUS, (STEP, PARAMETER, GROUP, KIND), index, count, "uint8")
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

    def _row(self, name: str, dims: tuple[str, ...], index: int, groups: int, dtype: str = "float32") -> np.ndarray:
        column = self.columns.get(name)
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


def _outer(groups: Positions) -> tuple[Any, Any]:
    if isinstance(groups, slice):
        return groups, groups
    return groups[:, None], groups[None, :]


def _cross(positions: list[int], groups: Positions) -> tuple[Any, Any]:
    if isinstance(groups, slice):
        return positions, groups
    return np.array(positions)[:, None], groups[None, :]
