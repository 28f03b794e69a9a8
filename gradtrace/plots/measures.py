"""What is read of each block of a store for a picture, at the scale at which it is shown."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from gradtrace.errors import SelectionError
from gradtrace.metrics import BUILT_IN, Spectra, find
from gradtrace.plots.words import ALL, SCALED
from gradtrace.store.queries.query import cosines_of
from gradtrace.store.rows import Status
from gradtrace.store.schema import INNER_PRODUCT, metric_variable
from gradtrace.store.tables.blocks import SIGMA1, Part


class Measure(ABC):
    """What is taken of a block: (parameters, rows, groups, ...)."""

    @abstractmethod
    def shape(self, groups: int) -> tuple[int, ...]:
        """Of what is taken of one step of one parameter; blocks may be shorter along its last axis."""

    @abstractmethod
    def of(self, part: Part) -> np.ndarray:
        """What is taken of a block."""

    @property
    def rescaled(self) -> bool:
        """Whether it is of each group's own mean, instead of its part of the batch's."""
        return False

    def each(self, groups: int) -> int:
        """How many numbers stand for one group."""
        return int(np.prod(self.shape(groups))) // groups or 1

    def called(self, groups: Sequence[str]) -> tuple[str, ...]:
        """The names along the axis of groups."""
        return tuple(groups)


@dataclass(frozen=True)
class Metric(Measure):
    """One number a spectrum."""

    name: str
    own_mean: bool

    @property
    def rescaled(self) -> bool:
        return self.own_mean and self.name in SCALED

    def shape(self, groups: int) -> tuple[int, ...]:
        return (groups,)

    def of(self, part: Part) -> np.ndarray:
        status, values = part.status(), self._values(part)
        if values is None:
            if (status == Status.MEASURED).any():
                kind = part.selected.kinds[0]
                raise SelectionError(f"This run did not record the metric {self.name!r} of {kind}s. Choose another.")
            return np.full((len(part.names), len(part.rows), len(part.selected.groups)), np.nan)
        if self.name in BUILT_IN:
            part.check(status, np.isnan(values))
        return values[:, :, 0]

    def _values(self, part: Part) -> np.ndarray | None:
        """As stored, or, of a metric that needs no more, computed from the stored singular values."""
        if self.name == SIGMA1 or metric_variable(part.selected.kinds[0], self.name) in part.variables:
            return part.metrics([self.name])[self.name]
        metric = find(self.name)
        return None if metric is None or metric.whole else metric.leniently(Spectra(part.spectra(None)))


@dataclass(frozen=True)
class Spectrum(Measure):
    """The largest singular values, `components` of them."""

    components: int
    own_mean: bool

    @property
    def rescaled(self) -> bool:
        return self.own_mean

    def shape(self, groups: int) -> tuple[int, ...]:
        return (groups, self.components)

    def of(self, part: Part) -> np.ndarray:
        values = part.spectra(self.components)
        part.check(part.status(), np.isnan(values).all(axis=-1))
        return values[:, :, 0]


@dataclass(frozen=True)
class Products(Measure):
    """The inner products of the groups' gradients."""

    def shape(self, groups: int) -> tuple[int, ...]:
        return (groups, groups)

    def of(self, part: Part) -> np.ndarray:
        if INNER_PRODUCT not in part.variables:
            return np.full((len(part.names), len(part.rows), *self.shape(len(part.selected.groups))), np.nan)
        return part.read(INNER_PRODUCT)[..., list(part.selected.groups)]


@dataclass(frozen=True)
class PairCosine(Measure):
    """The cosine between the gradients of two groups."""

    def shape(self, groups: int) -> tuple[int, ...]:
        return (1,)

    def of(self, part: Part) -> np.ndarray:
        return cosines_of(Products().of(part))[..., 0, 1, None]

    def called(self, groups: Sequence[str]) -> tuple[str, ...]:
        first, second = groups
        return (f"{first} and {second}",)


@dataclass(frozen=True)
class Share(Measure):
    """A group's share of the gradient of all samples: their inner product by the square of the norm of all."""

    def shape(self, groups: int) -> tuple[int, ...]:
        return (groups,)

    def of(self, part: Part) -> np.ndarray:
        every = part.selected.stream.groups
        if ALL not in every or INNER_PRODUCT not in part.variables:
            return np.full((len(part.names), len(part.rows), len(part.selected.groups)), np.nan)
        whole = every.index(ALL)
        inner = part.read(INNER_PRODUCT)[..., whole].astype(np.float64)
        norms = replace(part, selected=replace(part.selected, groups=(whole,))).read(INNER_PRODUCT)[..., whole]
        with np.errstate(invalid="ignore", divide="ignore"):
            return np.asarray(inner / norms.astype(np.float64))
