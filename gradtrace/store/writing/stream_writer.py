"""One series of rows on its way to disk: the training run, or a probe, each with its own steps and groups."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from gradtrace.store import schema
from gradtrace.store.forms import LABELS, PER_STEP, WIDTH_CLASS
from gradtrace.store.metadata import ArraySpec
from gradtrace.store.places.keys import Keys
from gradtrace.store.rows import ParameterRow, StepRow
from gradtrace.store.schema import (
    COMPONENT,
    GROUP,
    GROUP_OTHER,
    KIND,
    METRIC,
    METRICS_CHUNK,
    PARAMETER,
    PART,
    SCALAR,
    SERIES_CHUNK,
    STEP,
    TABLE_CHUNK,
)
from gradtrace.store.writing.column import Column, Labels
from gradtrace.store.writing.past import Past
from gradtrace.store.writing.width_class import Positions, WidthClass


class StreamWriter:
    """One zarr group with `step` and `group` coordinates, what holds per step, and a child per width class.

    past: what is there already, where the stream goes on.
    """

    def __init__(
        self,
        path: str,
        keys: Keys,
        *,
        flush_every: int,
        kinds: Sequence[str],
        keep: int | None,
        past: Past | None = None,
    ) -> None:
        self.path = path
        self.rows = 0
        self._keys = keys
        self._flush_every, self._kinds, self._keep = flush_every, tuple(kinds), keep
        self._classes: dict[int, WidthClass] = {}
        self._home: dict[str, WidthClass] = {}
        keys.make(path)
        self._labels = {dim: Labels(f"{path}/{dim}", dim, keys, past) for dim in LABELS}
        self._labels[KIND].find(kinds)
        self._step = self._column(STEP, past)
        self._loss = self._column("loss", past)
        self._epoch = self._column("epoch", past)
        self._n_samples = self._column("n_samples", past)
        self._scalars = self._column("scalars", past)
        self._cost = self._column("cost", past)
        if past is not None:
            self._resume(past)

    def _resume(self, past: Past) -> None:
        self.rows = past.rows[self.path]
        for name in past.below(self.path):
            if WIDTH_CLASS.fullmatch(name):
                names = past.names(f"{self.path}/{name}/{PARAMETER}")
                member = self._classes[int(name[1:])] = self._new_class(int(name[1:]), len(names), past)
                member.resume(past, self.rows)
                self._home |= dict.fromkeys(names, member)

    def place(self, row: StepRow) -> None:
        """Fill the row in, in memory; blocks of rows that it completes are written."""
        index = self.rows
        positions = self._labels[GROUP].find(row.groups)
        self._labels[GROUP_OTHER].find(row.groups)
        self._step.row(index)[...] = row.step
        self._loss.row(index)[...] = row.loss
        self._epoch.row(index)[...] = row.epoch
        self._fill_table(self._n_samples, index, dict(zip(row.groups, row.n_samples, strict=True)), GROUP)
        self._fill_table(self._scalars, index, row.scalars, SCALAR)
        self._fill_table(self._cost, index, row.cost, PART)
        self._place_parameters(index, row.parameters, _compact(positions))
        self.rows = index + 1

    def write(self) -> None:
        """Put everything that has changed; nothing of it shows until the root says so."""
        for labels in self._labels.values():
            labels.write()
        for column in self._tables():
            column.write()
        for member in self._classes.values():
            member.write()

    def arrays(self) -> Iterator[tuple[ArraySpec, tuple[int, ...]]]:
        """Every array with its exact shape."""
        for labels in self._labels.values():
            yield labels.spec, (len(labels),)
        for column in self._tables():
            yield column.spec, column.shape(self.rows)
        for member in self._classes.values():
            yield from member.arrays(self.rows)

    def groups(self) -> Iterator[tuple[str, Mapping[str, Any]]]:
        """Every zarr group with its attributes."""
        yield self.path, {}
        for member in self._classes.values():
            yield member.path, member.attributes()

    def _place_parameters(self, index: int, rows: Mapping[str, ParameterRow], groups: Positions) -> None:
        self._house({name: row for name, row in rows.items() if name not in self._home})
        count = len(self._labels[GROUP])
        for member in self._classes.values():
            present = {name: row for name, row in rows.items() if self._home[name] is member}
            if present:
                with np.errstate(over="ignore"):  # what is beyond float32 (a condition number) is stored as infinity
                    member.place(index, present, groups=groups, count=count)
            member.grow(count)

    def _house(self, rows: Mapping[str, ParameterRow]) -> None:
        """Give new parameters a width class by the widest of their spectra."""
        newcomers: dict[int, list[str]] = {}
        for name, row in rows.items():
            widest = max((np.shape(values)[1] for values in row.spectra.values()), default=1)
            newcomers.setdefault(schema.width_class(min(widest, self._keep or widest)), []).append(name)
        for width, names in newcomers.items():
            if width not in self._classes:
                self._classes[width] = self._new_class(width, len(names))
            for name in names:
                self._home[name] = self._classes[width]

    def _new_class(self, width: int, parameters: int, past: Past | None = None) -> WidthClass:
        groups = max(len(self._labels[GROUP]), 4)
        return WidthClass(
            f"{self.path}/w{width}",
            self._keys,
            kinds=self._kinds,
            metrics=self._labels[METRIC],
            keep=self._keep,
            flush_every=self._flush_every,
            past=past,
            chunks={
                PARAMETER: parameters,
                GROUP: groups,
                GROUP_OTHER: groups,
                COMPONENT: width,
                KIND: len(self._kinds),
                METRIC: METRICS_CHUNK,
            },
        )

    def _fill_table(self, column: Column, index: int, values: Mapping[str, float], dim: str) -> None:
        positions = self._labels[dim].find(values)
        column.grow((len(self._labels[dim]),))
        column.row(index)[positions] = list(values.values())

    def _tables(self) -> tuple[Column, ...]:
        return self._step, self._loss, self._epoch, self._n_samples, self._scalars, self._cost

    def _column(self, name: str, past: Past | None) -> Column:
        dims, dtype = PER_STEP[name]
        path, chunks = f"{self.path}/{name}", (SERIES_CHUNK,) if len(dims) == 1 else TABLE_CHUNK
        there = past.spec(path) if past else None
        column = Column(there or ArraySpec(path, dims, dtype, chunks), self._keys)
        if past is not None and there is not None:
            column.resume(past, past.rows[self.path])
        return column


def _compact(positions: Sequence[int]) -> Positions:
    """A slice where the positions are 0, 1, 2, ...: the usual case, and faster to assign to."""
    return slice(0, len(positions)) if list(positions) == list(range(len(positions))) else np.array(positions)
