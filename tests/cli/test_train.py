"""`gradtrace train`: a study becomes a store; the training is the study's own; mistakes are named."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result

import gradtrace as gt
from gradtrace.cli import main
from gradtrace.study import load_study
from gradtrace.training import train_study

STUDY = """
import torch

def model():
    return torch.nn.Sequential(torch.nn.Linear(5, 3), torch.nn.Tanh(), torch.nn.Linear(3, 2))

def batches():
    generator = torch.Generator().manual_seed(11)
    for _ in range(4):
        yield torch.randn(7, 5, generator=generator), torch.randn(7, 2, generator=generator), list("aabbbab")

def loss(output, batch):
    return (output - batch[1]).square().mean()

def groups(batch):
    return {"site": batch[2]}
"""


@pytest.fixture
def study(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    path = tmp_path / "sites_study.py"
    path.write_text(STUDY)
    return path


def invoke(*words: str) -> Result:
    return CliRunner().invoke(main, ["train", *words], terminal_width=80, prog_name="gradtrace", catch_exceptions=False)


def refused(says: str, *words: str) -> None:
    """The command ends with exit code 1 and a message on stderr, without a traceback."""
    result = invoke(*words)
    assert result.exit_code == 1
    assert result.stdout == ""
    assert re.search(says, " ".join(result.stderr.split())), result.stderr


def test_a_study_becomes_a_store_named_after_it(study: Path) -> None:
    result = invoke(study.name, "--epochs", "2", "--seed", "3", "--device", "cpu")
    assert result.exit_code == 0
    assert "gradtrace info sites_study.zarr" in result.stderr
    assert result.stdout == ""
    run = gt.open_run("sites_study.zarr")
    assert run.tree.sizes["step"] == 8
    assert set(run.groups) == {"all", "site=a", "site=b"}
    assert {"0.weight", "0.bias", "2.weight", "2.bias"} <= set(run.parameters)
    np.testing.assert_array_equal(run.tree["epoch"], [0, 0, 0, 0, 1, 1, 1, 1])
    np.testing.assert_array_equal(run.tree["n_samples"].sel(group="site=a"), 3)


def test_options_reach_the_recorder(study: Path) -> None:
    words = ("-o", "out.zarr", "--every", "3", "--kind", "gradient", "--keep", "2", "--parameters", "0.*")
    assert invoke(study.name, *words, "--epochs", "2").exit_code == 0
    run = gt.open_run("out.zarr")
    assert run.kinds == ("gradient",)
    assert run.keep == 2
    assert run.tree.sizes["step"] == 3
    node = run.parameter("0.weight")
    assert node.sizes["component"] == 2
    assert "activation" not in node
    assert set(run.parameters) == {"0.weight", "0.bias"}
    assert set(run.attrs["excluded"]) == {"2.weight", "2.bias"}


def test_a_budget_reaches_the_recorder(study: Path) -> None:
    assert invoke(study.name, "--epochs", "10", "--budget", "0.5").exit_code == 0
    attrs = gt.open_run("sites_study.zarr").attrs
    assert attrs["budget"] == 0.5
    assert attrs["every"] >= 1
    assert attrs["calibration"]["steps"] == 31


@pytest.mark.parametrize("words", [("--budget", "0"), ("--budget", "1.5"), ("--every", "3", "--budget", "0.1")])
def test_a_budget_that_cannot_be_is_wrong_usage(study: Path, words: tuple[str, ...]) -> None:
    result = invoke(study.name, *words)
    assert result.exit_code == 2
    assert "--budget" in result.stderr
    assert not Path("sites_study.zarr").exists()


def test_training_is_that_of_a_plain_loop(study: Path) -> None:
    made: list[torch.nn.Module] = []
    loaded = load_study(study.name)
    kept = replace(loaded, model=lambda: made.append(loaded.model()) or made[-1])
    train_study(kept, "run.zarr", epochs=2, seed=5, device="cpu")

    torch.manual_seed(5)
    plain = loaded.model()
    optimizer = torch.optim.Adam(plain.parameters(), lr=1e-3)
    for _ in range(2):
        for batch in loaded.batches():
            loaded.loss(plain(batch[0]), batch).backward()
            optimizer.step()
            optimizer.zero_grad()
    for ours, theirs in zip(made[0].parameters(), plain.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_a_given_optimizer_is_used(study: Path) -> None:
    study.write_text(STUDY + "\ndef optimizer(parameters): return torch.optim.SGD(parameters, lr=0.0)\n")
    made: list[torch.nn.Module] = []
    loaded = load_study(study.name)
    train_study(replace(loaded, model=lambda: made.append(loaded.model()) or made[-1]), "run.zarr", seed=5)
    torch.manual_seed(5)
    for ours, fresh in zip(made[0].parameters(), loaded.model().parameters(), strict=True):
        assert torch.equal(ours, fresh)


def test_progress_counts_steps_once_their_number_is_known(study: Path) -> None:
    seen: list[int | None] = []
    train_study(load_study(study.name), "run.zarr", epochs=3, tick=lambda loss, total: seen.append(total))
    assert seen == [None] * 4 + [12] * 8


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("(output - batch[1]).square().mean()", "output - batch[1]", r"loss.*shaped \(7, 2\).*one number"),
        ("(output - batch[1]).square().mean()", "output.sum().item()", "loss.*a float"),
        ("range(4)", "range(0)", "yielded nothing in epoch 0"),
        ("return torch.nn.Sequential", "return (lambda *a: None)", "model.*returned a NoneType"),
    ],
)
def test_a_study_that_returns_something_else_is_told(study: Path, old: str, new: str, says: str) -> None:
    study.write_text(STUDY.replace(old, new))
    refused(says, study.name)


def test_a_generator_that_is_used_up_is_told(study: Path) -> None:
    study.write_text(STUDY.replace("def batches():", "def fresh():") + "\nonce = fresh()\ndef batches(): return once\n")
    refused(r"nothing in epoch 1.*make a new one", study.name, "--epochs", "2")


def test_a_missing_cuda_device_is_told(study: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    refused(r"cuda.*Use cpu, or auto", study.name, "--device", "cuda")


def test_a_store_that_is_there_is_not_overwritten(study: Path) -> None:
    assert invoke(study.name).exit_code == 0
    refused(r"sites_study\.zarr", study.name)


def test_a_doubtful_sample_axis_can_be_told(study: Path) -> None:
    """Seven samples, seven outputs: the error asks, and the command takes the answer."""
    square = STUDY.replace("Linear(3, 2)", "Linear(3, 7)").replace("randn(7, 2,", "randn(7, 7,")
    study.write_text(square)
    for answer in ("0", "-2"):
        assert invoke(study.name, "-o", f"axis{answer}.zarr", "--sample-dim", answer, "--seed", "1").exit_code == 0
    refused(r"sample_dim|axis", study.name, "--sample-dim", "2")


def test_the_definition_for_coupled_samples_can_be_chosen(study: Path) -> None:
    study.write_text(STUDY.replace("torch.nn.Tanh()", "torch.nn.BatchNorm1d(3)"))
    for coupling in ("rows", "loss"):
        assert invoke(study.name, "-o", f"{coupling}.zarr", "--coupling", coupling, "--seed", "1").exit_code == 0
    attrs = {c: gt.open_run(f"{c}.zarr").tree["0.weight"].attrs for c in ("rows", "loss")}
    assert {c: a["coupling"] for c, a in attrs.items()} == {"rows": "rows", "loss": "loss"}


def test_inputs_may_be_keyword_arguments(study: Path) -> None:
    study.write_text(STUDY + "\ndef inputs(batch): return {'input': batch[0]}\n")
    assert invoke(study.name).exit_code == 0


def test_help_names_every_option_and_what_a_study_is() -> None:
    text = invoke("--help").stdout
    page = Path(__file__).parents[2] / "docs" / "reference" / "cli-train-demo.md"
    assert text in page.read_text(encoding="utf-8"), "the reference page shows an older help text"
    for each in (
        "--output",
        "--epochs",
        "--every",
        "--budget",
        "--kind",
        "--keep",
        "--parameters",
        "--coupling",
        "--sample-dim",
        "--seed",
        "--device",
    ):
        assert each in text
    for each in ("model()", "batches()", "inputs(batch)", "loss(output, batch)", "groups(batch)", "optimizer"):
        assert each in text
