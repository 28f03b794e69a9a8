"""The parameters whose spectra are about equally wide, written together: arrays over parameters, few files a commit."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from gradtrace.store import schema
from gradtrace.store.column import Column, Labels
from gradtrace.store.files import Files
from gradtrace.store.metadata import ArraySpec
from gradtrace.store.rows import ParameterRow, Status
from gradtrace.store.schema import (
    COMPONENT,
    GROUP,
    GROUP_OTHER,
    INNER_PRODUCT,
    OWNER_RESIDUAL,
    PARAMETER,
    RESIDUAL,
    STEP,
)

Positions = slice | np.ndarray  # where a row's groups stand along the group axis


class WidthClass:
    """One zarr group below a stream: a `parameter` axis of its own, and one array per kind, metric and status."""

    def __init__(
        self,
        path: str,
        files: Files,
        *,
        kinds: Sequence[str],
        keep: int | None,
        flush_every: int,
        chunks: Mapping[str, int],
    ) -> None:
        self.path = path
        self.parameters = Labels(f"{path}/{PARAMETER}", PARAMETER, files)
        self.columns: dict[str, Column] = {}
        self.widths: list[int] = []
        self._files = files
        self._kinds, self._keep, self._flush_every = tuple(kinds), keep, flush_every
        self._chunks = dict(chunks)
        files.make(path)

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
                self._wide(kind, index, count)[position, groups, : values.shape[1]] = values
            self._square(index, count)[(position, *_outer(groups))] = row.inner_product
        for (name, dtype), found in self._gather(positions, rows.values()).items():
            target = self._narrow(name, index, count, dtype)
            target[_cross(list(found), groups)] = np.array(list(found.values())).reshape(len(found), -1)
        self._narrow(RESIDUAL, index, None)[positions] = [row.residual for row in rows.values()]
        self._narrow(OWNER_RESIDUAL, index, None)[positions] = [row.owner_residual for row in rows.values()]

    def _gather(self, positions: Iterable[int], rows: Iterable[ParameterRow]) -> dict[tuple[str, str], dict[int, Any]]:
        """Array name and dtype -> parameter's position -> its values, one per group."""
        found: dict[tuple[str, str], dict[int, Any]] = {}
        for position, row in zip(positions, rows, strict=True):
            for kind, metrics in row.metrics.items():
                for metric, values in metrics.items():
                    found.setdefault((schema.metric_variable(kind, metric), "float32"), {})[position] = values
            absent = np.full(len(row.inner_product), Status.KIND_ABSENT)
            for kind in self._kinds:
                codes = row.status.get(kind)
                if codes is not None or kind not in row.spectra:
                    key = (schema.status_variable(kind), "uint8")
                    found.setdefault(key, {})[position] = absent if codes is None else codes
        return found

    def arrays(self, rows: int) -> Iterator[tuple[ArraySpec, tuple[int, ...]]]:
        """Every array with its exact shape when the stream has `rows` rows."""
        yield self.parameters.spec, (len(self.parameters),)
        for column in self.columns.values():
            yield column.spec, column.shape(rows)

    def grow(self, groups: int) -> None:
        """Make every array as long as its axes now are, whether or not this step has values for it."""
        sizes = {PARAMETER: len(self.parameters), GROUP: groups, GROUP_OTHER: groups, COMPONENT: max(self.widths)}
        for column in self.columns.values():
            column.grow([sizes[dim] for dim in column.spec.dims[1:]])

    def write(self) -> None:
        """Put everything that has changed."""
        self.parameters.write()
        for column in self.columns.values():
            column.write()

    def _wide(self, name: str, index: int, groups: int) -> np.ndarray:
        dims = (STEP, PARAMETER, GROUP, COMPONENT)
        return self._row(name, dims, index, (len(self.parameters), groups, max(self.widths)))

    def _square(self, index: int, groups: int) -> np.ndarray:
        dims = (STEP, PARAMETER, GROUP, GROUP_OTHER)
        return self._row(INNER_PRODUCT, dims, index, (len(self.parameters), groups, groups))

    def _narrow(self, name: str, index: int, groups: int | None, dtype: str = "float32") -> np.ndarray:
        if groups is None:
            return self._row(name, (STEP, PARAMETER), index, (len(self.parameters),), dtype)
        return self._row(name, (STEP, PARAMETER, GROUP), index, (len(self.parameters), groups), dtype)

    def _row(
        self, name: str, dims: tuple[str, ...], index: int, inner: Sequence[int], dtype: str = "float32"
    ) -> np.ndarray:
        column = self.columns.get(name)
        if column is None:
            column = self.columns[name] = Column(self._spec(name, dims, dtype), self._files)
        column.grow(inner)
        return column.row(index)

    def _spec(self, name: str, dims: tuple[str, ...], dtype: str) -> ArraySpec:
        trailing = tuple(self._chunks[dim] for dim in dims[2:])
        plan = schema.wide_chunk if len(dims) == 4 else schema.narrow_chunk
        steps, share = plan(self._flush_every, self._chunks[PARAMETER], math.prod(trailing))
        attributes: Mapping[str, Any] = schema.STATUS_ATTRIBUTES if dtype == "uint8" else {}
        return ArraySpec(f"{self.path}/{name}", dims, dtype, (steps, share, *trailing), attributes)


def _outer(groups: Positions) -> tuple[Any, Any]:
    if isinstance(groups, slice):
        return groups, groups
    return groups[:, None], groups[None, :]


def _cross(positions: list[int], groups: Positions) -> tuple[Any, Any]:
    if isinstance(groups, slice):
        return positions, groups
    return np.array(positions)[:, None], groups[None, :]
