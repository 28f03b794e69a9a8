"""`gradtrace compare`: rows and their order, what is said beside them, exit codes."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import Result

import gradtrace as gt
from gradtrace.inference.comparison import COLUMNS
from gradtrace.store import merge
from tests.inference.synthetic import write_run

Cli = Callable[..., Result]
REFERENCE = Path(__file__).parents[2] / "docs" / "reference" / "cli-compare.md"


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("runs")
    return [write_run(folder / f"{seed}.zarr", seed, level={"site=A": 1.0}, steps=range(60)) for seed in range(5)]


def test_all_rows_with_units_in_the_order_of_the_run(cli: Cli, runs: list[Path]) -> None:
    also = [part for path in runs[1:] for part in ("--also", path)]
    result = cli("compare", runs[0], "site=A", "site=B", *also, "--csv")
    assert result.exit_code == 0
    rows = list(csv.DictReader(io.StringIO(result.stdout)))
    assert list(rows[0]) == list(COLUMNS)
    expected = gt.compare(runs, "site=A", "site=B")
    assert [float(row["p"]) for row in rows] == expected.columns["p"].tolist()
    assert [(row["parameter"], row["metric"], row["unit"]) for row in rows[:3]] == [
        ("fc1.weight", "sigma1", "log2 ratio"),
        ("fc1.weight", "frobenius", "log2 ratio"),
        ("fc1.weight", "effective_rank", "difference"),
    ]
    assert "training runs like these 5 on these people" in result.stderr
    assert "differs by construction" in result.stderr


def test_tables_begin_with_the_smallest_p(cli: Cli, runs: list[Path]) -> None:
    result = cli("compare", runs[0], "site", "--kind", "gradient")
    lines = result.stdout.splitlines()
    assert {"first_step", "last_step"} < set(lines[0].split())
    assert "effect_g" not in lines[0]
    p = [float(row["p"]) for row in json.loads(cli("compare", runs[0], "site", "--json").stdout) if row["p"]]
    assert f"{min(p):.4g}" in lines[1]
    assert "this one training run" in result.stderr


def test_of_many_rows_a_table_shows_some(cli: Cli, tmp_path: Path) -> None:
    path = write_run(tmp_path / "run.zarr", 0, parameters=[f"p{n}" for n in range(12)])
    result = cli("compare", path, "site")
    assert len(result.stdout.splitlines()) == 21
    assert "Showing the 20 rows with the smallest p of 48; --all shows all of them." in result.stderr
    assert len(cli("compare", path, "site", "--all").stdout.splitlines()) == 49
    assert len(cli("compare", path, "site", "-p", "p1*", "--metric", "sigma1", "--csv").stdout.splitlines()) == 4


def test_merged_runs_and_the_methods(cli: Cli, runs: list[Path], tmp_path: Path) -> None:
    merge({path.stem: path for path in runs}, tmp_path / "all.zarr")
    result = cli("compare", tmp_path / "all.zarr", "site", "--test", "resampled", "--overlap", 0.25, "--methods")
    assert result.stdout.count("\n") == 1
    assert "with 0.25 test samples for each training sample" in result.stdout
    some = json.loads(cli("compare", tmp_path / "all.zarr", "site", "--run", "[12]", "--json").stdout)
    assert {row["runs"] for row in some} == {2}


def test_rows_go_into_parquet(cli: Cli, runs: list[Path], tmp_path: Path) -> None:
    from pyarrow.parquet import read_table

    target = tmp_path / "rows.parquet"
    assert cli("compare", runs[0], "site", "--format", "parquet", "-o", target).exit_code == 0
    assert read_table(target).column_names == list(COLUMNS)


def test_probes_are_said(cli: Cli, tmp_path: Path) -> None:
    path = write_run(tmp_path / "run.zarr", 0, probe="val")
    assert "In the probe 'val', at constant weights" in cli("compare", path, "site").stderr
    assert "probe" not in cli("compare", path, "site", "--training").stderr
    assert cli("compare", path, "site", "--training", "--probe", "val").exit_code == 2


def test_what_is_not_there(cli: Cli, runs: list[Path]) -> None:
    nothing = cli("compare", runs[0], "site", "--step", "500:")
    assert (nothing.exit_code, nothing.stdout) == (3, "")
    assert "No step is selected" in nothing.stderr
    unknown = cli("compare", runs[0], "sex=F", "sex=M")
    assert unknown.exit_code == 1
    assert "There is no group 'sex=F'" in unknown.stderr
    assert cli("compare", runs[0]).exit_code == 2
    assert cli("compare", runs[0], "site", "--matched", 0.5).exit_code == 2


def test_groups_that_are_never_of_one_size(cli: Cli, runs: list[Path]) -> None:
    result = cli("compare", runs[0], "site", "--matched", 1.5, "--json")
    assert {row["note"] for row in json.loads(result.stdout)} == {"no step has a value of both groups"}


def test_the_reference_shows_the_help(cli: Cli) -> None:
    assert cli("compare", "--help").stdout.replace("Usage: main", "Usage: gradtrace") in REFERENCE.read_text()
    text = REFERENCE.read_text()
    assert [name for name in COLUMNS if f"`{name}`" not in text] == []
