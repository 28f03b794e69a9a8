"""Compares groups in everything that was recorded of them, and says what of it may be chance."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from typing import TYPE_CHECKING, Any

import numpy as np

from gradtrace.errors import SelectionError
from gradtrace.inference import methods
from gradtrace.inference.asking import (
    AUTO,
    Groups,
    Range,
    check_metrics,
    checked_test,
    group_names,
    groups_of,
    probe_of,
    span_of,
)
from gradtrace.inference.correction import corrected
from gradtrace.inference.evidence import CLUSTER, Evidence, weigh
from gradtrace.inference.methods import Design
from gradtrace.inference.procedures import EXACT, Settings
from gradtrace.inference.series import Reading, Series, query_of, series_of, windows_of
from gradtrace.inference.sources import Runs, Source, sources_of
from gradtrace.store.queries.query import Whole
from gradtrace.store.queries.selection import Query, select
from gradtrace.store.reading.reader import Run

if TYPE_CHECKING:
    from pandas import DataFrame

METRICS = ("sigma1", "frobenius", "effective_rank", "stable_rank")
FINE = 0.01  # a p that is small enough not to be told of
WINDOWS, WINDOWS_OF_ONE = 100, 400  # that training is cut into, of several runs and of one


COLUMNS: Mapping[str, str] = {
    "group": "the first group",
    "group_other": "the second one",
    "parameter": "whose gradient, activation or adjoint it is",
    "kind": "which of these",
    "metric": "what of the spectrum",
    "mean": "of the first group over training; geometric where the unit is a ratio",
    "mean_other": "of the second one",
    "difference": "the first group less the second, in `unit`",
    "low": "lower end of its 95 % confidence interval, in `unit`",
    "high": "upper end",
    "unit": "log2 ratio (1: twice as large), or difference",
    "effect_g": "Hedges' g over runs, in standard deviations",
    "effect_low_g": "lower end of its 95 % confidence interval",
    "effect_high_g": "upper end",
    "statistic": "of the test",
    "p": "two-sided",
    "q": "p corrected for all rows of the result",
    "first_step": "of the heaviest cluster",
    "last_step": "of the heaviest cluster",
    "runs": "how many the row is of",
    "steps": "how many have a value of both groups, in all runs",
    "left_out": "how many have not",
    "note": "why something is not there",
}


class NothingSelected(SelectionError):
    """There is no value that is selected."""


@dataclass(frozen=True)
class Comparison:
    """What was found.

    columns: name, as in COLUMNS -> (rows,). windows: the first step of each. trajectory: (rows, windows), the mean
    difference over runs. significant: (rows, windows), of the cluster test, those in clusters with p <= 0.05. notes:
    sentences on what was left out.
    """

    design: Design
    columns: Mapping[str, np.ndarray]
    windows: np.ndarray
    trajectory: np.ndarray
    significant: np.ndarray
    notes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.columns["p"])

    def rows(self) -> Iterator[dict[str, Any]]:
        """One mapping of the columns for each row, NaN as None."""
        for values in zip(*(column.tolist() for column in self.columns.values()), strict=True):
            yield {name: None if value != value else value for name, value in zip(self.columns, values, strict=True)}

    @property
    def frame(self) -> DataFrame:
        """The columns as a pandas.DataFrame."""
        from pandas import DataFrame

        return DataFrame(dict(self.columns))

    @property
    def population(self) -> str:
        """Of whom the results speak, in a sentence."""
        return methods.population(self.design)

    @property
    def methods(self) -> str:
        """A text for a methods section, with what is to be borne in mind."""
        return methods.methods(self.design)


def compare(
    run: Runs,
    *groups: str,
    parameters: Sequence[str] = (),
    kinds: Sequence[str] = (),
    metrics: Sequence[str] = METRICS,
    steps: Range = None,
    epochs: Range = None,
    probe: str | None = AUTO,
    test: str | None = None,
    correction: str = "bh",
    scale: str = "mean",
    matched: float | None = None,
    overlap: float | None = None,
    draws: int = 2000,
    seed: int = 0,
    runs: Sequence[str] = (),
) -> Comparison:
    """Whether groups differ, in each parameter, kind and metric, over training.

    run: a run, its path, merged runs, or several runs (a sequence, or a mapping from labels).
    groups: two or more names, such as "diagnosis=SZ"; a grouping stands for all its groups. All pairs are compared.
    parameters, kinds, steps, epochs: as in a query; ranges are (first, last), both included.
    runs: labels of merged runs, or globs; all of them by default.
    metrics: of a spectrum, or "sigma3" for its third singular value.
    probe: its name, None for the training batches; by default the only probe that has the groups, if there is one.
    test: of TESTS or "cluster"; by default the paired t test over runs, or "cluster" for one run, the only one there.
    correction: "bh", "by", "max" (permutation and cluster tests) or "none".
    scale: "mean", of each group's own mean, or "raw", as stored.
    matched: only steps in which neither group is more than so many times as large as the other.
    overlap: test samples for each training sample of a fold, of the "resampled" test: 1 / (k - 1) for k folds.
    draws, seed: of tests by permutation, where there are too many permutations for all.

    Raises a SelectionError that says what there is instead of a name that is not there.
    """
    sources = sources_of(run, runs)
    settings = Settings(overlap, draws, seed)
    test = checked_test(test, correction, len(sources), settings)
    if scale not in ("mean", "raw"):
        raise SelectionError(f"There is no scale {scale!r}. Choose mean (of each group by itself) or raw (as stored).")
    if matched is not None and not matched >= 1:
        raise SelectionError("matched is how many times as large one group may be as the other: 1 or more.")
    check_metrics(metrics)
    asked = Query(tuple(parameters), tuple(kinds), steps=span_of(steps), epochs=span_of(epochs))
    query, components = query_of(asked, metrics)
    every = {source.name: source.look(lambda one, whole: groups_of(one)) for source in sources}
    names = group_names(groups, every)
    query = replace(query, probe=probe_of(probe, names, every), components=components or None)
    pairs = list(combinations(names, 2))
    if correction == "max" and len(pairs) > 1:
        raise SelectionError("The correction by the largest statistic is for two groups. Choose bh or by.")
    windows = windows_of(_steps(sources, query, every), WINDOWS if len(sources) > 1 else WINDOWS_OF_ONE)
    reading, notes, found = Reading(windows, scale == "mean", matched), dict[str, None](), []
    for pair in pairs:
        series = _series(sources, replace(query, groups=pair), pair, tuple(metrics), reading, every, notes)
        found.append(weigh(series, windows, test, settings))
    columns = _columns(pairs, found, correction)
    notes |= dict.fromkeys(_few(test, found))
    design = Design(
        pairs=pairs,
        runs=int(columns["runs"].max(initial=0)),
        test=test,
        correction=correction,
        settings=settings,
        own_mean=reading.own_mean,
        most=matched,
        probe=query.probe,
        windows=len(windows),
        compared=int((~np.isnan(columns["p"])).sum()),
    )
    trajectory, significant = (
        np.concatenate([getattr(one, name) for one in found]) for name in ("trajectory", "significant")
    )
    return Comparison(design, columns, windows, trajectory, significant, tuple(notes))


def _series(
    sources: Sequence[Source],
    query: Query,
    pair: tuple[str, str],
    metrics: tuple[str, ...],
    reading: Reading,
    every: Groups,
    notes: dict[str, None],
) -> list[Series]:
    """The two groups in every run that has them; what is left out is told in `notes`."""

    def read(run: Run, whole: Whole) -> Series:
        return series_of(run, query, pair, metrics, reading, whole)

    found, failures = [], list[SelectionError]()
    for source in sources:
        if not {*pair} <= {*every[source.name].get(query.probe, ())}:
            notes[f"{source.name} has not both of {pair[0]} and {pair[1]}, and is left out."] = None
            continue
        try:
            found.append(source.look(read))
        except SelectionError as error:
            failures.append(error)
            notes[f"{source.name} is left out: {error}"] = None
    if not found:
        raise (
            failures[0]
            if failures
            else SelectionError(f"No run has both {pair[0]!r} and {pair[1]!r}. Compare groups of one run.")
        )
    return found


def _few(test: str, found: Sequence[Evidence]) -> list[str]:
    """What a small number of runs does to p, where it does."""
    counts = {int(runs) for one in found for runs in one.columns["runs"] if 1 < runs <= EXACT}
    least = 2.0 ** (1 - max(counts, default=0))
    if test not in ("permutation", "wilcoxon", CLUSTER) or not counts or least <= FINE:
        return []
    return [f"With {max(counts)} runs no p can be below {least:.2g}: there are few ways to change signs."]


def _columns(pairs: Sequence[tuple[str, str]], found: Sequence[Evidence], correction: str) -> dict[str, np.ndarray]:
    """All COLUMNS, of all pairs."""
    names = {"group": 0, "group_other": 1}
    columns = {}
    for name in COLUMNS:
        if name in names:
            parts = [
                np.full(len(one.features), pair[names[name]], object) for pair, one in zip(pairs, found, strict=True)
            ]
        else:
            parts = [one.columns["p" if name == "q" else name] for one in found]
        columns[name] = np.concatenate(parts)
    largest = found[0].largest
    if correction == "max" and largest is None:
        raise SelectionError(
            "The correction by the largest statistic needs runs that all have the same parameters. Choose bh or by."
        )
    statistic, drawn = columns["statistic"], found[0].drawn
    columns["q"] = corrected(columns["p"], correction, statistic=statistic, largest=largest, drawn=drawn)
    return columns


def _steps(sources: Sequence[Source], query: Query, every: Groups) -> list[np.ndarray]:
    """The selected steps of every run."""

    def steps(run: Run, whole: Whole) -> np.ndarray:
        with whole():
            selected = select(run, replace(query, patterns=()))
            return np.asarray(selected.stream.steps[selected.rows])

    found = [one.look(steps) for one in sources if query.probe is None or query.probe in every[one.name]]
    if not any(map(len, found)):
        raise NothingSelected("No step is selected: there is nothing to compare.")
    return found
