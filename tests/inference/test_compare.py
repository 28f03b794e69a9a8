"""Comparisons of groups in stored runs: the numbers, what they are of, and everything that may be missing."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from scipy import stats

import gradtrace as gt
from gradtrace.errors import SelectionError
from gradtrace.inference.comparison import COLUMNS, Comparison, NothingSelected
from gradtrace.store import merge
from gradtrace.store.rows import Status
from tests.inference.synthetic import GROUPS, KINDS, write_run

A, B = GROUPS[1:]
SEEDS = range(6)


@pytest.fixture
def runs(tmp_path: Path) -> list[Path]:
    """Six runs; the gradient of site A is twice as large as that of site B, each at its own mean."""
    return [write_run(tmp_path / f"{seed}.zarr", seed, level={A: 1.0}) for seed in SEEDS]


def row(found: Comparison, parameter: str, metric: str, kind: str = "gradient") -> dict:
    at = [one for one in found.rows() if (one["parameter"], one["metric"], one["kind"]) == (parameter, metric, kind)]
    assert len(at) == 1
    return at[0]


def own_mean(path: Path, parameter: str, group: str, metric: str = "frobenius") -> np.ndarray:
    """(steps,): by hand, of the tree."""
    node = gt.open_run(path).parameter(parameter)
    counts = node["n_samples"]
    return (node[metric].sel(group=group) * counts.sel(group="all") / counts.sel(group=group)).values.astype(float)


def test_runs_are_compared_by_what_the_paired_t_test_says(runs: list[Path]) -> None:
    found = gt.compare(runs, A, B)
    logs = [
        [np.log2(own_mean(path, "fc1.weight", group)).mean() for path in runs]  # each run one number
        for group in (A, B)
    ]
    expected, one = stats.ttest_rel(*logs), row(found, "fc1.weight", "frobenius")
    assert (one["statistic"], one["p"]) == pytest.approx((expected.statistic, expected.pvalue), rel=1e-5)
    assert one["difference"] == pytest.approx(np.mean(logs[0]) - np.mean(logs[1]), rel=1e-5)
    assert (one["mean"], one["mean_other"]) == pytest.approx([2 ** np.mean(of) for of in logs], rel=1e-5)
    assert one["low"] < 1.0 < one["high"]
    assert (one["unit"], one["runs"], one["steps"], one["left_out"]) == ("log2 ratio", 6, 240, 0)
    assert set(one) == set(COLUMNS)
    assert len(found) == 2 * 4
    assert found.columns["q"].tolist() == pytest.approx(stats.false_discovery_control(found.columns["p"]).tolist())
    assert found.frame.shape == (8, len(COLUMNS))


def test_ranks_are_compared_by_differences_and_do_not_depend_on_the_scale(runs: list[Path]) -> None:
    own, raw = (row(gt.compare(runs, A, B, scale=scale), "fc2.weight", "effective_rank") for scale in ("mean", "raw"))
    assert own | {"q": 0} == raw | {"q": 0}
    assert own["unit"] == "difference"
    ranks = [
        [gt.open_run(path).parameter("fc2.weight")["effective_rank"].sel(group=g).values.mean() for path in runs]
        for g in (A, B)
    ]
    assert own["difference"] == pytest.approx(np.mean(ranks[0]) - np.mean(ranks[1]), rel=1e-4)


def test_as_stored_a_larger_group_has_a_larger_gradient(runs: list[Path]) -> None:
    """A has 4 samples and B 8: that halves the difference of one doubling away."""
    own, raw = (row(gt.compare(runs, A, B, scale=scale), "fc1.weight", "sigma1") for scale in ("mean", "raw"))
    assert own["difference"] - raw["difference"] == pytest.approx(1.0, abs=1e-6)


@pytest.mark.parametrize(("kind", "doublings"), [("gradient", 1.0), ("adjoint", 0.5), ("activation", 0.5)])
def test_each_kind_has_its_own_scale(tmp_path: Path, kind: str, doublings: float) -> None:
    """Stored: 1/N in gradient and adjoint, and the root of the number of rows in adjoint and activation."""
    paths = [write_run(tmp_path / f"{seed}.zarr", seed, kinds=KINDS) for seed in range(2)]
    own, raw = (row(gt.compare(paths, A, B, scale=scale), "fc1.weight", "sigma1", kind) for scale in ("mean", "raw"))
    assert own["difference"] - raw["difference"] == pytest.approx(doublings, abs=1e-6)


def test_merged_runs_are_the_same_as_the_runs(runs: list[Path], tmp_path: Path) -> None:
    merge({path.stem: path for path in runs}, tmp_path / "all.zarr")
    one, other = gt.compare(tmp_path / "all.zarr", A, B), gt.compare({path.stem: path for path in runs}, A, B)
    for name, column in one.columns.items():
        np.testing.assert_array_equal(column, other.columns[name], err_msg=name)
    assert gt.compare(gt.open_run(tmp_path / "all.zarr"), A, B).columns["p"].tolist() == one.columns["p"].tolist()
    some = gt.compare(tmp_path / "all.zarr", A, B, runs=["[0-2]"])
    assert some.design.runs == 3
    assert some.columns["p"].tolist() == gt.compare(runs[:3], A, B).columns["p"].tolist()


def test_of_one_run_only_the_trajectory_is_tested(runs: list[Path]) -> None:
    found = gt.compare(runs[0], A, B)
    assert found.design.test == "cluster"
    assert row(found, "fc1.weight", "sigma1")["p"] <= 0.05
    assert row(found, "fc1.weight", "sigma1")["effect_g"] is None
    assert row(found, "fc1.weight", "sigma1")["low"] > 0
    assert "this one training run" in found.population
    for test in ("paired", "welch", "wilcoxon", "permutation"):
        with pytest.raises(SelectionError, match=r"whose steps depend on each other\. Give several runs"):
            gt.compare(runs[0], A, B, test=test)


def test_clusters_over_runs_say_when(tmp_path: Path) -> None:
    paths = [write_run(tmp_path / f"{seed}.zarr", seed, steps=range(30)) for seed in SEEDS]
    for seed, path in enumerate(paths):
        write_run(path, 10 + seed, steps=range(100, 130), level={A: 2.0}, resume=True)
    found = gt.compare(paths, A, B, test="cluster", metrics=["sigma1"], parameters=["fc1*"])
    one = row(found, "fc1.weight", "sigma1")
    assert one["p"] <= 0.05
    assert (one["first_step"], one["last_step"]) == (100, 129)
    assert found.significant.shape == found.trajectory.shape == (1, 60)
    assert found.windows[found.significant[0]].min() == 100
    assert found.notes == ("With 6 runs no p can be below 0.031: there are few ways to change signs.",)


def test_the_largest_statistic_is_at_least_as_strict(runs: list[Path]) -> None:
    for test in ("permutation", "cluster"):
        found = gt.compare(runs, A, B, test=test, correction="max")
        assert (found.columns["q"] >= found.columns["p"] - 1e-12).all()


def test_singular_values_by_place(runs: list[Path]) -> None:
    found = gt.compare(runs, A, B, metrics=["sigma1", "sigma3", "sigma9"])
    third = [
        [
            np.log2(gt.open_run(path).parameter("fc1.weight")["gradient"].sel(group=g).values[:, 2] * n).mean()
            for path in runs
        ]
        for g, n in ((A, 12 / 4), (B, 12 / 8))
    ]
    assert row(found, "fc1.weight", "sigma3")["difference"] == pytest.approx(
        np.mean(third[0]) - np.mean(third[1]), rel=1e-5
    )
    assert row(found, "fc1.weight", "sigma9")["note"] == "no step has a value of both groups"


def test_ranges_of_steps_and_epochs(runs: list[Path]) -> None:
    assert row(gt.compare(runs, A, B, steps=(5, 14)), "fc1.weight", "sigma1")["steps"] == 60
    assert row(gt.compare(runs, A, B, epochs=2), "fc1.weight", "sigma1")["steps"] == 60
    assert row(gt.compare(runs, A, B, steps=(38, None)), "fc1.weight", "sigma1")["steps"] == 12
    with pytest.raises(NothingSelected, match="No step is selected"):
        gt.compare(runs, A, B, steps=(1000, 2000))


def test_the_only_probe_that_has_the_groups_is_preferred(tmp_path: Path) -> None:
    paths = [write_run(tmp_path / f"{seed}.zarr", seed, probe="val") for seed in range(3)]
    assert gt.compare(paths, A, B).design.probe == "val"
    assert gt.compare(paths, A, B, probe=None).design.probe is None
    assert "'val', at constant weights" in gt.compare(paths, A, B).methods
    with pytest.raises(SelectionError, match="There is no probe 'test'"):
        gt.compare(paths, A, B, probe="test")


def test_steps_with_groups_of_unequal_size_can_be_left_out(tmp_path: Path) -> None:
    paths = [write_run(tmp_path / f"{seed}.zarr", seed, steps=range(10)) for seed in range(3)]
    paths = [write_run(path, 5, steps=range(10, 15), sizes=(12, 6, 6), resume=True) for path in paths]
    assert row(gt.compare(paths, A, B, matched=1), "fc1.weight", "sigma1")["steps"] == 15
    assert row(gt.compare(paths, A, B, matched=1), "fc1.weight", "sigma1")["left_out"] == 30
    assert row(gt.compare(paths, A, B, matched=2), "fc1.weight", "sigma1")["steps"] == 45


@pytest.mark.parametrize("code", [Status.GROUP_ABSENT, Status.NOT_FINITE, Status.NOT_CONVERGED, Status.TOO_FEW])
def test_rows_of_every_status_are_left_out_and_counted(tmp_path: Path, code: int) -> None:
    whole = [write_run(tmp_path / f"{seed}.zarr", seed) for seed in range(3)]
    some = [write_run(tmp_path / f"some{seed}.zarr", seed, status={3: code, 7: code}) for seed in range(3)]
    one, other = (row(gt.compare(paths, A, B), "fc1.weight", "sigma1") for paths in (whole, some))
    assert (other["steps"], other["left_out"]) == (one["steps"] - 6, 6)
    assert other["difference"] == pytest.approx(one["difference"], abs=0.05)


def test_a_group_that_never_has_a_value(tmp_path: Path) -> None:
    never = dict.fromkeys(range(40), Status.NOT_FINITE)
    found = gt.compare([write_run(tmp_path / f"{seed}.zarr", seed, status=never) for seed in range(3)], A, B)
    assert [one["note"] for one in found.rows()] == ["no step has a value of both groups"] * len(found)
    assert np.isnan(found.columns["q"]).all()


def test_runs_of_unequal_steps_groups_and_parameters(tmp_path: Path) -> None:
    paths = [
        write_run(tmp_path / "a.zarr", 0, steps=range(0, 40, 2), level={A: 1.0}),
        write_run(tmp_path / "b.zarr", 1, steps=range(5, 35, 3), level={A: 1.0}),
        write_run(tmp_path / "c.zarr", 2, parameters=("fc1.weight",), level={A: 1.0}),
        write_run(tmp_path / "d.zarr", 3, groups=("all", A, "site=C")),
    ]
    found = gt.compare(paths, A, B)
    assert row(found, "fc1.weight", "sigma1")["runs"] == 3
    assert row(found, "fc2.weight", "sigma1")["runs"] == 2
    assert found.notes == (f"{paths[3]} has not both of {A} and {B}, and is left out.",)
    clusters = gt.compare(paths, A, B, test="cluster")
    assert np.isfinite(clusters.columns["p"]).any()
    with pytest.raises(SelectionError, match="that all have the same parameters"):
        gt.compare(paths, A, B, test="permutation", correction="max")


def test_vectors_have_no_ranks_to_compare(tmp_path: Path) -> None:
    found = gt.compare([write_run(tmp_path / f"{seed}.zarr", seed, width=1) for seed in range(3)], A, B)
    assert set(found.columns["metric"]) == {"sigma1", "frobenius"}


def test_a_grouping_stands_for_its_groups(tmp_path: Path) -> None:
    groups = ("all", A, B, "site=C", "site=<missing>")
    paths = [write_run(tmp_path / f"{n}.zarr", n, groups=groups, sizes=(12, 3, 3, 3, 3)) for n in range(3)]
    found = gt.compare(paths, "site", metrics=["sigma1"])
    pairs = dict.fromkeys(zip(found.columns["group"], found.columns["group_other"], strict=True))
    assert list(pairs) == [(A, B), (A, "site=C"), (B, "site=C")]
    assert len(found) == 6


def test_a_run_that_is_still_written(tmp_path: Path) -> None:
    paths = [write_run(tmp_path / f"{seed}.zarr", seed, steps=range(10)) for seed in range(2)]
    from gradtrace.store.writing.writer import RunWriter

    with RunWriter(paths[0], attrs={}, kinds=("gradient",), keep=None, parameters=[], resume=True):
        assert row(gt.compare(paths, A, B), "fc1.weight", "sigma1")["steps"] == 20


@pytest.mark.parametrize(
    ("groups", "asked", "said"),
    [
        ((A, "site=Z"), {}, r"There is no group 'site=Z' in this run\. Nearest: 'site="),
        ((A,), {}, r"Only 'site=A' was given; a comparison is of two groups or more\. Valid: 'all', 'site=A'"),
        ((), {}, "No group was given"),
        ((A, A), {}, "Only 'site=A' was given"),
        ((A, B), {"parameters": ["fc9"]}, "There is no parameter 'fc9'"),
        ((A, B), {"kinds": ["adjoint"]}, "did not record the kind 'adjoint'"),
        ((A, B), {"metrics": ["beauty"]}, "There is no metric 'beauty'"),
        ((A, B), {"metrics": ["cosine"]}, "are of groups together"),
        ((A, B), {"metrics": []}, "No metric was given"),
        ((A, B), {"test": "anova"}, "There is no test 'anova'"),
        ((A, B), {"correction": "bonferroni"}, "There is no correction 'bonferroni'"),
        ((A, B), {"correction": "max"}, "for permutation and cluster tests"),
        ((A, B), {"test": "resampled"}, "go together"),
        ((A, B), {"overlap": 0.2}, "go together"),
        ((A, B), {"scale": "log"}, "There is no scale 'log'"),
        ((A, B), {"matched": 0.5}, "1 or more"),
        ((A, B), {"draws": 10}, "Draw 100 or more"),
    ],
)
def test_what_cannot_be_compared_is_said(runs: list[Path], groups: tuple[str, ...], asked: dict, said: str) -> None:
    with pytest.raises(SelectionError, match=said):
        gt.compare(runs, *groups, **asked)


def test_the_same_run_twice_is_no_evidence(runs: list[Path]) -> None:
    with pytest.raises(SelectionError, match="is given twice"):
        gt.compare([runs[0], runs[0]], A, B)
    with pytest.raises(SelectionError, match="There is no run"):
        gt.compare([], A, B)


def test_the_methods_name_all_that_was_chosen(runs: list[Path]) -> None:
    text = gt.compare(runs, A, B, test="resampled", overlap=0.25, correction="by", matched=3).methods
    for part in (
        "corrected resampled t test",
        "0.25 test samples",
        "Benjamini and Yekutieli",
        "3 times as large",
        A,
        B,
    ):
        assert part in text
    assert "differs by construction" in text
    assert "composition of batches are confounds" in text
    assert "Runs were taken for independent" in gt.compare(runs, A, B).methods


def test_without_a_difference_few_are_called_different(tmp_path: Path) -> None:
    """From stores to p: eight runs of sixty parameters whose groups are alike."""
    names = [f"p{n}" for n in range(60)]
    paths = [write_run(tmp_path / f"{n}.zarr", n, parameters=names, steps=range(12)) for n in range(8)]
    for test in ("paired", "permutation", "cluster"):
        p = gt.compare(paths, A, B, metrics=["sigma1"], test=test).columns["p"]
        assert (p <= 0.05).sum() <= stats.binom.ppf(1 - 1e-4, 60, 0.05)
    assert (gt.compare(paths, A, B, metrics=["sigma1"]).columns["p"] <= 0.5).sum() >= stats.binom.ppf(1e-4, 60, 0.5)
