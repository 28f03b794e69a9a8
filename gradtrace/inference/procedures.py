"""Tests of a difference between two groups, many at once, with one value a unit: a training run.

Every test takes `a` and `b`, (units, features), the values of the two groups in each unit, without NaN, and gives an
`Outcome`. Units are paired: both groups trained in the same run. Where all units say exactly the same, t tests have
nothing to measure a difference by: p is NaN, or 1 where the difference is 0.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import product

import numpy as np
from scipy import stats

EXACT = 14  # units up to which every change of signs is tried
CONFIDENCE = 0.95


@dataclass(frozen=True)
class Outcome:
    """What a test found, each (features,).

    difference: mean of a - b, with its confidence interval `low`, `high`. effect: Hedges' g, with its own interval.
    statistic: t, or the W of Wilcoxon. p: two-sided. largest: of a permutation test, (permutations,) of the largest
    |statistic| of all features.
    """

    difference: np.ndarray
    low: np.ndarray
    high: np.ndarray
    effect: np.ndarray
    effect_low: np.ndarray
    effect_high: np.ndarray
    statistic: np.ndarray
    p: np.ndarray
    largest: np.ndarray | None = None


@dataclass(frozen=True)
class Settings:
    """overlap: of the resampled test, test samples / training samples of a fold. draws: changes of signs that are tried
    where there are too many for all."""

    overlap: float | None = None
    draws: int = 2000
    seed: int = 0


def paired(a: np.ndarray, b: np.ndarray, settings: Settings) -> Outcome:
    """Student's t of the differences within runs."""
    return _of_differences(a - b, 1 / len(a))


def resampled(a: np.ndarray, b: np.ndarray, settings: Settings) -> Outcome:
    """The corrected resampled t test, for runs that share training samples (Nadeau & Bengio 2003).

    The variance of the mean is (1/n + n_test / n_train) times that of the differences, instead of 1/n.
    """
    assert settings.overlap is not None
    return _of_differences(a - b, 1 / len(a) + settings.overlap)


def welch(a: np.ndarray, b: np.ndarray, settings: Settings) -> Outcome:
    """Welch's t, as if the groups' values came from different runs; conservative where they go up and down together."""
    n = len(a)
    difference, spread = a.mean(axis=0) - b.mean(axis=0), [a.var(axis=0, ddof=1), b.var(axis=0, ddof=1)]
    with np.errstate(invalid="ignore", divide="ignore"):
        error = np.sqrt(sum(spread) / n)
        freedom = sum(spread) ** 2 * (n - 1) / sum(s**2 for s in spread)
        t = difference / error
        pooled = np.sqrt(sum(spread) / 2)
        of_pooled = difference / pooled / np.sqrt(2 / n)
    p = 2 * stats.t.sf(np.abs(t), freedom)
    reach = stats.t.ppf((1 + CONFIDENCE) / 2, freedom) * error
    effect = _effect(difference, pooled, of_pooled, 2 * n - 2, np.sqrt(2 / n))
    return Outcome(difference, difference - reach, difference + reach, *effect, t, _settled(p, error, difference))


def wilcoxon(a: np.ndarray, b: np.ndarray, settings: Settings) -> Outcome:
    """Wilcoxon's signed-rank test, exact for few units without ties; differences of 0 are left out.

    Its interval and effect are those of the paired t.
    """
    plain, differences = paired(a, b, settings), a - b
    statistic, p = np.full((2, differences.shape[1]), np.nan)
    some = (differences != 0).any(axis=0)
    if some.any():
        found = stats.wilcoxon(differences[:, some], axis=0)
        statistic[some], p[some] = found.statistic, found.pvalue
    p[~some] = 1.0
    return _replaced(plain, statistic, p)


def permutation(a: np.ndarray, b: np.ndarray, settings: Settings) -> Outcome:
    """Changes of the signs of the runs' differences: all of them, or `draws` of them; the statistic is the paired t.

    Valid where the two groups are exchangeable within a run. All features change together, so that `largest` tells how
    large the largest of all gets by chance.
    """
    differences = a - b
    plain = paired(a, b, settings)
    signs = sign_changes(len(differences), settings)
    observed = np.abs(_t(differences.mean(axis=0), differences))
    at_least, largest = np.zeros(differences.shape[1]), np.zeros(len(signs))
    for place, row in enumerate(signs):
        t = np.abs(_t(row @ differences / len(differences), differences))
        at_least += t >= observed * (1 - 1e-9)  # the same sums in another order
        largest[place] = np.nanmax(t, initial=0.0)
    p = (at_least + 1) / (len(signs) + 1) if is_drawn(len(differences)) else at_least / len(signs)
    return _replaced(plain, plain.statistic, np.where((differences == 0).all(axis=0), 1.0, p), largest)


def sign_changes(units: int, settings: Settings) -> np.ndarray:
    """(changes, units) of +1 and -1: all that there are, the first of which changes nothing, or some at random."""
    if not is_drawn(units):
        return np.array(list(product((1.0, -1.0), repeat=units)))
    rng = np.random.default_rng(settings.seed)
    return rng.choice((1.0, -1.0), size=(settings.draws, units))


def is_drawn(units: int) -> bool:
    """Whether there are too many changes of signs to try all of them."""
    return units > EXACT


def interval(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Student's confidence interval of the mean over the first axis."""
    n, mean = len(values), values.mean(axis=0)
    reach = stats.t.ppf((1 + CONFIDENCE) / 2, n - 1) * values.std(axis=0, ddof=1) / np.sqrt(n)
    return mean - reach, mean + reach


TESTS: Mapping[str, Callable[[np.ndarray, np.ndarray, Settings], Outcome]] = {
    "paired": paired,
    "welch": welch,
    "wilcoxon": wilcoxon,
    "permutation": permutation,
    "resampled": resampled,
}


def _of_differences(differences: np.ndarray, share: float) -> Outcome:
    """share: the variance of the mean, in units of the variance of the differences."""
    n, mean, deviation = len(differences), differences.mean(axis=0), differences.std(axis=0, ddof=1)
    error = deviation * np.sqrt(share)
    with np.errstate(invalid="ignore", divide="ignore"):
        t = mean / error
    reach = stats.t.ppf((1 + CONFIDENCE) / 2, n - 1) * error
    p = _settled(2 * stats.t.sf(np.abs(t), n - 1), error, mean)
    return Outcome(mean, mean - reach, mean + reach, *_effect(mean, deviation, t, n - 1, np.sqrt(share)), t, p)


def _t(mean: np.ndarray, differences: np.ndarray) -> np.ndarray:
    """Student's t of differences whose signs were changed, which leaves their squares as they are."""
    n, squares = len(differences), (differences**2).sum(axis=0)
    with np.errstate(invalid="ignore", divide="ignore"):
        variance = np.maximum(squares - n * mean**2, 0.0) / (n - 1)
        variance = np.where(variance <= 1e-12 * squares, 0.0, variance)
        return np.asarray(mean / np.sqrt(variance / n))


def _settled(p: np.ndarray, error: np.ndarray, difference: np.ndarray) -> np.ndarray:
    """p, but where all units say the same: 1 where that is that there is no difference, else NaN."""
    same = error <= 1e-12 * np.abs(difference)
    return np.where(same, np.where(difference == 0, 1.0, np.nan), p)


def _effect(
    difference: np.ndarray, deviation: np.ndarray, t: np.ndarray, freedom: int, unit: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Hedges' g with its interval, by inverting the noncentral t. unit: what of g one of the noncentrality is."""
    correction = 1 - 3 / (4 * freedom - 1)  # Hedges 1981
    with np.errstate(invalid="ignore", divide="ignore"):
        g = correction * difference / deviation
    low, high = (
        noncentrality(t, freedom, side) * unit * correction for side in ((1 + CONFIDENCE) / 2, (1 - CONFIDENCE) / 2)
    )
    return g, low, high


def noncentrality(t: np.ndarray, freedom: float, quantile: float) -> np.ndarray:
    """The noncentrality under which t is this quantile of the noncentral t distribution; NaN where t is not finite."""
    known = np.isfinite(t) & (np.abs(t) < 1e3)
    found, at = np.full(np.shape(t), np.nan), np.asarray(t)[known]
    low, high = -2 * np.abs(at) - 10, 2 * np.abs(at) + 10
    for _ in range(50):
        middle = (low + high) / 2
        above = stats.nct.cdf(at, freedom, middle) > quantile
        low, high = np.where(above, middle, low), np.where(above, high, middle)
    found[known] = (low + high) / 2
    return found


def _replaced(plain: Outcome, statistic: np.ndarray, p: np.ndarray, largest: np.ndarray | None = None) -> Outcome:
    intervals = (plain.difference, plain.low, plain.high, plain.effect, plain.effect_low, plain.effect_high)
    return Outcome(*intervals, statistic, p, largest)
