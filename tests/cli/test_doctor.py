"""`gradtrace doctor` prints what `examine` found, in every format and width, and ends with the right exit code."""

from __future__ import annotations

import csv
import io
import json
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path

import click
import pytest
from click.testing import CliRunner, Result

from gradtrace.checkup import ParameterCheck
from gradtrace.cli import main
from gradtrace.cli.doctor import COLUMNS, SHOWN, command
from gradtrace.cli.output import FORMATS
from gradtrace.planning.planned import COLUMNS as PLANNED

Cli = Callable[..., Result]
REFERENCE = Path(__file__).parents[2] / "docs" / "reference" / "cli-doctor.md"

STUDY = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder = nn.Linear(5, 3)
        self.norm = nn.BatchNorm1d(3)
        self.centres = nn.Parameter(torch.randn(3, 3))
        self.unused = nn.Linear(3, 2)
        self.frozen = nn.Linear(5, 3).requires_grad_(False)
        self.head = nn.Linear(3, 2)

    def forward(self, x):
        return self.head(torch.cdist(self.norm(self.encoder(x) + self.frozen(x)), self.centres))

def model():
    torch.manual_seed(0)
    return Net()

def batches():
    yield torch.randn(7, 5), torch.randint(0, 2, (7,)), list("aabbabb")

def loss(output, batch):
    return nn.functional.cross_entropy(output, batch[1])

def groups(batch):
    return {"site": batch[2]}
"""
CLIPPED = """
class Clipped(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight)
        return x @ weight

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        return grad @ weight.T, (x.T @ grad).clamp(-1e-4, 1e-4)

class Net(nn.Linear):
    def __init__(self):
        super().__init__(3, 2)
        self.first = nn.Parameter(torch.randn(5, 3))

    def forward(self, x):
        return super().forward(Clipped.apply(x, self.first))
"""
TIDY = "def model():\n    torch.manual_seed(0)\n    return nn.Sequential(nn.Linear(5, 3), nn.ReLU(), nn.Linear(3, 2))\n"


@pytest.fixture
def study(tmp_path: Path) -> Path:
    path = tmp_path / "sites.py"
    path.write_text(STUDY)
    return path


def test_json_is_one_object_with_everything(cli: Cli, study: Path) -> None:
    result = cli("doctor", study, "--json")
    assert result.exit_code == 0
    found = json.loads(result.stdout)
    assert found["ok"] is True
    assert found["groups"] == {"all": 7, "site=a": 3, "site=b": 4}
    assert found["coupling"] == "rows"
    assert 0 < found["factored_share"] < 1
    rows = {row["parameter"]: row for row in found["parameters"]}
    assert list(rows)[:2] == ["centres", "encoder.weight"]
    assert rows["centres"]["rung"] == "local"
    assert rows["encoder.weight"]["coupled"] is True
    assert rows["encoder.weight"]["shape"] == [3, 5]
    assert rows["unused.bias"]["rung"] == "no gradient"
    assert rows["frozen.bias"] | {"advice": []} == rows["frozen.bias"]
    assert rows["frozen.bias"]["residual"] is None
    assert set(rows["head.bias"]) == set(COLUMNS)


def test_json_has_the_plan_whether_asked_for_or_not(cli: Cli, study: Path) -> None:
    for words in ((), ("--plan",)):
        found = json.loads(cli("doctor", study, "--json", *words).stdout)
        assert found["step_seconds"] > 0
        plan = found["plan"]
        assert plan["groups"] == list(found["groups"])
        assert plan["cells"] == 2
        assert plan["seconds"] > 0
        assert plan["memory"] > 0
        assert sum(bucket["count"] for bucket in plan["buckets"]) > 10
        assert {row["parameter"] for row in plan["rows"]} == {
            row["parameter"] for row in found["parameters"] if row["residual"] is not None
        }


@pytest.mark.parametrize("name", FORMATS)
def test_the_plan_can_be_had_in_every_format(cli: Cli, study: Path, name: str) -> None:
    result = cli("doctor", study, "--plan", "--format", name)
    assert result.exit_code == 0
    for said in ("centres", "encoder.weight", "activation", "gram", "cells", "encoder:linear"):
        assert said in result.stdout
    if name != "json":
        assert "No adapter claims" not in result.stdout
    if name in ("csv", "tsv"):
        delimiter = "," if name == "csv" else "\t"
        assert tuple(next(csv.reader(io.StringIO(result.stdout), delimiter=delimiter))) == PLANNED
    if name == "table":
        assert "occupied cells" in result.stdout


def test_what_recording_costs_is_told_after_the_parameters(cli: Cli, study: Path, tmp_path: Path) -> None:
    told = cli("doctor", study).stderr
    for said in (
        r"Recording adds about [\d.e+-]+ times a plain step .* every=\d+ keeps it below 5%\.",
        r"Besides, 2 passes back through single ops",
        r"The dearest: .*encoder\.weight gradient \(cells, 3 gram 3\)",
        r"2 occupied cells of groups; at most .* held at once; the store takes .* per 1000 recorded steps",
    ):
        assert re.search(said, re.sub(r"\s+", " ", told)), said
    target = tmp_path / "plan.txt"
    assert cli("doctor", study, "--plan", "-o", target).stdout == ""
    assert target.read_text().startswith("parameter")


def test_gradients_that_cannot_have_full_rank_are_named_with_the_reason(cli: Cli, study: Path) -> None:
    study.write_text(
        STUDY
        + "def model():\n    return nn.Sequential(nn.Linear(5, 4), nn.Linear(4, 2, bias=False), nn.Linear(2, 3))\n"
    )
    result = cli("doctor", study, "--json")
    rows = {row["parameter"]: row for row in json.loads(result.stdout)["parameters"]}
    assert {name: row["rank_bound"] for name, row in rows.items()} == {
        "0.weight": 2, "0.bias": 1, "1.weight": 2, "2.weight": 2, "2.bias": 1,
    }  # fmt: skip
    reason = "narrowest linear layer after: 2 (1.weight), nothing nonlinear in between"
    assert rows["0.weight"]["rank_reason"] == reason
    said = re.sub(r"\s+", " ", result.stderr)
    assert f"The gradient of 0.weight has rank 2 at most: {reason}." in said
    assert "1.weight has rank" not in said
    assert json.loads(cli("doctor", study, "--json").stdout)["ranks"]


def test_every_fact_about_a_parameter_has_a_column() -> None:
    assert set(COLUMNS) == {*ParameterCheck.__dataclass_fields__, "verdict"} - {"failed"}


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_names_every_parameter_and_its_advice(cli: Cli, study: Path, name: str) -> None:
    result = cli("doctor", study, "--format", name)
    assert result.exit_code == 0
    for parameter in ("centres", "encoder.weight", "unused.bias", "frozen.bias", "head.weight"):
        assert parameter in result.stdout
    for advice in ("No adapter claims this call of `torch.cdist`", "--coupling loss", "No call that records gradients"):
        assert advice in re.sub(r"\s+", " ", result.stdout)
    assert result.stderr.splitlines()[-1].startswith("11 parameters, 7 of them measured")
    assert "every audit passed" in result.stderr.splitlines()[-1]


def test_csv_has_the_numbers_in_full(cli: Cli, study: Path) -> None:
    rows = list(csv.DictReader(io.StringIO(cli("doctor", study, "--csv").stdout)))
    assert tuple(rows[0]) == COLUMNS
    measured = [row for row in rows if row["residual"]]
    assert measured
    assert all(float(row["residual"]) <= float(row["tolerance"]) for row in measured)


def test_advice_is_numbered_and_said_once(cli: Cli, study: Path) -> None:
    out = cli("doctor", study).stdout
    assert out.count("No call that records gradients") == 1
    assert re.search(r"^unused\.weight .* see 3 *$", out, re.MULTILINE)
    assert re.search(r"^3\. unused\.weight, unused\.bias:$", out, re.MULTILINE)


def test_only_problems_leaves_out_what_is_good_and_what_is_excluded(cli: Cli, study: Path) -> None:
    rows = json.loads(cli("doctor", study, "--only-problems", "--json").stdout)["parameters"]
    assert {row["verdict"] for row in rows} == {"improvable"}
    assert {"head.weight", "frozen.weight"} & {row["parameter"] for row in rows} == set()


def test_a_study_without_problems_ends_well(cli: Cli, study: Path) -> None:
    study.write_text(STUDY + TIDY)
    result = cli("doctor", study, "--only-problems")
    assert result.exit_code == 0
    assert result.stdout.split() == list(SHOWN)
    assert "100 % of their elements factored; nothing is ungrouped and every audit passed." in result.stderr


def test_ungrouped_parameters_end_with_exit_code_1(cli: Cli, study: Path) -> None:
    study.write_text(STUDY + CLIPPED)
    result = cli("doctor", study)
    assert result.exit_code == 1
    assert re.search(r"^first .* ungrouped .* FAILS 1, 2 *$", result.stdout, re.MULTILINE)
    assert "1 ungrouped, 0 not through an audit" in result.stderr
    assert json.loads(cli("doctor", study, "--json").stdout)["ok"] is False


def test_options_reach_the_examination(cli: Cli, study: Path) -> None:
    words = ("--parameters", "encoder.*", "--parameters", "head.*", "--coupling", "loss", "--sample-dim", "0")
    rows = json.loads(cli("doctor", study, *words, "--device", "cpu", "--json").stdout)["parameters"]
    rungs = {row["parameter"]: row["rung"] for row in rows}
    assert rungs["encoder.weight"] == "global"
    assert rungs["head.weight"] == "factored"
    assert rungs["centres"] == "excluded"


def test_mistakes_of_the_study_are_told_without_a_traceback(cli: Cli, study: Path) -> None:
    study.write_text(STUDY + "def loss(output, batch):\n    return output[9]\n")
    result = cli("doctor", study)
    assert result.exit_code == 1
    assert result.stdout == ""
    assert "loss(output, batch) of the study" in result.stderr
    assert "(sites.py, line" in result.stderr
    assert cli("doctor").exit_code == 2


def test_the_report_can_be_written_to_a_file(cli: Cli, study: Path, tmp_path: Path) -> None:
    target = tmp_path / "report.txt"
    result = cli("doctor", study, "-o", target)
    assert result.stdout == ""
    text = target.read_text()
    assert text.startswith("parameter")
    assert "No adapter claims" in text
    assert json.loads(cli("doctor", study, "-o", target, "--json").stdout or target.read_text())["ok"]


@pytest.mark.parametrize(
    ("width", "lost"),
    [
        (200, set()),
        (100, {"tolerance", "coupled", "rank_bound", "shape", "kinds"}),
        (60, set(SHOWN) - {"parameter", "rung", "residual", "verdict"}),
    ],
)
def test_on_a_terminal_the_table_fits_its_width(
    study: Path, monkeypatch: pytest.MonkeyPatch, width: int, lost: set[str]
) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    terminal = Terminal()
    monkeypatch.setattr(sys, "stdout", terminal)
    command.main([os.fspath(study)], standalone_mode=False)
    lines = click.unstyle(terminal.getvalue()).splitlines()
    assert lines[0].split() == [column for column in SHOWN if column not in lost]
    assert max(map(len, lines)) <= width
    assert any(re.match(r"encoder\.weight +.*factored.* see 2$", line.rstrip()) for line in lines)


class Terminal(io.StringIO):
    """A stream that says it is one."""

    def isatty(self) -> bool:
        return True


def test_the_reference_shows_the_help_as_it_is() -> None:
    done = CliRunner().invoke(main, ["doctor", "--help"], terminal_width=80, prog_name="gradtrace")
    assert done.exit_code == 0
    assert f"```text\n{done.stdout}```" in REFERENCE.read_text()
    assert isinstance(command, click.Command)
