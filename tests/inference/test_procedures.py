"""The tests agree with scipy, statsmodels and published examples, and hold their level."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
from scipy import stats
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.weightstats import CompareMeans, DescrStatsW

from gradtrace.inference import procedures
from gradtrace.inference.correction import corrected
from gradtrace.inference.procedures import CONFIDENCE, TESTS, Settings

SLEEP = (  # Student 1908: additional hours of sleep by two drugs, in ten people
    np.array([0.7, -1.6, -0.2, -1.2, -0.1, 3.4, 3.7, 0.8, 0.0, 2.0])[:, None],
    np.array([1.9, 0.8, 1.1, 0.1, -0.1, 4.4, 5.5, 1.6, 4.6, 3.4])[:, None],
)
SETTINGS = Settings(overlap=0.25, draws=500)


@pytest.fixture
def pairs() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(1)
    return rng.normal(size=(7, 11)), rng.normal(size=(7, 11)) + 0.5


def test_students_sleep_data() -> None:
    paired = procedures.paired(*SLEEP, SETTINGS)
    assert paired.difference[0] == pytest.approx(-1.58)
    assert paired.statistic[0] == pytest.approx(-4.0621, abs=5e-5)
    assert paired.p[0] == pytest.approx(0.002833, abs=5e-7)
    assert [paired.low[0], paired.high[0]] == pytest.approx([-2.4598858, -0.7001142], abs=5e-8)
    welch = procedures.welch(*SLEEP, SETTINGS)
    assert welch.statistic[0] == pytest.approx(-1.8608, abs=5e-5)
    assert welch.p[0] == pytest.approx(0.07939, abs=5e-6)
    assert [welch.low[0], welch.high[0]] == pytest.approx([-3.3654832, 0.2054832], abs=5e-8)


def test_the_example_of_benjamini_and_hochberg() -> None:
    """Their section 3.2: of fifteen hypotheses the first four are rejected at 0.05."""
    few = [0.0001, 0.0004, 0.0019, 0.0095, 0.0201, 0.0278, 0.0298, 0.0344]
    p = np.array([*few, 0.0459, 0.324, 0.4262, 0.5719, 0.6528, 0.759, 1.0])
    q = corrected(p, "bh", statistic=p, largest=None, drawn=False)
    assert (q <= 0.05).tolist() == [True] * 4 + [False] * 11


@pytest.mark.parametrize(("how", "theirs"), [("bh", "fdr_bh"), ("by", "fdr_by")])
def test_corrections_agree_with_statsmodels_and_pass_over_what_is_not_there(how: str, theirs: str) -> None:
    p = np.random.default_rng(0).random(40) ** 3
    with_gaps = np.insert(p, [3, 20], np.nan)
    found = corrected(with_gaps, how, statistic=with_gaps, largest=None, drawn=False)
    np.testing.assert_allclose(found[~np.isnan(with_gaps)], multipletests(p, method=theirs)[1], rtol=1e-12)
    assert np.isnan(found[[3, 21]]).all()


def test_t_tests_agree_with_scipy_and_statsmodels(pairs: tuple[np.ndarray, np.ndarray]) -> None:
    a, b = pairs
    for found, theirs in (
        (procedures.paired(a, b, SETTINGS), stats.ttest_rel(a, b)),
        (procedures.welch(a, b, SETTINGS), stats.ttest_ind(a, b, equal_var=False)),
    ):
        np.testing.assert_allclose(found.statistic, theirs.statistic, rtol=1e-12)
        np.testing.assert_allclose(found.p, theirs.pvalue, rtol=1e-12)
        low, high = theirs.confidence_interval(CONFIDENCE)
        np.testing.assert_allclose([found.low, found.high], [low, high], rtol=1e-10)
    welch = procedures.welch(a, b, SETTINGS)
    t, p, _ = CompareMeans(DescrStatsW(a), DescrStatsW(b)).ttest_ind(usevar="unequal")
    np.testing.assert_allclose([welch.statistic, welch.p], [t, p], rtol=1e-10)


def test_wilcoxon_agrees_with_scipy(pairs: tuple[np.ndarray, np.ndarray]) -> None:
    found = procedures.wilcoxon(*pairs, SETTINGS)
    for at in range(pairs[0].shape[1]):
        theirs = stats.wilcoxon(pairs[0][:, at], pairs[1][:, at])
        assert (found.statistic[at], found.p[at]) == pytest.approx((theirs.statistic, theirs.pvalue))


def test_permutations_agree_with_scipy(pairs: tuple[np.ndarray, np.ndarray]) -> None:
    found = procedures.permutation(*pairs, SETTINGS)
    for at in range(pairs[0].shape[1]):
        data = (pairs[0][:, at], pairs[1][:, at])

        def t(x: np.ndarray, y: np.ndarray) -> float:
            return abs(float(stats.ttest_rel(x, y).statistic))

        theirs = stats.permutation_test(data, t, permutation_type="samples", n_resamples=np.inf, alternative="greater")
        assert found.p[at] == pytest.approx(theirs.pvalue)


def test_the_largest_statistic_corrects_as_all_permutations_say(pairs: tuple[np.ndarray, np.ndarray]) -> None:
    differences, found = pairs[0] - pairs[1], procedures.permutation(*pairs, SETTINGS)
    largest = [
        np.abs(stats.ttest_1samp(np.array(signs)[:, None] * differences, 0).statistic).max()
        for signs in product((1, -1), repeat=7)
    ]
    q = corrected(found.p, "max", statistic=found.statistic, largest=found.largest, drawn=False)
    expected = [(np.array(largest) >= abs(t) - 1e-9).mean() for t in found.statistic]
    np.testing.assert_allclose(q, expected)
    assert (q >= found.p).all()


def test_the_interval_of_an_effect_is_where_the_noncentral_t_says(pairs: tuple[np.ndarray, np.ndarray]) -> None:
    found, n = procedures.paired(*pairs, SETTINGS), 7
    correction = 1 - 3 / (4 * (n - 1) - 1)
    np.testing.assert_allclose(found.effect, correction * found.statistic / np.sqrt(n), rtol=1e-12)
    for end, quantile in ((found.effect_low, 0.975), (found.effect_high, 0.025)):
        noncentrality = end / correction * np.sqrt(n)
        np.testing.assert_allclose(stats.nct.cdf(found.statistic, n - 1, noncentrality), quantile, atol=1e-8)


def test_units_that_all_say_the_same() -> None:
    a = np.tile([1.0, 2.0, 3.0], (5, 1))
    b = np.tile([1.0, 1.0, 3.0], (5, 1))
    a[0, 2] += 1e-3
    for name in ("paired", "welch", "resampled"):
        p = TESTS[name](a, b, SETTINGS).p
        assert p[0] == 1
        assert np.isnan(p[1])
        assert 0 < p[2] < 1
    assert procedures.permutation(a, b, SETTINGS).p[:2].tolist() == [1, 2 / 2**5]
    assert procedures.wilcoxon(a, b, SETTINGS).p[0] == 1


# ---------------------------------------------------------------------- levels and power, in simulation

MANY = 4000
LEVELS = np.array([0.01, 0.05, 0.1, 0.5])


def bounds(level: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """How often p <= level may occur by chance, in all but one of ten thousand simulations."""
    return stats.binom.ppf(5e-5, count, level), stats.binom.ppf(1 - 5e-5, count, level)


def rejections(p: np.ndarray) -> np.ndarray:
    return (p[:, None] <= LEVELS + 1e-12).sum(axis=0)


def folds(rng: np.random.Generator, runs: int) -> np.ndarray:
    """Values of overlapping folds: what they share makes them correlated, as Nadeau & Bengio take it."""
    assert SETTINGS.overlap is not None
    rho = SETTINGS.overlap / (1 + SETTINGS.overlap)
    return np.sqrt(rho) * rng.normal(size=(1, MANY)) + np.sqrt(1 - rho) * rng.normal(size=(runs, MANY))


@pytest.mark.parametrize("runs", [5, 8, 20])
@pytest.mark.parametrize("name", TESTS)
def test_p_values_are_uniform_where_there_is_no_difference(name: str, runs: int) -> None:
    rng = np.random.default_rng(runs)
    a, b = rng.normal(size=(2, runs, MANY)) if name != "resampled" else (folds(rng, runs), np.zeros((runs, MANY)))
    p = TESTS[name](a, b, SETTINGS).p
    low, high = bounds(LEVELS, MANY)
    found = rejections(p)
    assert (found <= high).all()
    if name in ("paired", "resampled"):  # Welch's freedom is approximate, the others have few different p
        assert (found >= low).all()
    else:
        reachable = [(p[p <= level + 1e-12].max(initial=0.0)) for level in LEVELS]
        assert (found >= bounds(np.array(reachable), MANY)[0] * 0.9).all()


def test_the_plain_t_test_is_wrong_for_folds() -> None:
    """What the correction is for: without it far too many folds differ."""
    values = folds(np.random.default_rng(0), 10)
    assert (procedures.paired(values, np.zeros_like(values), SETTINGS).p <= 0.05).mean() > 0.2


@pytest.mark.parametrize("name", TESTS)
def test_planted_differences_are_found(name: str) -> None:
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(2, 10, 500))
    assert (TESTS[name](a + 3, b, SETTINGS).p <= 0.05).mean() > 0.95


def test_a_family_without_differences_is_seldom_called_different() -> None:
    """Over families of twenty parameters that rise and fall together, as those of one network do."""
    rng, wrong = np.random.default_rng(0), dict.fromkeys(("bh", "by", "max"), 0)
    for _ in range(200):
        shared = rng.normal(size=(8, 1))
        found = procedures.permutation(shared + 0.5 * rng.normal(size=(8, 20)), np.zeros((8, 20)), SETTINGS)
        for how in wrong:
            q = corrected(found.p, how, statistic=found.statistic, largest=found.largest, drawn=False)
            wrong[how] += bool((q <= 0.05).any())
    assert max(wrong.values()) <= stats.binom.ppf(1 - 5e-5, 200, 0.05)
