"""What is compared: the values of two groups in every parameter, kind and metric, gathered from runs block by block."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from gradtrace.scale import own_scale
from gradtrace.store.queries.query import Whole
from gradtrace.store.queries.selection import Query, Selected, select
from gradtrace.store.reading.reader import Run
from gradtrace.store.rows import Status
from gradtrace.store.tables.blocks import Part, parts

COMPONENT = re.compile(r"sigma([1-9][0-9]*)")
LOGARITHMIC = ("frobenius", "nuclear", "condition")  # and singular values: what is compared by ratios
SCALED = ("frobenius", "nuclear")  # and singular values: what changes with the scale of the matrix
RATIO, PLAIN = "log2 ratio", "difference"
WHOLE = "all"


class Feature(NamedTuple):
    """What is compared. metric: of a spectrum, or `sigma3` for its third value."""

    parameter: str
    kind: str
    metric: str

    @property
    def is_ratio(self) -> bool:
        """Whether two of it are compared by their ratio."""
        return self.metric in LOGARITHMIC or COMPONENT.fullmatch(self.metric) is not None

    @property
    def unit(self) -> str:
        """What a difference of it is in."""
        return RATIO if self.is_ratio else PLAIN


@dataclass
class Series:
    """The two groups in one run. All arrays have one row for each feature.

    sums: (features, windows), of the differences of the steps in a window. counts: how many those are. totals:
    (features, 2), sums of each group's values, or of their logarithms where differences are ratios. left_out:
    (features,), steps without a value of both. there: (features,), whether the parameter has that kind at all.
    """

    features: tuple[Feature, ...]
    sums: np.ndarray
    counts: np.ndarray
    totals: np.ndarray
    left_out: np.ndarray
    there: np.ndarray

    @property
    def present(self) -> list[Feature]:
        """The features that are there."""
        return [feature for feature, there in zip(self.features, self.there, strict=True) if there]

    @property
    def steps(self) -> np.ndarray:
        """(features,): how many steps have a value of both groups."""
        return self.counts.sum(axis=1)

    @property
    def windows(self) -> np.ndarray:
        """(features, windows): the mean difference, NaN where there is none."""
        return _over(self.sums, self.counts)

    @property
    def values(self) -> np.ndarray:
        """(features, 2): the mean of either group over all steps that have both, or of its logarithm to base 2."""
        return _over(self.totals, self.steps[:, None])


@dataclass(frozen=True)
class Reading:
    """How values are to be read. windows: the first step of each. own_mean: at the scale of each group's own mean.
    most: times that one group may be as large as the other in a step that counts; None for any."""

    windows: np.ndarray
    own_mean: bool = True
    most: float | None = None


def query_of(query: Query, metrics: Sequence[str]) -> tuple[Query, int]:
    """The query for these metrics, and how many singular values are needed beside the first."""
    places = [int(found[1]) for name in metrics if (found := COMPONENT.fullmatch(name))]
    stored = tuple(name for name in metrics if not COMPONENT.fullmatch(name) or name == "sigma1")
    return Query(**{**query.__dict__, "metrics": stored}), max(places, default=0)


def series_of(
    run: Run, query: Query, groups: tuple[str, str], metrics: Sequence[str], reading: Reading, whole: Whole
) -> Series:
    """The two groups of one run in all that is selected."""
    selected = select(run, query)
    stream, columns = selected.stream, [selected.group_names.index(name) for name in groups]
    features = tuple(Feature(p, k, m) for p in selected.parameters for k in selected.kinds for m in metrics)
    count, shape = len(features), (len(features), len(reading.windows))
    there = np.zeros(count, bool)
    found = Series(features, np.zeros(shape), np.zeros(shape), np.zeros((count, 2)), np.zeros(count), there)
    sizes = _sizes(selected, groups)
    fits = _fits(sizes[:, :2], reading.most)
    for part in parts(selected, whole):
        rows = np.searchsorted(selected.rows, part.rows)
        window = np.searchsorted(reading.windows, stream.steps[part.rows], side="right") - 1
        values = dict(_values(part, metrics))
        status = part.status()[..., columns]
        matrices = np.array([_is_matrix(run, selected.parameters[name]) for name in part.names])
        for at, metric in enumerate(metrics):
            for k, kind in enumerate(selected.kinds):
                places = (part.names * len(selected.kinds) + k) * len(metrics) + at
                fine = (status[:, :, k] == Status.MEASURED).all(axis=-1) & fits[rows]
                there[places] |= (status[:, :, k] != Status.KIND_ABSENT).any(axis=(1, 2))
                if kind == "gradient" and not features[places[0]].is_ratio:
                    there[places] &= matrices  # the ranks of a vector are 1
                both = values[metric][:, :, k][..., columns].astype(np.float64)
                if reading.own_mean:
                    both = both * _scale(kind, metric, sizes[rows])
                _add(found, places, both, fine, window)
    return found


def _is_matrix(run: Run, parameter: str) -> bool:
    """Whether a gradient can have more than one singular value."""
    rows, *columns = run.parameters[parameter].shape or (1,)
    return min(rows, math.prod(columns)) > 1


def _add(found: Series, places: np.ndarray, both: np.ndarray, fine: np.ndarray, window: np.ndarray) -> None:
    """places: of features of one metric. both: (parameters, rows, 2). fine: (parameters, rows), which of them count."""
    if found.features[places[0]].is_ratio:
        with np.errstate(divide="ignore", invalid="ignore"):
            both = np.log2(both)
    fine = fine & np.isfinite(both).all(axis=2)
    both = np.where(fine[..., None], both, 0.0)
    for at in np.unique(window):
        here = window == at
        found.sums[places, at] += (both[:, here, 0] - both[:, here, 1]).sum(axis=1)
        found.counts[places, at] += fine[:, here].sum(axis=1)
    found.totals[places] += both.sum(axis=1)
    found.left_out[places] += (~fine).sum(axis=1)


def _values(part: Part, metrics: Sequence[str]) -> Iterator[tuple[str, np.ndarray]]:
    """Metric -> (parameters, rows, kinds, groups)."""
    stored = [name for name in metrics if not COMPONENT.fullmatch(name) or name == "sigma1"]
    yield from part.metrics(stored).items()
    places = {name: int(found[1]) for name in metrics if name not in stored and (found := COMPONENT.fullmatch(name))}
    if places:
        spectra = part.spectra(max(places.values()))
        for name, place in places.items():
            there = place <= spectra.shape[-1]
            yield name, spectra[..., place - 1] if there else np.full(spectra.shape[:-1], np.nan)


def _sizes(selected: Selected, groups: tuple[str, str]) -> np.ndarray:
    """(rows, 3): the samples of the two groups, and of all."""
    stream = selected.stream
    counts = stream.per_step("n_samples")[selected.rows].astype(np.float64)
    whole = counts[:, stream.groups.index(WHOLE)] if WHOLE in stream.groups else np.zeros(len(counts))
    return np.column_stack([*(counts[:, stream.groups.index(name)] for name in groups), whole])


def _fits(sizes: np.ndarray, most: float | None) -> np.ndarray:
    """(rows,): whether both groups are there, and neither too large beside the other."""
    least = sizes.min(axis=1)
    return (least > 0) & (True if most is None else sizes.max(axis=1) <= most * least)


def _scale(kind: str, metric: str, sizes: np.ndarray) -> np.ndarray:
    """(rows, 2): what makes of a stored value that of the group by itself; 1 stands for N where it is not stored."""
    if metric not in SCALED and not COMPONENT.fullmatch(metric):
        return np.ones((len(sizes), 2))
    return own_scale(kind, sizes[:, :2], np.where(sizes[:, 2:] > 0, sizes[:, 2:], 1.0))


def _over(sums: np.ndarray, counts: np.ndarray) -> np.ndarray:
    return np.divide(sums, counts, out=np.full(np.broadcast(sums, counts).shape, np.nan), where=counts > 0)


def windows_of(steps: Sequence[np.ndarray], most: int) -> np.ndarray:
    """The first steps of at most so many windows, each of about as many of the steps that any run has."""
    every = np.unique(np.concatenate([np.asarray(one) for one in steps]))
    cuts = np.linspace(0, len(every), min(most, len(every)) + 1).astype(int)[:-1]
    return np.asarray(every[np.unique(cuts)])
