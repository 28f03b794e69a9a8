"""`gradtrace report`: the file, what is said beside it, exit codes."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import Result

from gradtrace.store import merge
from tests.inference.synthetic import write_run

Cli = Callable[..., Result]
REFERENCE = Path(__file__).parents[2] / "docs" / "reference" / "cli-report.md"


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return write_run(tmp_path / "run.zarr", 0, steps=range(8))


def test_one_file_is_written(cli: Cli, run: Path, tmp_path: Path) -> None:
    target = tmp_path / "out.html"
    result = cli("report", run, "-o", target, "--title", "Sites & <people>", "--metric", "frobenius")
    assert (result.exit_code, result.stdout) == (0, "")
    assert "MB)" in result.stderr
    text = target.read_text(encoding="utf-8")
    assert text.startswith("<!DOCTYPE html>")
    assert "<title>Sites &amp; &lt;people&gt;</title>" in text
    assert '"first":"frobenius"' in text


def test_groups_are_chosen(cli: Cli, run: Path, tmp_path: Path) -> None:
    assert cli("report", run, "-o", tmp_path / "out.html", "--group", "site=A", "--group", "all").exit_code == 0
    one = cli("report", run, "-o", tmp_path / "out.html", "--group", "site=A")
    assert "Only one group was chosen" in one.stderr
    unknown = cli("report", run, "-o", tmp_path / "out.html", "--group", "sites")
    assert (unknown.exit_code, "There is no group 'sites'" in unknown.stderr) == (1, True)


def test_merged_runs_need_a_label(cli: Cli, run: Path, tmp_path: Path) -> None:
    merge({"one": run, "two": write_run(tmp_path / "two.zarr", 1, steps=range(8))}, tmp_path / "all.zarr")
    refused = cli("report", tmp_path / "all.zarr", "-o", tmp_path / "out.html")
    assert refused.exit_code == 1
    assert "'one', 'two'" in refused.stderr
    assert cli("report", tmp_path / "all.zarr", "-o", tmp_path / "out.html", "--run", "two").exit_code == 0


def test_what_is_not_there(cli: Cli, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert cli("report", run).exit_code == 2
    assert cli("report", tmp_path / "none.zarr", "-o", tmp_path / "out.html").exit_code == 1
    assert cli("report", run, "-o", tmp_path / "no" / "folder.html").exit_code == 1
    monkeypatch.setitem(sys.modules, "plotly.offline", None)
    missing = cli("report", run, "-o", tmp_path / "out.html")
    assert (missing.exit_code, 'pip install "gradtrace[report]"' in missing.stderr) == (1, True)
    assert not (tmp_path / "out.html").exists()


def test_the_reference_shows_the_help(cli: Cli) -> None:
    assert cli("report", "--help").stdout.replace("Usage: main", "Usage: gradtrace") in REFERENCE.read_text()
