"""Cluster tests over training hold their level however much steps depend on each other, and find what was planted."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from gradtrace.inference.procedures import Settings
from gradtrace.inference.trajectories import (
    autocorrelation_time,
    cluster_masses,
    heaviest,
    over_runs,
    within_run,
)

SETTINGS = Settings(draws=400)
MANY = 1500


def series(rng: np.random.Generator, memory: float, windows: int, many: int = MANY) -> np.ndarray:
    """(many, windows): autoregressions of first order."""
    noise = rng.normal(size=(many, windows + 200))
    for at in range(1, noise.shape[1]):
        noise[:, at] += memory * noise[:, at - 1]
    return noise[:, 200:]


def most(level: float, count: int) -> float:
    return float(stats.binom.ppf(1 - 5e-5, count, level))


@pytest.mark.parametrize("windows", [100, 400])
@pytest.mark.parametrize("memory", [0.0, 0.5, 0.8, 0.95])
def test_one_run_without_a_difference(memory: float, windows: int) -> None:
    p = within_run(series(np.random.default_rng(0), memory, windows), SETTINGS).p
    for level in (0.01, 0.05, 0.1):
        assert (p <= level).sum() <= most(level, MANY)  # where there is no p, nothing is claimed


def test_one_run_with_little_memory_is_judged_and_its_p_is_about_uniform() -> None:
    p = within_run(series(np.random.default_rng(1), 0.3, 400), SETTINGS).p
    assert np.isfinite(p).all()
    assert 0.02 <= (p <= 0.05).mean() <= 0.07
    assert 0.4 <= (p <= 0.5).mean() <= 0.55


def test_a_run_that_depends_on_its_past_for_too_long_is_not_judged() -> None:
    wandering = series(np.random.default_rng(2), 0.99, 100)
    found = within_run(wandering + 5, SETTINGS)
    assert np.isnan(found.p).mean() > 0.99
    assert not found.significant[np.isnan(found.p)].any()


def test_a_lasting_difference_in_one_run_is_found() -> None:
    found = within_run(series(np.random.default_rng(3), 0.3, 200, 300) + 1, SETTINGS)
    assert (found.p <= 0.05).mean() > 0.9
    assert (found.statistic > 0).all()


def test_a_difference_in_part_of_one_run_is_found_there() -> None:
    values = series(np.random.default_rng(4), 0.0, 400, 300)
    values[:, 100:300] -= 0.6
    found = within_run(values, SETTINGS)
    hits = found.p <= 0.05
    assert hits.mean() > 0.85
    assert np.median(found.first[hits]) == pytest.approx(100, abs=16)
    assert np.median(found.last[hits]) == pytest.approx(299, abs=16)
    assert (found.statistic[hits] < 0).all()


def test_a_large_difference_in_part_of_one_run_is_not_told_from_memory() -> None:
    values = series(np.random.default_rng(4), 0.0, 200, 300)
    values[:, 80:120] -= 1.5
    assert np.isnan(within_run(values, SETTINGS).p).mean() > 0.9


def test_windows_without_a_value_are_passed_over() -> None:
    values = series(np.random.default_rng(5), 0.0, 200, 50) + 1
    values[10, 30:50] = np.nan
    values[11] = np.nan
    found = within_run(values, SETTINGS)
    assert found.p[10] <= 0.05
    assert np.isnan(found.p[11])
    assert found.first[11] == -1


@pytest.mark.parametrize("runs", [6, 16])
def test_several_runs_without_a_difference(runs: int) -> None:
    """Each run is a random walk: steps depend on all of the past, runs on nothing."""
    walks = np.random.default_rng(runs).normal(size=(runs, MANY, 50)).cumsum(axis=2)
    p = over_runs(walks, SETTINGS).p
    for level in (0.05, 0.1):
        assert (p <= level).sum() <= most(level, MANY)
        assert (p <= level).sum() >= stats.binom.ppf(5e-5, MANY, 0.6 * level)  # with 6 runs p comes in steps of 1/32


def test_a_difference_in_part_of_several_runs_is_found_there() -> None:
    values = np.random.default_rng(6).normal(size=(10, 200, 60))
    values[:, :, 20:40] += 1.5
    found = over_runs(values, SETTINGS)
    assert (found.p <= 0.05).mean() > 0.99
    assert np.median(found.first) == pytest.approx(20, abs=2)
    assert np.median(found.last) == pytest.approx(39, abs=2)
    inside = found.significant.mean(axis=0)
    assert inside[22:38].min() > 0.8
    assert inside[:15].max() < 0.1


def test_clusters_and_their_masses() -> None:
    row = np.array([[0.0, 2, 3, -2, -2, -2, 0, 1, 4, 0]])
    assert cluster_masses(row, 1.5).tolist() == [[0, 5, 5, -6, -6, -6, 0, 0, 4, 0]]
    assert heaviest(row, 1.5).tolist() == [6]
    assert heaviest(row, 10).tolist() == [0]


@pytest.mark.parametrize("memory", [0.0, 0.5, 0.9])
def test_the_autocorrelation_time_is_that_of_the_process(memory: float) -> None:
    times = autocorrelation_time(series(np.random.default_rng(7), memory, 4000, 50))
    assert np.median(times) == pytest.approx((1 + memory) / (1 - memory), rel=0.15)


def test_a_constant_series_has_no_memory() -> None:
    assert autocorrelation_time(np.ones((2, 30))).tolist() == [1, 1]
