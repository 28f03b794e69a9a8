"""Pictures of a run show what its store holds, at the scale that they name, and say what they leave out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gradtrace.errors import SelectionError
from gradtrace.plots import reading
from gradtrace.plots.pictures import PICTURES, Picture
from gradtrace.plots.reading import NothingToDraw
from gradtrace.plots.request import Request
from gradtrace.plots.summaries import doublings, joint_cosines
from gradtrace.store.places.keys import Keys
from gradtrace.store.places.place import keys_at
from gradtrace.store.queries.selection import Query, Span
from gradtrace.store.rows import KINDS, Status
from gradtrace.store.writing.writer import RunWriter
from tests.plots.conftest import NAMES, STEPS, samples
from tests.store.samples import infos, parameter_row, step_row

HC, SZ = "diagnosis=HC", "diagnosis=SZ"


def draw(keys: Keys, what: str, metric: str | None = None, **extra: Any) -> Picture:
    own = {name: extra.pop(name) for name in ("patterns", "groups", "steps", "probe", "kinds") if name in extra}
    query = Query(**{"kinds": ("gradient",), "metrics": (metric,) if metric else (), **own})
    return PICTURES[what](keys, Request(query, **extra))


def stored(metric: str, name: str, group: int, kind: str = "gradient", seed: int = 0) -> np.ndarray:
    """(steps,), as the writer was given it."""
    rows = [parameter_row(1000 * (step + seed) + NAMES.index(name)) for step in STEPS]
    if metric == "sigma1":
        return np.array([row.spectra[kind][group, 0] for row in rows])
    return np.array([row.metrics[kind][metric][group] for row in rows])


def mean_scale(group: int, seed: int = 0) -> np.ndarray:
    return np.array([samples(step + seed)[0] / samples(step + seed)[group] for step in STEPS])


def cells(axis: Any) -> np.ndarray:
    return np.asarray(axis.collections[0].get_array())


def thick(axis: Any) -> list[np.ndarray]:
    return [line.get_ydata() for line in axis.lines if line.get_linewidth() == 1.3]


def test_a_map_holds_the_stored_metric_of_every_matrix(keys: Keys) -> None:
    picture = draw(keys, "map")
    expected = [stored("effective_rank", name, 0) for name in NAMES if not name.endswith("bias")]
    np.testing.assert_allclose(cells(picture.figure.axes[0]), expected, rtol=1e-6)
    assert "Vectors, whose ranks are 1, are left out: 1." in picture.caption


def test_norms_are_of_each_groups_own_mean_unless_the_raw_sums_are_asked_for(keys: Keys) -> None:
    picture = draw(keys, "map", "frobenius", groups=(SZ,))
    expected = np.array([stored("frobenius", name, 2) * mean_scale(2) for name in NAMES])
    np.testing.assert_allclose(cells(picture.figure.axes[0]), expected, rtol=1e-6)
    assert "group's mean gradient" in picture.figure.axes[-1].get_ylabel().replace("\n", " ")
    assert "each group's own mean gradient (× N/n)" in picture.caption
    raw = draw(keys, "map", "frobenius", groups=(SZ,), own_mean=False)
    np.testing.assert_allclose(cells(raw.figure.axes[0]), [stored("frobenius", name, 2) for name in NAMES], rtol=1e-6)
    assert "as stored" in raw.figure.axes[-1].get_ylabel().replace("\n", " ")


@pytest.mark.parametrize(("kind", "power"), [("adjoint", 1), ("activation", 0)])
def test_rows_of_samples_are_scaled_by_their_root(keys: Keys, kind: str, power: int) -> None:
    picture = draw(keys, "map", "sigma1", kinds=(kind,), groups=(HC,), patterns=("head.weight",))
    counts = np.array([samples(step) for step in STEPS], dtype=float)
    expected = stored("sigma1", "head.weight", 1, kind) * counts[:, 0] ** power / np.sqrt(counts[:, 1])
    np.testing.assert_allclose(cells(picture.figure.axes[0])[0], expected, rtol=1e-6)


def test_a_map_of_several_groups_has_one_scale(keys: Keys) -> None:
    picture = draw(keys, "map", groups=("diagnosis=*",))
    first, second = picture.figure.axes[:2]
    assert (first.get_title("left"), second.get_title("left")) == (HC, SZ)
    assert first.collections[0].get_clim() == second.collections[0].get_clim()
    np.testing.assert_allclose(cells(second)[0], stored("effective_rank", NAMES[0], 2), rtol=1e-6)


def test_cosines_are_those_of_the_stored_products(keys: Keys) -> None:
    picture = draw(keys, "map", "cosine", patterns=("head.weight",))
    inner = np.array([parameter_row(1000 * step + 2).inner_product for step in STEPS])
    expected = inner[:, 1, 2] / np.sqrt(inner[:, 1, 1] * inner[:, 2, 2])
    np.testing.assert_allclose(cells(picture.figure.axes[0])[0], expected, rtol=1e-5)
    assert f"Between {HC} and {SZ}." in picture.caption
    matrix = draw(keys, "cosine", patterns=("head.weight",))
    np.testing.assert_allclose(cells(matrix.figure.axes[0]).ravel(), [np.median(expected)], rtol=1e-5)
    conflict = draw(keys, "conflict", patterns=("head.weight",))
    np.testing.assert_allclose(cells(conflict.figure.axes[0]).ravel(), [np.mean(expected < 0)])


def test_shares_are_of_the_gradient_of_all(keys: Keys) -> None:
    picture = draw(keys, "trajectory", "share", patterns=("head.weight",), smooth=1)
    inner = np.array([parameter_row(1000 * step + 2).inner_product for step in STEPS])
    for line, group in zip(thick(picture.figure.axes[0]), (1, 2), strict=True):
        np.testing.assert_allclose(line, inner[:, group, 0] / inner[:, 0, 0], rtol=1e-5)


def test_gradients_of_many_parameters_are_taken_together_as_one() -> None:
    rng = np.random.default_rng(5)
    gradients = rng.standard_normal((4, 3, 2, 17))  # parameters, steps, groups, entries
    inner = np.einsum("psgx,pshx->psgh", gradients, gradients)
    inner[1, 2, 0] = inner[1, 2, :, 0] = np.nan  # then the parameter counts for neither
    together = joint_cosines(inner)
    whole = np.concatenate(list(gradients), axis=-1)[0]
    np.testing.assert_allclose(
        together[0, 0, 1], whole[0] @ whole[1] / np.linalg.norm(whole[0]) / np.linalg.norm(whole[1])
    )
    rest = np.concatenate(list(gradients[[0, 2, 3]]), axis=-1)[2]
    np.testing.assert_allclose(together[2, 0, 1], rest[0] @ rest[1] / np.linalg.norm(rest[0]) / np.linalg.norm(rest[1]))


def test_a_trajectory_of_one_run_has_every_step_below_a_running_median(keys: Keys) -> None:
    picture = draw(keys, "trajectory", "sigma1", patterns=("head.weight",), smooth=5)
    axis = picture.figure.axes[0]
    thin = [line.get_ydata() for line in axis.lines if line.get_linewidth() == 0.4]
    for drawn, smoothed, group in zip(thin, thick(axis), (1, 2), strict=True):
        expected = stored("sigma1", "head.weight", group) * mean_scale(group)
        np.testing.assert_allclose(drawn, expected, rtol=1e-6)
        np.testing.assert_allclose(smoothed[7], np.median(expected[5:10]), rtol=1e-6)
    assert "running medians over 5 steps" in picture.caption


def test_merged_runs_have_a_band_over_the_steps_that_all_of_them_have(merged_path: Path) -> None:
    picture = draw(keys_at(merged_path), "trajectory", patterns=("head.weight",), groups=(HC,), smooth=1)
    axis = picture.figure.axes[0]
    (line,) = axis.lines
    np.testing.assert_array_equal(line.get_xdata(), np.arange(0, 40, 4))
    values = np.array([stored("effective_rank", "head.weight", 1, seed=seed)[::2] for seed in (0, 100, 200)])
    np.testing.assert_allclose(line.get_ydata(), np.median(values, axis=0), rtol=1e-6)
    corners = axis.collections[0].get_paths()[0].vertices
    np.testing.assert_allclose(corners[:, 1].min(), np.quantile(values, 0.1, axis=0).min(), rtol=1e-6)
    assert "over 3 runs" in picture.caption
    two = draw(keys_at(merged_path), "trajectory", patterns=("head.weight",), groups=(HC,), runs=("[ab]",))
    assert "over 2 runs" in two.caption
    assert len(two.figure.axes[0].lines[0].get_xdata()) == 20


def test_a_difference_is_a_ratio_of_norms_and_a_difference_of_ranks(keys: Keys) -> None:
    ratio = draw(keys, "difference", "frobenius", patterns=("head.weight",), smooth=1)
    first, second = (stored("frobenius", "head.weight", group) * mean_scale(group) for group in (1, 2))
    np.testing.assert_allclose(thick(ratio.figure.axes[0])[0], np.log2(first / second), rtol=1e-4, atol=1e-6)
    assert "HC ÷ SZ" in ratio.figure.axes[0].get_ylabel()
    plain = draw(keys, "difference", patterns=("head.weight",), groups=(SZ, HC), smooth=1)
    first, second = (stored("effective_rank", "head.weight", group) for group in (2, 1))
    np.testing.assert_allclose(thick(plain.figure.axes[0])[0], first - second, rtol=1e-4, atol=1e-5)
    assert "SZ − HC" in plain.figure.axes[0].get_ylabel()


def test_a_ratio_with_zero_or_without_a_value_is_none() -> None:
    found = doublings(np.array([[4.0, 1.0], [0.0, 1.0], [1.0, 0.0], [np.nan, 1.0], [np.inf, 1.0]]))
    np.testing.assert_array_equal(found, [2.0, np.nan, np.nan, np.nan, np.nan])


def test_spectra_and_scree_plots_hold_the_stored_singular_values(keys: Keys) -> None:
    sigma = np.array([parameter_row(1000 * step + 2).spectra["gradient"] for step in STEPS])
    spectra = draw(keys, "spectra", patterns=("head.weight",), components=3)
    np.testing.assert_allclose(cells(spectra.figure.axes[0]), sigma[:, 0, :3].T, rtol=1e-6)
    scree = draw(keys, "scree", patterns=("head.weight",))
    early, late = scree.figure.axes
    own = sigma[:, 2] * mean_scale(2)[:, None]
    np.testing.assert_allclose(early.lines[1].get_ydata(), np.median(own[:2], axis=0), rtol=1e-6)
    np.testing.assert_allclose(late.lines[1].get_ydata(), np.median(own[-2:], axis=0), rtol=1e-6)
    alone = draw(keys, "scree", patterns=("head.weight",), steps=Span(4, 4))
    np.testing.assert_allclose(alone.figure.axes[0].lines[1].get_ydata(), own[2], rtol=1e-6)


@pytest.fixture(scope="module")
def wide_keys(tmp_path_factory: pytest.TempPathFactory) -> Keys:
    """Many parameters, few steps."""
    path, names = tmp_path_factory.mktemp("wide") / "run.zarr", [f"layers.{at}.weight" for at in range(90)]
    with RunWriter(path, attrs={}, kinds=KINDS, keep=64, parameters=infos(names)) as writer:
        for step in range(3):
            writer.append(step_row(step, names))
    return keys_at(path)


def test_many_parameters_are_never_as_many_lines(wide_keys: Keys) -> None:
    picture = draw(wide_keys, "trajectory")
    (axis,) = picture.figure.axes
    assert axis.get_title("left") == "90 parameters"
    assert len(axis.lines) == 2
    assert "over 90 parameters" in picture.caption
    ranks = [
        [parameter_row(1000 * s + at).metrics["gradient"]["effective_rank"][1] for s in range(3)] for at in range(90)
    ]
    np.testing.assert_allclose(axis.lines[0].get_ydata(), np.median(ranks, axis=0), rtol=1e-6)
    assert "the 6 of 90 parameters" in draw(wide_keys, "spectra").caption
    assert "Every 3rd of 90 parameters is named." in draw(wide_keys, "map").caption
    assert "taken together as one" in draw(wide_keys, "cosine").caption


def test_more_steps_than_a_picture_shows_are_thinned_and_that_is_said(
    keys: Keys, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reading, "MOST_STEPS", 7)
    picture = draw(keys, "map", patterns=("head.weight",))
    np.testing.assert_allclose(
        cells(picture.figure.axes[0])[0], stored("effective_rank", "head.weight", 0)[::3], rtol=1e-6
    )
    assert "Every 3rd of 20 recorded steps is shown." in picture.caption


def test_what_is_held_is_bounded_by_thinning_too(keys: Keys, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "MOST_VALUES", 2 * 5)
    picture = draw(keys, "trajectory", patterns=("head.weight",), smooth=1)
    assert len(thick(picture.figure.axes[0])[0]) == 5


def test_unfinished_runs_are_drawn_as_of_their_last_commit(tmp_path: Path) -> None:
    path = tmp_path / "run.zarr"
    writer = RunWriter(path, attrs={}, kinds=KINDS, keep=64, parameters=infos(["a"]))
    writer.append(step_row(0, ["a"]))
    writer.append(step_row(1, ["a"]))
    writer.flush()
    try:
        for what in PICTURES:
            if what != "graph":
                assert draw(keys_at(path), what).figure.axes
    finally:
        writer.close()


def test_a_group_that_is_absent_leaves_a_gap(tmp_path: Path) -> None:
    path = tmp_path / "run.zarr"
    with RunWriter(path, attrs={}, kinds=KINDS, keep=64, parameters=infos(["a"])) as writer:
        for step in range(6):
            row = step_row(step, ["a"])
            if step == 3:
                gone = replace(row.parameters["a"], status=dict.fromkeys(KINDS, np.array([1, 0, 1], np.uint8)))
                row = replace(row, parameters={"a": gone}, n_samples=np.array([5, 0, 5]))
            writer.append(row)
    lines = thick(draw(keys_at(path), "trajectory", "sigma1").figure.axes[0])
    assert [int(np.isnan(line).sum()) for line in lines] == [1, 0]


def only_all(path: Path) -> Keys:
    with RunWriter(path, attrs={}, kinds=KINDS, keep=64, parameters=infos(["a"])) as writer:
        writer.append(step_row(0, ["a"], groups=("all",)))
    return keys_at(path)


def many_groups(path: Path) -> Keys:
    groups = ("all", *(f"site={at}" for at in range(9)))
    with RunWriter(path, attrs={}, kinds=KINDS, keep=64, parameters=infos(["a"])) as writer:
        writer.append(step_row(0, ["a"], groups=groups))
    return keys_at(path)


@pytest.mark.parametrize("what", ["cosine", "conflict", "difference"])
def test_one_group_cannot_be_compared(tmp_path: Path, what: str) -> None:
    keys = only_all(tmp_path / "run.zarr")
    with pytest.raises(SelectionError, match=r"compares groups, and there is only all.*This run has no others"):
        draw(keys, what)
    assert draw(keys, "trajectory").figure.axes, "which needs no two"


def test_too_many_groups_are_named_and_some_are_proposed(tmp_path: Path) -> None:
    keys = many_groups(tmp_path / "run.zarr")
    with pytest.raises(SelectionError, match=r"Colours tell 7 groups apart, and there are 9: site=0, .* and 1 more"):
        draw(keys, "trajectory")
    with pytest.raises(SelectionError, match=r"compares two groups, and there are 9.*Choose two: --group 'site=0'"):
        draw(keys, "difference")
    assert draw(keys, "cosine").figure.axes


def test_by_default_one_grouping_is_shown(tmp_path: Path) -> None:
    path = tmp_path / "run.zarr"
    with RunWriter(path, attrs={}, kinds=KINDS, keep=64, parameters=infos(["a"])) as writer:
        writer.append(step_row(0, ["a"], groups=("all", "sex=f", "sex=m", "site=1", "site=2", "site=3")))
    (legend,) = draw(keys_at(path), "trajectory").figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["f", "m"]
    assert "sex: f − m" in draw(keys_at(path), "difference").caption


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda keys: draw(keys, "map", steps=Span(100, 200)), "no step is selected"),
        (lambda keys: draw(keys, "map", patterns=("zzz*",)), "no parameter is selected"),
        (lambda keys: draw(keys, "map", groups=("x*",)), "no group is selected"),
    ],
)
def test_empty_selections_say_what_they_lack(keys: Keys, call: Callable[[Keys], Picture], words: str) -> None:
    with pytest.raises(NothingToDraw, match=words):
        call(keys)


def test_nothing_but_nan_is_nothing_to_draw(tmp_path: Path) -> None:
    path = tmp_path / "run.zarr"
    with RunWriter(path, attrs={}, kinds=KINDS, keep=64, parameters=infos(["a"])) as writer:
        row = step_row(0, ["a"])
        broken = replace(
            row.parameters["a"], spectra=dict.fromkeys(KINDS, np.full((3, 5), np.nan)), metrics={},
            status=dict.fromkeys(KINDS, np.full(3, Status.NOT_FINITE, np.uint8)), inner_product=np.full((3, 3), np.nan),
        )  # fmt: skip
        writer.append(replace(row, parameters={"a": broken}))
    for what in PICTURES:
        if what != "graph":
            with pytest.raises(NothingToDraw, match="measured"):
                draw(keys_at(path), what)


def test_runs_without_anything_in_common_cannot_be_averaged(merged_path: Path) -> None:
    with pytest.raises(SelectionError, match="no recorded step in common"):
        draw(keys_at(merged_path), "trajectory", steps=Span(38, 50))


def test_merged_runs_are_shown_one_at_a_time_where_a_picture_shows_one(merged_path: Path) -> None:
    for what in ("map", "spectra", "scree", "cosine", "conflict"):
        with pytest.raises(SelectionError, match=r"several runs.*--run LABEL.*'a', 'b', 'c'"):
            draw(keys_at(merged_path), what)
        assert draw(keys_at(merged_path), what, runs=("b",)).figure.axes
