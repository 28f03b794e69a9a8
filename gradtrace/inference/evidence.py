"""What the runs say together of two groups: one row for each parameter, kind and metric."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from gradtrace.inference.procedures import TESTS, Outcome, Settings, is_drawn, paired
from gradtrace.inference.series import Feature, Series
from gradtrace.inference.trajectories import LEAST_BLOCKS, Trajectories, over_runs, within_run

CLUSTER = "cluster"
NUMBERS = ("difference", "low", "high", "effect_g", "effect_low_g", "effect_high_g", "statistic", "p")


@dataclass(frozen=True)
class Evidence:
    """columns: name -> (features,). trajectory, significant: (features, windows).

    largest: as of an `Outcome`, where all features were permuted together. drawn: whether permutations are some of all.
    """

    features: tuple[Feature, ...]
    columns: Mapping[str, np.ndarray]
    trajectory: np.ndarray
    significant: np.ndarray
    largest: np.ndarray | None
    drawn: bool


def weigh(series: Sequence[Series], windows: np.ndarray, test: str, settings: Settings) -> Evidence:
    """series: one for each run. windows: the first step of each. test: of TESTS, or CLUSTER."""
    features = tuple(dict.fromkeys(feature for one in series for feature in one.present))
    together = _Together(features, series, windows, settings)
    for runs, at in together.patterns():
        if len(runs) == 0:
            continue
        if test == CLUSTER:
            together.cluster(runs, at)
        elif len(runs) > 1:
            together.test(test, runs, at)
    return together.evidence(test)


class _Together:
    """All runs in arrays (runs, features, ...), NaN where a run lacks something, and what is found of them."""

    def __init__(
        self, features: tuple[Feature, ...], series: Sequence[Series], windows: np.ndarray, settings: Settings
    ) -> None:
        count, self.windows, self.settings, self.features = len(features), windows, settings, features
        self.values = np.full((len(series), count, 2), np.nan)
        self.differences = np.full((len(series), count, len(windows)), np.nan)
        self.steps, self.left_out = np.zeros((2, len(series), count))
        places = {feature: place for place, feature in enumerate(features)}
        for run, one in enumerate(series):
            at, own = [places[feature] for feature in one.present], one.there
            self.values[run, at], self.differences[run, at] = one.values[own], one.windows[own]
            self.steps[run, at], self.left_out[run, at] = one.steps[own], one.left_out[own]
        self.known = self.steps > 0
        self.found = {name: np.full(count, np.nan) for name in NUMBERS}
        self.first, self.last = np.full((2, count), np.nan)
        self.significant = np.zeros((count, len(windows)), bool)
        self.largest: np.ndarray | None = None
        self.drawn = False

    def patterns(self) -> list[tuple[np.ndarray, np.ndarray]]:
        """(runs, features) that go together: features that the same runs know."""
        if not self.features:
            return []
        patterns, alike = np.unique(self.known.T, axis=0, return_inverse=True)
        return [
            (np.flatnonzero(pattern), np.flatnonzero(alike.reshape(-1) == number))
            for number, pattern in enumerate(patterns)
        ]

    def test(self, test: str, runs: np.ndarray, at: np.ndarray) -> None:
        a, b = self.values[np.ix_(runs, at)].transpose(2, 0, 1)
        outcome = TESTS[test](a, b, self.settings)
        self._put(at, outcome)
        self.found["statistic"][at], self.found["p"][at] = outcome.statistic, outcome.p
        self._keep(outcome.largest, at, is_drawn(len(runs)))

    def cluster(self, runs: np.ndarray, at: np.ndarray) -> None:
        if len(runs) == 1:
            found = within_run(self.differences[runs[0], at], self.settings)
            self.found["difference"][at] = self.values[runs[0], at] @ [1, -1]
            self.found["low"][at], self.found["high"][at] = found.low, found.high
        else:
            a, b = self.values[np.ix_(runs, at)].transpose(2, 0, 1)
            self._put(at, paired(a, b, self.settings))
            found = over_runs(self.differences[np.ix_(runs, at)], self.settings)
            self._keep(found.largest, at, is_drawn(len(runs)))
        self._put_clusters(at, found)

    def evidence(self, test: str) -> Evidence:
        ratios = np.array([one.is_ratio for one in self.features], dtype=bool)
        with np.errstate(invalid="ignore"):
            means = [_mean(self.values[..., side], self.known) for side in (0, 1)]
        mean, other = (np.where(ratios, np.exp2(np.where(ratios, one, 0.0)), one) for one in means)
        runs = self.known.sum(axis=0)
        columns = {
            "parameter": [one.parameter for one in self.features],
            "kind": [one.kind for one in self.features],
            "metric": [one.metric for one in self.features],
            "mean": mean,
            "mean_other": other,
            **self.found,
            "difference": np.where(np.isnan(self.found["difference"]), means[0] - means[1], self.found["difference"]),
            "unit": [one.unit for one in self.features],
            "first_step": self.first,
            "last_step": self.last,
            "runs": runs,
            "steps": self.steps.sum(axis=0).astype(int),
            "left_out": self.left_out.sum(axis=0).astype(int),
        }
        columns["note"] = self._notes(test, runs)
        trajectory = _mean(self.differences, ~np.isnan(self.differences))
        arrays = {name: np.asarray(column) for name, column in columns.items()}
        return Evidence(self.features, arrays, trajectory, self.significant, self.largest, self.drawn)

    def _put(self, at: np.ndarray, outcome: Outcome) -> None:
        for name in NUMBERS[:-2]:
            self.found[name][at] = getattr(outcome, name.removesuffix("_g"))

    def _put_clusters(self, at: np.ndarray, found: Trajectories) -> None:
        self.found["statistic"][at], self.found["p"][at] = found.statistic, found.p
        self.significant[at] = found.significant
        ends = np.append(self.windows[1:], np.nan) - 1
        some = found.first >= 0
        self.first[at[some]] = self.windows[found.first[some]]
        self.last[at[some]] = np.where(np.isnan(ends), self.windows[-1], ends)[found.last[some]]

    def _keep(self, largest: np.ndarray | None, at: np.ndarray, drawn: bool) -> None:
        """Of permutations: how large the largest gets, where they are the same for all features."""
        together = len(at) == self.known.any(axis=0).sum()
        self.largest, self.drawn = largest if together else None, drawn

    def _notes(self, test: str, runs: np.ndarray) -> list[str]:
        each = zip(runs.tolist(), self.found["p"].tolist(), self.found["difference"].tolist(), strict=True)
        return [_note(test, *one) for one in each]


def _note(test: str, runs: int, p: float, difference: float) -> str:
    """Why there is no p, or what limits it."""
    if runs == 0:
        return "no step has a value of both groups"
    if runs == 1:
        few = f"too few stretches that are about independent, fewer than {LEAST_BLOCKS}"
        return "" if p == p else (few if test == CLUSTER else "only one run has it")
    if p == p:
        return ""
    return "all runs say exactly the same" if difference == difference else "no window has a value in all runs"


def _mean(values: np.ndarray, known: np.ndarray) -> np.ndarray:
    """The mean over runs of what is known; NaN where nothing is."""
    count = known.sum(axis=0)
    total = np.where(known, values, 0.0).sum(axis=0)
    return np.divide(total, count, out=np.full(total.shape, np.nan), where=count > 0)
