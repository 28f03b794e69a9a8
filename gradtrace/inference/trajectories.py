"""Whether two groups train differently at some time: cluster-based permutation over training.

Training is cut into windows. Windows in a row that differ in the same direction, each by more than a threshold, are a
cluster; its mass is the sum of their statistics. The largest mass is compared with those after changes of signs that
leave the order in time as it is (Maris & Oostenveld 2007), so that windows may depend on their neighbours. What is
significant is that there is a difference somewhere; a cluster says roughly where.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
from scipy import stats

from gradtrace.inference.procedures import Settings, interval, is_drawn, sign_changes

LEAST_BLOCKS = 8  # independent stretches of one run below which nothing is said
ALPHA = 0.05  # of the threshold of a window, and of a cluster
LEAST_MEAN = 0.25  # of a stretch in a cluster, by the root mean square of all
STRETCH = 3.0  # length of a stretch, in autocorrelation times


@dataclass(frozen=True)
class Trajectories:
    """What was found, for each of the features.

    p: of the heaviest cluster; NaN where too little is known. statistic: its mass, signed. first, last: its windows, -1
    where there is none. significant: (features, windows), those in clusters with p <= ALPHA. low, high: a confidence
    interval of the mean difference, of one run. largest: (changes,) of the largest mass of all features, where all of
    them change together.
    """

    p: np.ndarray
    statistic: np.ndarray
    first: np.ndarray
    last: np.ndarray
    significant: np.ndarray
    low: np.ndarray
    high: np.ndarray
    largest: np.ndarray | None = None


def over_runs(differences: np.ndarray, settings: Settings) -> Trajectories:
    """differences: (runs, features, windows), NaN where a run has no value; such windows are in no cluster.

    Whole runs change sign: runs must be independent, and the groups exchangeable in them. The statistic of a window is
    the t of its differences.
    """
    runs, known = len(differences), ~np.isnan(differences).any(axis=0)
    differences = np.where(known, differences, 0.0)
    squares = (differences**2).sum(axis=0)
    threshold = float(stats.t.ppf(1 - ALPHA / 2, runs - 1))

    def statistic(signs: np.ndarray) -> np.ndarray:
        mean = np.tensordot(signs, differences, 1) / runs
        with np.errstate(invalid="ignore", divide="ignore"):
            t = mean / np.sqrt(np.maximum(squares - runs * mean**2, 0.0) / (runs - 1) / runs)
        return np.nan_to_num(np.where(squares > 0, t, 0.0), posinf=1e6, neginf=-1e6)

    found = _clusters(statistic, sign_changes(runs, settings), threshold, drawn=is_drawn(runs))
    found.p[~known.any(axis=1)] = np.nan
    return found


def within_run(differences: np.ndarray, settings: Settings) -> Trajectories:
    """differences: (features, windows) of one run, NaN where there is no value.

    Windows are averaged into stretches several times as long as the differences depend on their past, and stretches
    change sign: they must be about independent, and as often above as below 0 where the groups are alike. Features with
    fewer than LEAST_BLOCKS stretches get no p. The statistic is the mean of a stretch by the root mean square of all.
    """
    found = _nothing(*differences.shape)
    patterns, alike = np.unique(~np.isnan(differences), axis=0, return_inverse=True)
    for number, pattern in enumerate(patterns):
        windows = np.flatnonzero(pattern)
        features = np.flatnonzero(alike.reshape(-1) == number)
        if len(windows) >= LEAST_BLOCKS:
            _within(found, differences[np.ix_(features, windows)], features, windows, settings)
    return found


def _within(
    found: Trajectories, differences: np.ndarray, features: np.ndarray, windows: np.ndarray, settings: Settings
) -> None:
    """Fill in what is found of features that have values in the same windows."""
    lengths = 2 ** np.ceil(np.log2(STRETCH * autocorrelation_time(differences))).astype(int)
    for length in np.unique(lengths[len(windows) // lengths >= LEAST_BLOCKS]):
        own, starts = lengths == length, np.arange(0, len(windows) // length * length, length)
        sizes = np.diff([*starts, len(windows)])  # the last stretch takes what is left
        means = np.add.reduceat(differences[own], starts, axis=1) / sizes
        root = np.sqrt((means**2).mean(axis=1, keepdims=True))
        scaled = np.divide(means, root, out=np.zeros_like(means), where=root > 0)
        changes = sign_changes(len(starts), settings)
        of_stretches = _clusters(partial(np.multiply, scaled), changes, LEAST_MEAN, drawn=is_drawn(len(starts)))
        _put(found, features[own], of_stretches, windows[starts], windows[np.cumsum(sizes) - 1])
        found.low[features[own]], found.high[features[own]] = interval(means.T)


def autocorrelation_time(series: np.ndarray) -> np.ndarray:
    """(features,): in windows, of (features, windows): 1 + 2 times the sum of the autocorrelations.

    The sum goes up to the window of Sokal (1997), or is that of an autoregression of first order, corrected for the
    bias of its coefficient in short series (Kendall 1954), whichever is larger.
    """
    centred = series - series.mean(axis=1, keepdims=True)
    n = series.shape[1]
    spectrum = np.abs(np.fft.rfft(centred, 2 * n, axis=1)) ** 2
    covariance = np.fft.irfft(spectrum, axis=1)[:, :n]
    first = covariance[:, :1]
    correlation = np.divide(covariance, first, out=np.zeros_like(covariance), where=first > 0)
    times = np.maximum(1.0, 2 * np.cumsum(correlation, axis=1) - 1)
    enough = np.arange(n) >= 5 * times
    at = np.where(enough.any(axis=1), enough.argmax(axis=1), n - 1)
    coefficient = correlation[:, min(1, n - 1)]
    coefficient = np.where(first[:, 0] > 0, np.clip(coefficient + (1 + 4 * coefficient) / n, 0.0, 0.999), 0.0)
    return np.maximum(times[np.arange(len(times)), at], (1 + coefficient) / (1 - coefficient))


def _clusters(
    statistic: Callable[[np.ndarray], np.ndarray], signs: np.ndarray, threshold: float, *, drawn: bool
) -> Trajectories:
    """statistic: of signs, (features, windows)."""
    observed = statistic(np.ones(signs.shape[1]))
    masses = np.abs(cluster_masses(observed, threshold))
    chance = np.stack([heaviest(statistic(row), threshold) for row in signs])  # (changes, features)
    ordered = np.sort(chance, axis=0)
    heavy = masses.max(axis=1, initial=0.0)
    at_least = np.stack(
        [len(signs) - np.searchsorted(of, each * (1 - 1e-9)) for of, each in zip(ordered.T, masses, strict=True)]
    )
    p = (at_least + drawn) / (len(signs) + drawn)
    inside = (masses == heavy[:, None]) & (heavy > 0)[:, None]
    first, last = _ends(inside)
    place = np.maximum(first, 0)
    rows = np.arange(len(observed))
    nothing = np.full(len(observed), np.nan)
    return Trajectories(
        p=np.where(first < 0, 1.0, p[rows, place]),
        statistic=np.where(first < 0, 0.0, heavy * np.sign(observed[rows, place])),
        first=first,
        last=last,
        significant=(p <= ALPHA) & (masses > 0),
        low=nothing,
        high=nothing,
        largest=chance.max(axis=1, initial=0.0),
    )


def heaviest(statistic: np.ndarray, threshold: float) -> np.ndarray:
    """(features,): the mass of the heaviest cluster of (features, windows), without its sign."""
    most = np.zeros(len(statistic))
    for sign in (1.0, -1.0):
        mass = np.zeros(len(statistic))
        for column in (sign * statistic).T:
            mass = np.where(column > threshold, mass + column, 0.0)
            np.maximum(most, mass, out=most)
    return most


def cluster_masses(statistic: np.ndarray, threshold: float) -> np.ndarray:
    """(features, windows): the mass of the cluster that each window is in, 0 outside of clusters."""
    found = np.zeros_like(statistic)
    for sign in (1.0, -1.0):
        inside = sign * statistic > threshold
        mass, sums = np.zeros(len(statistic)), np.zeros_like(statistic)
        for at in range(statistic.shape[1]):
            mass = np.where(inside[:, at], mass + statistic[:, at], 0.0)
            sums[:, at] = mass
        for at in range(statistic.shape[1] - 2, -1, -1):
            goes_on = inside[:, at] & inside[:, at + 1]
            sums[goes_on, at] = sums[goes_on, at + 1]
        found += sums
    return found


def _ends(inside: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The first stretch of true, from its first to its last window; -1 where there is none."""
    first = np.where(inside.any(axis=1), inside.argmax(axis=1), -1)
    windows = np.arange(inside.shape[1])
    after = ~inside & (windows > first[:, None])
    last = np.where(after.any(axis=1), after.argmax(axis=1), inside.shape[1]) - 1
    return first, np.where(first < 0, -1, last)


def _nothing(features: int, windows: int) -> Trajectories:
    """Of features of which nothing is known."""
    p, statistic, low, high = np.full((4, features), np.nan)
    first, last = np.full((2, features), -1)
    return Trajectories(p, statistic, first, last, np.zeros((features, windows), bool), low, high)


def _put(found: Trajectories, at: np.ndarray, stretches: Trajectories, starts: np.ndarray, ends: np.ndarray) -> None:
    """Fill in what was found of some features in stretches that go from these windows to those."""
    found.p[at], found.statistic[at] = stretches.p, stretches.statistic
    found.first[at] = np.where(stretches.first < 0, -1, starts[stretches.first])
    found.last[at] = np.where(stretches.last < 0, -1, ends[stretches.last])
    for start, end, inside in zip(starts, ends, stretches.significant.T, strict=True):
        found.significant[at[inside], start : end + 1] = True
