"""`gradtrace export` writes tables as it is told, and every table command can write Parquet."""

from __future__ import annotations

import csv
import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner, Result

from gradtrace.cli import main
from gradtrace.cli.export import FORMATS, TABLES, command
from gradtrace.store.tables import export, tables

Cli = Callable[..., Result]
Shell = Callable[..., "subprocess.CompletedProcess[str]"]
REFERENCE = Path(__file__).parents[2] / "docs" / "reference" / "cli-export.md"


def test_the_choices_are_those_of_the_library() -> None:
    assert tuple(tables.TABLES) == TABLES
    assert export.FORMATS == FORMATS


def test_all_tables_go_into_a_directory(cli: Cli, run_path: Path, tmp_path: Path) -> None:
    result = cli("export", run_path, tmp_path / "out")
    assert result.exit_code == 0
    assert result.stdout == ""
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"run.json", *(f"{n}.parquet" for n in TABLES)}
    for name in TABLES:
        rows = pq.read_metadata(tmp_path / "out" / f"{name}.parquet").num_rows
        assert f"{name}: {rows:,} rows" in result.stderr
    assert f"Written to {tmp_path / 'out'}." in result.stderr


@pytest.mark.parametrize("name", ["x.csv", "x.csv.gz", "x.parquet"])
def test_one_table_goes_into_a_file_whose_name_says_the_format(
    cli: Cli, run_path: Path, tmp_path: Path, name: str
) -> None:
    asked = ["--table", "metrics", "head.*", "--kind", "gradient", "--group", "diagnosis=*", "--step", "4:8"]
    assert cli("export", run_path, tmp_path / name, *asked, "--metric", "nuclear").exit_code == 0
    read = pd.read_parquet if name.endswith("parquet") else pd.read_csv
    frame = read(tmp_path / name)
    assert list(frame.columns) == ["step", "epoch", "parameter", "kind", "group", "n_samples", "status", "nuclear"]
    assert sorted(set(frame["step"])) == [4, 6, 8]
    assert len(frame) == 3 * 2
    rows = cli("query", run_path, *asked[2:], "--metric", "nuclear", "--json").stdout
    assert sorted(frame["nuclear"].astype("float32")) == sorted(
        pd.Series([row["value"] for row in json.loads(rows)], dtype="float32")
    )


def test_the_format_can_be_said(cli: Cli, run_path: Path, tmp_path: Path) -> None:
    assert cli("export", run_path, tmp_path / "plain", "--table", "steps", "--format", "csv").exit_code == 0
    assert (tmp_path / "plain").read_text().startswith("step,epoch,loss,")
    asked = ["--format", "csv.gz", "--table", "steps", "--table", "audits"]
    assert cli("export", run_path, tmp_path / "several", *asked).exit_code == 0
    names = {path.name for path in (tmp_path / "several").iterdir()}
    assert names == {"steps.csv.gz", "audits.csv.gz", "run.json"}


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["x.csv"], 2, "one file for 6 tables"),
        (["x.csv", "--table", "steps", "--format", "parquet"], 2, "leave --format out"),
        (["x", "--table", "loss"], 2, "Invalid value for '--table'"),
        (["x", "--format", "xlsx"], 2, "Invalid value for '--format'"),
        (["x", "head.wieght"], 1, "Nearest: 'head.weight'"),
        (["x", "--metric", "cosine"], 1, "table `products`"),
        (["x", "zzz*"], 3, "Nothing matched: no parameter is selected"),
        (["x", "--step", "100:"], 3, "Nothing matched: no step is selected"),
    ],
)
def test_what_cannot_be_done_is_said_and_nothing_is_written(
    cli: Cli, run_path: Path, tmp_path: Path, arguments: list[str], code: int, words: str
) -> None:
    result = cli("export", run_path, tmp_path / arguments[0], *arguments[1:])
    assert result.exit_code == code
    assert words in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_overwritten_without_force(cli: Cli, run_path: Path, tmp_path: Path) -> None:
    target = tmp_path / "steps.csv"
    target.write_text("mine")
    result = cli("export", run_path, target, "--table", "steps")
    assert result.exit_code == 1
    assert "is there already" in result.stderr
    assert "--force" in result.stderr
    assert target.read_text() == "mine"
    assert cli("export", run_path, target, "--table", "steps", "--force").exit_code == 0
    assert target.read_text().startswith("step,")
    result = cli("export", run_path, run_path, "--force")
    assert result.exit_code == 1
    assert "holds something else and is not replaced" in result.stderr


def test_an_export_needs_neither_torch_nor_xarray(shell: Shell, run_path: Path, tmp_path: Path) -> None:
    prelude = """
import atexit, sys
atexit.register(lambda: print([m for m in ("torch", "xarray", "dask") if m in sys.modules]))
"""
    result = shell("export", run_path, tmp_path / "out", prelude=prelude)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == "[]"


def test_without_pyarrow_it_says_what_to_install(shell: Shell, run_path: Path, tmp_path: Path) -> None:
    without = "import sys; sys.modules['pyarrow'] = None"
    for arguments in (
        ["export", run_path, tmp_path / "out"],
        ["query", run_path, "--format", "parquet", "-o", tmp_path / "x.parquet"],
    ):
        result = shell(*arguments, prelude=without)
        assert result.returncode == 1
        assert "Error: Parquet files need the package pyarrow. Install it with: pip install" in result.stderr
    assert list(tmp_path.iterdir()) == []
    assert shell("export", run_path, tmp_path / "out", "--format", "csv", prelude=without).returncode == 0


# ---------------------------------------------------------------------- parquet from commands that print tables


@pytest.mark.parametrize(
    "asked", [["--metric", "stable_rank"], ["--metric", "cosine", "--metric", "sigma1"], ["--group", "all"]]
)
def test_a_query_writes_the_same_rows_as_parquet(
    cli: Cli, run_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, asked: list[str]
) -> None:
    monkeypatch.setattr("gradtrace.store.tables.parquet.BATCH", 7)  # of which some have nothing but None in a column
    target = tmp_path / "x.parquet"
    result = cli("query", run_path, *asked, "--format", "parquet", "-o", target)
    assert result.exit_code == 0
    assert result.stdout == ""
    assert pq.read_table(target).to_pylist() == json.loads(cli("query", run_path, *asked, "--json").stdout)


@pytest.mark.parametrize("name", ["ls", "info"])
def test_other_tables_are_written_too(cli: Cli, run_path: Path, tmp_path: Path, name: str) -> None:
    target = tmp_path / "x.parquet"
    assert cli(name, run_path, "--format", "parquet", "-o", target).exit_code == 0
    found = pq.read_table(target).to_pylist()
    rows = list(csv.DictReader(cli(name, run_path, "--csv").stdout.splitlines()))
    assert [list(row) for row in found] == [list(row) for row in rows]
    first = next(iter(rows[0])) if name == "ls" else "name"
    assert [row[first] for row in found] == [row[first] for row in rows]
    assert {type(value) for row in found for value in row.values()} <= {str, int, list, type(None)}


def test_parquet_wants_a_file(cli: Cli, run_path: Path, tmp_path: Path) -> None:
    result = cli("query", run_path, "--format", "parquet")
    assert result.exit_code == 2
    assert "-o FILE" in result.stderr
    result = cli("query", run_path, "--format", "parquet", "-o", tmp_path / "no" / "x.parquet")
    assert result.exit_code == 1
    result = cli("query", run_path, "zzz*", "--format", "parquet", "-o", tmp_path / "x.parquet")
    assert result.exit_code == 3
    assert pq.read_table(tmp_path / "x.parquet").column_names[0] == "step"


def test_the_reference_shows_the_help_as_it_is() -> None:
    done = CliRunner().invoke(main, ["export", "--help"], terminal_width=80, prog_name="gradtrace")
    assert done.exit_code == 0
    text = REFERENCE.read_text()
    assert f"```text\n{done.stdout}```" in text
    assert [name for name in TABLES if f"`{name}`" not in text] == []
    options = [option for parameter in command.params for option in parameter.opts if option.startswith("-")]
    assert [option for option in options if option not in text] == []
