"""`gradtrace merge` names runs, says how they differ, and writes them as one store."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from gradtrace.cli import main
from gradtrace.store.places.place import keys_at
from gradtrace.store.reading.merged import open_merged
from gradtrace.store.reading.opened import open_run
from gradtrace.store.rows import KINDS
from gradtrace.store.writing.writer import RunWriter
from tests.store.alike import assert_alike
from tests.store.samples import infos, step_row

Cli = Callable[..., Result]
REFERENCE = Path(__file__).parents[2] / "docs" / "reference" / "cli-merge.md"


@pytest.fixture
def other_path(tmp_path: Path) -> Path:
    """A run with a parameter that the others lack, and without some of theirs."""
    path = tmp_path / "lr=0.1.zarr"
    with RunWriter(path, attrs={"seed": 8}, kinds=KINDS, keep=64, parameters=infos(["head.weight", "new"])) as writer:
        for step in range(3):
            writer.append(step_row(step, ["head.weight", "new"]))
    return path


def test_runs_are_named_after_their_directories_or_as_they_are_told(
    cli: Cli, run_path: Path, other_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(run_path, tmp_path / "fold.1.zarr")
    shutil.copytree(run_path, tmp_path / "plain")
    monkeypatch.chdir(tmp_path)
    result = cli("merge", "fold.1.zarr", "lr=0.1.zarr", "big=./plain/", tmp_path / "plain", "m.zarr")
    assert result.exit_code == 0
    assert result.stdout == ""
    together = open_merged(keys_at("m.zarr"))
    assert together.runs == ("fold.1", "lr=0.1", "big", "plain")
    for label in ("fold.1", "big", "plain"):
        assert_alike(open_run(run_path), together.run(label))
    assert_alike(open_run(other_path), together.run("lr=0.1"))


def test_differences_sizes_and_the_end_are_told_on_stderr(
    cli: Cli, run_path: Path, other_path: Path, tmp_path: Path
) -> None:
    result = cli("merge", f"one={run_path}", other_path, tmp_path / "m.zarr")
    lines = result.stderr.splitlines()
    assert "one lacks parameters that others have: new." in lines
    missing = "encoder.fc1.weight, encoder.fc1.bias, frozen"
    assert f"lr=0.1 lacks parameters that others have: {missing}." in lines
    assert "lr=0.1 lacks probes that others have: val." in lines
    assert sum(line.startswith(("one: ", "lr=0.1: ")) and " files, " in line for line in lines) == 2
    assert lines[-1].startswith(f"{tmp_path / 'm.zarr'}: ")
    assert lines[-1].endswith("every value is that of its run.")


def test_names_that_are_missing_or_given_twice_are_wrong_usage(cli: Cli, run_path: Path, tmp_path: Path) -> None:
    twice = cli("merge", run_path, tmp_path / "elsewhere" / "run.zarr", tmp_path / "m.zarr")
    assert twice.exit_code == 2
    assert f"Give them names: fold1={run_path}" in twice.stderr
    assert cli("merge", f"={run_path}", tmp_path / "m.zarr").exit_code == 2
    assert cli("merge", "..", tmp_path / "m.zarr").exit_code == 2
    assert cli("merge", tmp_path / "m.zarr").exit_code == 2
    assert not (tmp_path / "m.zarr").exists()


def test_a_run_that_is_not_there_is_a_failure(cli: Cli, run_path: Path, tmp_path: Path) -> None:
    result = cli("merge", run_path, tmp_path / "nowhere.zarr", tmp_path / "m.zarr")
    assert result.exit_code == 1
    assert "There is no run at" in result.stderr
    assert not (tmp_path / "m.zarr").exists()


def test_the_reference_shows_the_help_as_it_is() -> None:
    done = CliRunner().invoke(main, ["merge", "--help"], terminal_width=80, prog_name="gradtrace")
    assert done.output.strip() in REFERENCE.read_text(encoding="utf-8")


@pytest.fixture
def merged_path(cli: Cli, run_path: Path, other_path: Path, tmp_path: Path) -> Path:
    assert cli("merge", f"one={run_path}", f"two={other_path}", tmp_path / "m.zarr").exit_code == 0
    return tmp_path / "m.zarr"


def test_a_query_of_merged_runs_says_of_which_run_each_row_is(cli: Cli, merged_path: Path, run_path: Path) -> None:
    both = cli("query", merged_path, "--metric", "nuclear", "--csv").stdout.splitlines()
    assert both[0].startswith("run,step,epoch,parameter")
    assert {line.partition(",")[0] for line in both[1:]} == {"one", "two"}
    one = cli("query", merged_path, "--metric", "nuclear", "--csv", "--run", "o*").stdout.splitlines()
    alone = cli("query", run_path, "--metric", "nuclear", "--csv").stdout.splitlines()
    assert [line.partition(",")[2] for line in one] == alone
    assert one[1:] == [line for line in both if line.startswith("one,")]


def test_what_holds_for_several_runs_is_said_once(cli: Cli, run_path: Path, tmp_path: Path) -> None:
    shutil.copytree(run_path, tmp_path / "copy.zarr")
    cli("merge", f"one={run_path}", f"two={tmp_path / 'copy.zarr'}", tmp_path / "m.zarr")
    said = cli("query", tmp_path / "m.zarr", "head.weight", "--metric", "numerical_rank").stderr
    assert said.count("Showing the last of 21 steps, 40") == 1
    assert said.count("numerical_rank counts") == 1


def test_of_merged_runs_one_is_looked_at_by_its_label(cli: Cli, merged_path: Path, run_path: Path) -> None:
    for command in ("ls", "info"):
        found, alone = cli(command, merged_path, "--run", "one", "--csv"), cli(command, run_path, "--csv")
        assert found.exit_code == 0
        lines = [line for line in found.stdout.splitlines() if ",path," not in line]
        assert lines == [line for line in alone.stdout.splitlines() if ",path," not in line]
    exported = merged_path.parent / "metrics.csv"
    assert cli("export", merged_path, exported, "--table", "metrics", "--run", "two").exit_code == 0
    assert "new" in exported.read_text()


def test_a_label_that_is_not_there_is_named_with_the_nearest(cli: Cli, merged_path: Path, run_path: Path) -> None:
    for command in (("ls",), ("info",), ("query",)):
        result = cli(*command, merged_path, "--run", "twoo")
        assert result.exit_code == 1
        assert "Nearest: 'two'" in result.stderr
        assert "is a single run" in cli(*command, run_path, "--run", "one").stderr


def test_what_is_about_one_run_asks_for_a_label(cli: Cli, merged_path: Path) -> None:
    result = cli("ls", merged_path)
    assert result.exit_code == 1
    assert "holds several runs" in result.stderr
    assert "--run" in result.stderr


def test_what_only_one_of_the_runs_has_is_found(cli: Cli, merged_path: Path) -> None:
    found = cli("query", merged_path, "new", "--metric", "nuclear", "--csv")
    assert found.exit_code == 0
    assert {line.partition(",")[0] for line in found.stdout.splitlines()[1:]} == {"two"}
    nowhere = cli("query", merged_path, "nowhere", "--metric", "nuclear", "--csv")
    assert nowhere.exit_code == 1
    assert "nowhere" in nowhere.stderr
