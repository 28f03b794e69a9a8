"""What a page says of a run is what the store holds, in few digits and at a bounded size."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import gradtrace as gt
from gradtrace.errors import SelectionError
from gradtrace.report import curves, data
from gradtrace.report.choice import MOST, choose
from gradtrace.report.data import report_of
from gradtrace.report.numbers import number
from gradtrace.store import merge
from gradtrace.store.places.place import keys_at
from gradtrace.store.rows import KINDS, ParameterInfo, Status
from gradtrace.store.writing.writer import RunWriter
from tests.inference.synthetic import write_run
from tests.report.conftest import NAMES
from tests.store.samples import step_row

GROUPS = ("all", "diagnosis=HC", "diagnosis=SZ")


@pytest.fixture(scope="module")
def told(run_path: Path) -> dict:
    return report_of(keys_at(run_path), metric="stable_rank")


def own_mean(path: Path, kind: str, group: str, values: np.ndarray) -> np.ndarray:
    """By hand, of the tree. values: (steps, ...)"""
    counts = gt.open_run(path).tree["n_samples"]
    own, batch = counts.sel(group=group).values, counts.sel(group="all").values
    factor = {"gradient": batch / own, "adjoint": batch / np.sqrt(own), "activation": 1 / np.sqrt(own)}[kind]
    return values * factor.reshape(-1, *[1] * (values.ndim - 1))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("group", GROUPS)
def test_curves_are_those_of_the_store_at_the_scale_of_own_means(
    told: dict, run_path: Path, kind: str, group: str
) -> None:
    assert told["steps"] == list(range(0, 40, 2))
    k, g, prefix = told["kinds"].index(kind), told["shown"].index(group), "" if kind == "gradient" else f"{kind}_"
    for place, name in enumerate(NAMES):
        node = gt.open_run(run_path).parameter(name).sel(group=group)
        spectra = own_mean(run_path, kind, group, node[kind].values)
        found = dict(zip(told["metrics"], (one[g] for one in told["curves"][place]["values"][k]), strict=True))
        assert found["sigma1"] == pytest.approx(spectra[:, 0], rel=1e-3)
        for metric in ("effective_rank", "stable_rank"):
            assert found[metric] == pytest.approx(node[f"{prefix}{metric}"].values, rel=1e-3)
        assert told["curves"][place]["scree"][k][g] == pytest.approx(spectra[-1], rel=1e-3)


def test_cosines_are_between_the_groups_that_are_compared(told: dict, run_path: Path) -> None:
    assert [[told["shown"][g] for g in pair] for pair in told["pairs"]] == [["diagnosis=HC", "diagnosis=SZ"]]
    inner = gt.open_run(run_path).parameter(NAMES[2])["inner_product"].values.astype(float)
    expected = inner[:, 1, 2] / np.sqrt(inner[:, 1, 1] * inner[:, 2, 2])
    assert told["curves"][2]["cosines"][0] == pytest.approx(expected, rel=1e-3, abs=1e-4)


def test_audits_and_how_parameters_were_measured(told: dict, run_path: Path) -> None:
    rows = {row["name"]: row for row in told["parameters"]}
    residuals = gt.open_run(run_path).parameter("head.weight")["residual"].values
    head = rows["head.weight"]
    assert (head["residual"], head["tolerance"]) == (pytest.approx(residuals.max(), rel=1e-3), 2e-3)
    assert (head["above"], head["audit"]) == (int((residuals > 2e-3).sum()), "above tolerance")
    assert head["above"] > 0
    assert (rows[NAMES[0]]["audit"], rows[NAMES[0]]["rung"], rows[NAMES[0]]["ops"]) == ("passed", "factored", "linear")
    assert (rows["frozen"]["audit"], rows["frozen"]["reason"]) == ("not audited", "the op is opaque")
    assert [row["matrix"] for row in told["parameters"]] == [True, False, True, False]
    assert 3 not in told["curves"]


def test_groups_loss_and_provenance(told: dict, run_path: Path) -> None:
    counts = gt.open_run(run_path).tree["n_samples"].sel(group="diagnosis=SZ").values
    told_of = next(one for one in told["groups"] if one["name"] == "diagnosis=SZ")
    assert (told_of["samples"], told_of["median"], told_of["steps"]) == (counts.sum(), np.median(counts), 20)
    assert told["loss"]["values"] == pytest.approx([1 / (step + 1) for step in range(0, 40, 2)], rel=1e-3)
    about = {(section, name): value for section, name, value in told["about"]}
    assert (about["about", "torch"], about["about", "seed"]) == ("2.13.0", 7)
    assert about["run", "path"] == "run.zarr"
    assert str(run_path.parent) not in json.dumps(told, allow_nan=False)


def test_differences_are_those_of_compare(tmp_path: Path) -> None:
    path = write_run(tmp_path / "run.zarr", 0, level={"site=A": 1.0}, steps=range(120), parameters=("a", "b", "c"))
    told = report_of(keys_at(path))
    (found,) = told["differences"]
    expected = gt.compare(path, "site", test="cluster")
    assert (found["count"], found["methods"], found["population"]) == (12, expected.methods, expected.population)
    assert found["below"] == (expected.columns["q"] <= 0.05).sum() > 0
    by_name = {(row["parameter"], row["metric"]): (at, row) for at, row in enumerate(expected.rows())}
    for row in found["rows"]:
        at, same = by_name[told["parameters"][row["parameter"]]["name"], row["metric"]]
        assert [row[n] for n in ("p", "q", "difference", "low")] == [
            number(same[n]) for n in ("p", "q", "difference", "low")
        ]
        assert row["significant"] == np.flatnonzero(expected.significant[at]).tolist()
        assert row["trajectory"] == pytest.approx(expected.trajectory[at], rel=1e-3)
    known = [row["p"] for row in found["rows"] if row["p"] is not None]
    assert known == sorted(known)


def test_many_steps_become_medians_of_windows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where a window lies in two blocks of what is read."""
    absent = dict.fromkeys((5, 6, 7, 30), Status.GROUP_ABSENT)
    path = write_run(tmp_path / "run.zarr", 0, steps=range(103), status=absent)
    monkeypatch.setattr(curves, "POINTS", 10)
    monkeypatch.setattr("gradtrace.store.tables.blocks.BLOCK_VALUES", 150)
    told = report_of(keys_at(path))
    assert len(told["steps"]) == 10
    values = gt.open_run(path).parameter("fc2.weight")["gradient"].sel(group="site=A").values[:, 0] * 3
    expected = [np.nanmedian(part) for part in np.split(values, told["steps"][1:])]
    assert told["curves"][1]["values"][0][0][told["shown"].index("site=A")] == pytest.approx(expected, rel=1e-3)


def test_a_page_has_room_for_so_many_numbers() -> None:
    steps = np.arange(5000)
    assert len(curves.windows_for(steps, 10)) == curves.POINTS
    assert len(curves.windows_for(steps, 10_000)) == curves.NUMBERS // 10_000
    assert len(curves.windows_for(steps, 10**7)) == curves.LEAST_POINTS
    assert len(curves.windows_for(np.arange(3), 1)) == 3


def test_which_groups_are_shown_and_compared() -> None:
    samples = {"all": 90, "sex=F": 40, "sex=M": 50, "arm=x": 90, "sex=<missing>": 9}
    samples |= {f"site={n}": n for n in range(9)}
    found = choose(samples)
    assert found.compared == {"sex": ("sex=F", "sex=M"), "site": tuple(f"site={n}" for n in range(3, 9))}
    assert found.shown == ("all", "sex=F", "sex=M", "arm=x", *found.compared["site"])
    assert len(found.compared["site"]) == MOST
    assert "Of the 9 groups of site, the 6 with most samples" in " ".join(found.notes)
    assert "arm has fewer than two groups" in " ".join(found.notes)
    assert choose(samples, ["site=0", "sex=M"]).shown == ("all", "site=0", "sex=M")
    assert list(choose(samples, ["site=0", "sex=M"]).compared.values()) == [("site=0", "sex=M")]
    with pytest.raises(SelectionError, match=r"There is no group 'sexx'.*"):
        choose(samples, ["sexx"])
    assert "in no groups" in choose({"all": 5}).notes[0]


def test_what_cannot_be_compared_is_a_sentence(tmp_path: Path) -> None:
    one = write_run(tmp_path / "run.zarr", 0, groups=("all", "site=A"), sizes=(12, 12), steps=range(3))
    told = report_of(keys_at(one))
    assert (told["differences"], told["pairs"]) == ([], [])
    assert "site has fewer than two groups" in told["notes"][0]


def test_a_run_that_is_being_written_and_one_without_steps(tmp_path: Path) -> None:
    path, infos = tmp_path / "run.zarr", [ParameterInfo("fc.weight", (3, 3))]
    with RunWriter(path, attrs={}, kinds=KINDS, keep=None, parameters=infos):
        told = report_of(keys_at(path))
        assert (told["closed"], told["recorded"], told["curves"]) == (False, 0, {})
        assert [row["name"] for row in told["parameters"]] == ["fc.weight"]
    assert report_of(keys_at(path))["closed"]


def test_of_merged_runs_one_has_to_be_chosen(tmp_path: Path) -> None:
    runs = {f"fold{n}": write_run(tmp_path / f"{n}.zarr", n, steps=range(5)) for n in range(2)}
    merge(runs, tmp_path / "all.zarr")
    keys = keys_at(tmp_path / "all.zarr")
    with pytest.raises(SelectionError, match=r"Choose it by --run LABEL.*'fold0', 'fold1'"):
        report_of(keys)
    one, alone = report_of(keys, label="fold1"), report_of(keys_at(tmp_path / "1.zarr"))
    assert one["curves"] == alone["curves"]
    assert one["name"] == "all.zarr, fold1"
    with pytest.raises(SelectionError, match="fold7"):
        report_of(keys, label="fold7")


def test_unknown_metrics_are_errors(run_path: Path) -> None:
    for name, said in {"efective_rank": "Nearest: 'effective_rank'", "sigma3": "The map has no 'sigma3'"}.items():
        with pytest.raises(SelectionError, match=said):
            report_of(keys_at(run_path), metric=name)


def test_a_metric_that_was_not_recorded_is_an_error(tmp_path: Path) -> None:
    row = step_row(0, NAMES)
    bare = {name: replace(one, metrics={}) for name, one in row.parameters.items()}
    infos = [ParameterInfo(name, (11, 5)) for name in NAMES]
    with RunWriter(tmp_path / "run.zarr", attrs={}, kinds=KINDS, keep=None, parameters=infos) as writer:
        writer.append(replace(row, parameters=bare))
    with pytest.raises(SelectionError, match="did not record the metric 'nuclear'"):
        report_of(keys_at(tmp_path / "run.zarr"), metric="nuclear")
    assert report_of(keys_at(tmp_path / "run.zarr"))["curves"][0]["values"][0][1] == [None] * 3


def test_numbers_have_four_digits() -> None:
    assert [number(value) for value in (1.23456, 12345.6, 2.0, 0.0, -1.234567e-8)] == [1.235, 12350.0, 2, 0, -1.235e-8]
    assert [number(value) for value in (None, float("nan"), float("inf"))] == [None] * 3
    assert data.plain([1.23456, "a", float("inf")]) == "1.235, a, inf"
