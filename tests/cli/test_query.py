"""`gradtrace query` finds what is asked for, in every format, and says what it does not find."""

from __future__ import annotations

import csv
import io
import json
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from click.testing import Result

from gradtrace.metrics import RANK_RULE
from gradtrace.store.queries.selection import matching
from tests.store.samples import parameter_row

Cli = Callable[..., Result]
Shell = Callable[..., "subprocess.CompletedProcess[str]"]


def table(text: str, delimiter: str = ",") -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(text), delimiter=delimiter))


def test_singular_values_come_one_a_row(cli: Cli, run_path: Path) -> None:
    result = cli(
        "query", run_path, "head.weight", "--kind", "gradient", "--group", "diagnosis=SZ", "--step", 4, "--csv"
    )
    rows = table(result.stdout)
    given = parameter_row(4002).spectra["gradient"][2]
    assert [int(row["component"]) for row in rows] == [1, 2, 3, 4, 5]
    np.testing.assert_array_equal(np.array([row["value"] for row in rows], dtype=np.float32), given)
    assert {(row["step"], row["parameter"], row["group"], row["status"]) for row in rows} == {
        ("4", "head.weight", "diagnosis=SZ", "measured")
    }
    assert result.stderr == ""


def test_every_format_holds_the_same_rows(cli: Cli, run_path: Path) -> None:
    asked = ["query", run_path, "encoder.*", "--metric", "stable_rank", "--step", "0:4", "--kind", "adjoint"]
    rows = table(cli(*asked, "--format", "csv").stdout)
    assert len(rows) == 2 * 3 * 3
    assert table(cli(*asked, "--format", "tsv").stdout, "\t") == rows
    as_json = json.loads(cli(*asked, "--json").stdout)
    assert [{key: str(value) for key, value in row.items()} for row in as_json] == rows
    lines = cli(*asked, "--format", "jsonl").stdout.splitlines()
    assert [json.loads(line) for line in lines] == as_json
    markdown = cli(*asked, "--format", "md").stdout.splitlines()
    assert markdown[0].startswith("| step | epoch | parameter |")
    assert len(markdown) == 2 + len(rows)
    shown = cli(*asked).stdout.splitlines()
    assert len(shown) == 1 + len(rows)
    assert f"{as_json[0]['value']:.4g}" in shown[1]


def test_a_table_shows_the_last_step_and_says_so(cli: Cli, run_path: Path) -> None:
    result = cli("query", run_path, "head.weight")
    assert "last of 21 steps, 40" in result.stderr
    assert "not finite" in result.stdout
    assert result.stdout.splitlines()[0].split()[-6:] == ["sigma1", "sigma2", "sigma3", "sigma4", "sigma5", "status"]


def test_ranges_of_steps_and_epochs_include_both_ends(cli: Cli, run_path: Path) -> None:
    def steps(*arguments: str) -> set[int]:
        rows = table(cli("query", run_path, "head.weight", "--metric", "sigma1", "--csv", *arguments).stdout)
        return {int(row["step"]) for row in rows}

    assert steps("--step", "4:8") == {4, 6, 8}
    assert steps("--step", "34:") == {34, 36, 38, 40}
    assert steps("--step", ":2") == {0, 2}
    assert steps("--epoch", "1:2") == set(range(10, 30, 2))
    assert steps("--epoch", "3", "--step", ":32") == {30, 32}
    assert "both ends are included" in " ".join(cli("query", "--help").stdout.split())


def test_the_metrics_asked_for_come_back_as_stored(cli: Cli, run_path: Path) -> None:
    asked = ["--metric", "sigma1", "--metric", "effective_rank", "--kind", "activation", "--group", "all", "--step", 6]
    rows = json.loads(cli("query", run_path, "encoder.fc1.bias", *asked, "--json").stdout)
    given = parameter_row(6001)
    found = {row["metric"]: row["value"] for row in rows}
    assert np.float32(found["sigma1"]) == given.spectra["activation"][0, 0]
    assert np.float32(found["effective_rank"]) == np.float32(given.metrics["activation"]["effective_rank"][0])


def test_cosines_are_between_the_gradients_of_two_groups(cli: Cli, run_path: Path) -> None:
    rows = json.loads(cli("query", run_path, "head.weight", "--metric", "cosine", "--step", 2, "--json").stdout)
    inner = parameter_row(2002).inner_product
    found = {(row["group"], row["group_other"]): row["value"] for row in rows}
    assert len(found) == 3
    expected = inner[1, 2] / np.sqrt(inner[1, 1] * inner[2, 2])
    assert found["diagnosis=HC", "diagnosis=SZ"] == pytest.approx(expected, rel=1e-5)


def test_shares_are_those_of_the_gradients_in_the_whole_one(cli: Cli, run_path: Path) -> None:
    asked = ["--metric", "share", "--metric", "sigma1", "--step", 2, "--json"]
    rows = json.loads(cli("query", run_path, "head.weight", *asked).stdout)
    inner = parameter_row(2002).inner_product
    found = {row["group"]: row["value"] for row in rows if row["metric"] == "share"}
    assert found == pytest.approx(
        {name: inner[g, 0] / inner[0, 0] for g, name in enumerate(("all", "diagnosis=HC", "diagnosis=SZ"))}, rel=1e-5
    )
    assert {row["kind"] for row in rows if row["metric"] == "share"} == {"gradient"}
    assert {row["kind"] for row in rows if row["metric"] == "sigma1"} == {"gradient", "activation", "adjoint"}
    assert cli("query", run_path, "head.weight", "--metric", "share", "--kind", "adjoint").exit_code == 1
    only = json.loads(cli("query", run_path, "--metric", "share", "--group", "all", "--json").stdout)
    assert {row["value"] for row in only if row["status"] == "measured"} == {1.0}


def test_the_rule_of_the_numerical_rank_is_named(cli: Cli, run_path: Path) -> None:
    assert RANK_RULE in cli("query", run_path, "--metric", "numerical_rank", "--step", 0, "--csv").stderr


def test_values_that_are_no_numbers_say_why_and_absent_groups_are_left_out(cli: Cli, run_path: Path) -> None:
    asked = ["query", run_path, "head.weight", "--step", 40, "--kind", "gradient"]
    rows = json.loads(cli(*asked, "--json").stdout)
    assert [(row["group"], row["value"], row["status"]) for row in rows] == [("all", None, "not finite")]
    rows = json.loads(cli(*asked, "--metric", "sigma1", "--json").stdout)
    assert [(row["value"], row["status"]) for row in rows] == [(None, "not finite")]


def test_parameters_that_were_never_measured_are_named_with_the_reason(cli: Cli, run_path: Path) -> None:
    result = cli("query", run_path, "frozen", "--csv")
    assert result.exit_code == 3
    assert "Never measured: frozen (the op is opaque)" in result.stderr
    assert "frozen" in cli("query", run_path, "--step", 0, "--csv").stderr
    assert "frozen" not in cli("query", run_path, "head.*", "--step", 0, "--csv").stderr


def test_a_probe_is_a_series_of_its_own(cli: Cli, run_path: Path) -> None:
    rows = table(cli("query", run_path, "--probe", "val", "--metric", "sigma1", "--csv").stdout)
    assert {(row["step"], row["group"], row["parameter"]) for row in rows} == {("7", "all", "encoder.fc1.weight")}


def test_names_are_globs_regular_expressions_or_read_from_stdin(cli: Cli, run_path: Path) -> None:
    def parameters(*arguments: str, input: str | None = None) -> set[str]:
        result = cli("query", run_path, *arguments, "--metric", "sigma1", "--step", 0, "--csv", input=input)
        return {row["parameter"] for row in table(result.stdout)}

    assert parameters("*.weight") == {"encoder.fc1.weight", "head.weight"}
    assert parameters(r"re:bias$|^head") == {"encoder.fc1.bias", "head.weight"}
    assert parameters("-", input="head.weight\n\n  encoder.fc1.bias \n") == {"encoder.fc1.bias", "head.weight"}
    assert parameters("-", "*bias", input="head.weight\n") == {"encoder.fc1.bias", "head.weight"}


def test_an_exact_name_goes_before_the_glob_it_could_be() -> None:
    assert matching("group", ["site=[a]"], ["site=a", "site=[a]"]) == ("site=[a]",)
    assert matching("group", ["site=[ab]"], ["site=a", "site=[a]"]) == ("site=a",)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["head.wieght"], "Nearest: 'head.weight'"),
        (["--group", "diagnosis=SC"], "Nearest: 'diagnosis=SZ'"),
        (["--kind", "gradients"], "Nearest: 'gradient'"),
        (["--metric", "stable_rnk"], "Nearest: 'stable_rank'"),
        (["--step", "5"], "Nearest: 0, 2, 4, 6, 8"),
        (["--probe", "vla"], "Nearest: 'val'"),
        (["re:("], "no regular expression"),
        (["--metric", "cosine", "--kind", "adjoint"], "are of the groups' gradients"),
    ],
)
def test_unknown_names_exit_with_1_and_name_the_nearest(
    cli: Cli, run_path: Path, arguments: list[str], words: str
) -> None:
    result = cli("query", run_path, *arguments)
    assert result.exit_code == 1
    assert words in result.stderr
    assert result.stdout == ""


@pytest.mark.parametrize(
    "arguments", [["zzz*"], ["--step", "100:200"], ["--group", "x*"], ["--epoch", "9"], ["re:^$"], ["frozen*"], ["-"]]
)
def test_a_selection_that_matches_nothing_exits_with_3(cli: Cli, run_path: Path, arguments: list[str]) -> None:
    result = cli("query", run_path, *arguments, "--json", input="")
    assert result.exit_code == 3
    assert json.loads(result.stdout) == []
    assert "Nothing matched" in result.stderr


@pytest.mark.parametrize(
    "arguments", [["--step", "x"], ["--step", ""], ["--components", "0"], ["--format", "xml"], ["--nope"]]
)
def test_wrong_usage_exits_with_2(cli: Cli, run_path: Path, arguments: list[str]) -> None:
    assert cli("query", run_path, *arguments).exit_code == 2
    assert cli("query", run_path, "--metric", "sigma1", "--components", 3).exit_code == 2
    assert cli("query").exit_code == 2


def test_a_file_can_be_written_instead(cli: Cli, run_path: Path, tmp_path: Path) -> None:
    target = tmp_path / "values.csv"
    result = cli("query", run_path, "--metric", "sigma1", "--csv", "-o", target)
    assert result.stdout == ""
    assert len(table(target.read_text())) == 20 * 3 * 3 * 3 + 3
    assert cli("query", run_path, "--csv", "-o", tmp_path / "no" / "such").exit_code == 1


def test_a_query_starts_without_torch_and_xarray_and_is_quick(shell: Shell, run_path: Path) -> None:
    prelude = """
import atexit, sys
atexit.register(lambda: print([m for m in ("torch", "xarray", "pandas", "dask") if m in sys.modules], file=sys.stderr))
"""
    started = time.perf_counter()
    result = shell("query", run_path, "head.weight", "--step", "0", "--csv", prelude=prelude)
    elapsed = time.perf_counter() - started
    assert result.returncode == 0
    assert result.stderr.strip() == "[]"
    assert elapsed < 5  # 0.4 s on an idle machine
