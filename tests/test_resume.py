"""A training that is interrupted and gone on with: the run in the end is the one that an unbroken training gives."""

from __future__ import annotations

import copy
import os
import shutil
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import gradtrace as gt
from gradtrace.errors import CaptureError, StoreError, StoreWarning

LABELS = {"diagnosis": ["SZ", "HC", "SZ", "HC", "HC", "HC", "SZ"]}


def network(hidden: int = 13) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(11, hidden), nn.Tanh(), nn.Linear(hidden, 3))


def batch(step: int) -> Tensor:
    return torch.randn(7, 11, generator=torch.Generator().manual_seed(step))


def train(
    recorder: gt.Recorder, model: nn.Module, optimizer: torch.optim.Optimizer, steps: range, groups: Any = LABELS
) -> None:
    for step in steps:
        with recorder.step(groups=groups, epoch=step / 10):
            model(batch(step)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def parts(path: Path, *spans: tuple[range, Any], **options: Any) -> gt.Run:
    """A training in several parts, each of which begins from a checkpoint and goes on with the run."""
    checkpoints: dict[int, Any] = {}
    for span, resume in spans:
        model = network()
        optimizer = torch.optim.Adam(model.parameters())
        if span.start in checkpoints:
            weights, state = copy.deepcopy(checkpoints[span.start])
            model.load_state_dict(weights)
            optimizer.load_state_dict(state)
        with gt.record(model, path, resume=resume, **options) as recorder:
            for step in span:
                train(recorder, model, optimizer, range(step, step + 1))
                checkpoints[step + 1] = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
            recorder.probe("val", [batch(100)], lambda out, _: out.square().mean(), inputs=lambda b: b)
    return gt.open_run(path)


def same(one: gt.Run, other: gt.Run) -> None:
    assert one.committed == other.committed
    for name in one.parameters:
        for probe in (None, "val"):
            mine, theirs = one.stream(probe), other.stream(probe)
            assert mine.steps.tolist() == theirs.steps.tolist()
            for variable in ("gradient", "activation", "adjoint", "nuclear", "inner_product", "status"):
                left, right = mine.read(name, variable), theirs.read(name, variable)
                np.testing.assert_array_equal(left, right, err_msg=f"{name} {variable}")
    np.testing.assert_array_equal(one.stream().per_step("loss"), other.stream().per_step("loss"))


@pytest.mark.parametrize("behind", [False, True])
def test_a_run_in_parts_is_the_run_in_one(tmp_path: Path, behind: bool) -> None:
    whole = parts(tmp_path / "one.zarr", (range(5), False), (range(5, 9), True), behind=behind)
    lost = parts(tmp_path / "two.zarr", (range(5), True), (range(5, 7), True), (range(5, 9), 5), behind=behind)
    same(whole, lost)
    assert [segment["rewound"] for segment in lost.attrs["segments"]] == [False, True]


def test_only_some_steps_are_recorded_and_their_numbers_go_on(tmp_path: Path) -> None:
    run = parts(tmp_path / "run.zarr", (range(8), False), (range(8, 12), 8), every=3)
    assert run.stream().steps.tolist() == [0, 3, 6, 9]


def test_a_probe_of_the_step_where_a_run_goes_on_is_not_made_twice(tmp_path: Path) -> None:
    run = parts(tmp_path / "run.zarr", (range(4), False), (range(4, 4), True), (range(4, 6), 4))
    assert run.stream("val").steps.tolist() == [4, 6]


def test_a_changed_model_is_refused_with_what_changed(tmp_path: Path) -> None:
    parts(tmp_path / "run.zarr", (range(3), False))
    with pytest.raises(StoreError, match=r"'0.weight' was \(13, 11\) and is \(17, 11\).*changed=True"):
        gt.record(network(17), tmp_path / "run.zarr", resume=True)
    longer = nn.Sequential(*network(), nn.Linear(3, 2))
    with pytest.raises(StoreError, match="other parameters than before"):
        gt.record(longer, tmp_path / "run.zarr", resume=True)
    model = network(17)
    with gt.record(model, tmp_path / "run.zarr", resume=True, changed=True) as recorder:
        train(recorder, model, torch.optim.Adam(model.parameters()), range(3, 5))
    run = gt.open_run(tmp_path / "run.zarr")
    assert run.parameters["0.weight"].shape == (17, 11)
    assert run.stream().steps.tolist() == [0, 1, 2, 3, 4]
    assert run.attrs["segments"][0]["step"] == 3
    values = run.stream().read("0.weight", "gradient")
    assert np.isfinite(values[:3, 0, :11]).all()


def test_changed_groupings_are_refused_with_what_changed(tmp_path: Path) -> None:
    parts(tmp_path / "run.zarr", (range(3), False))
    model, groups = network(), {"site": LABELS["diagnosis"]}
    optimizer = torch.optim.Adam(model.parameters())
    with (
        pytest.raises(StoreError, match=r"\['diagnosis'\], those of this step \['site'\]"),
        gt.record(model, tmp_path / "run.zarr", resume=True) as recorder,
    ):
        train(recorder, model, optimizer, range(3, 4), groups)
    with gt.record(model, tmp_path / "run.zarr", resume=True, changed=True) as recorder:
        train(recorder, model, optimizer, range(3, 5), groups)
    assert gt.open_run(tmp_path / "run.zarr").groups == (
        "all", "diagnosis=HC", "diagnosis=SZ", "site=HC", "site=SZ",
    )  # fmt: skip
    assert gt.open_run(tmp_path / "run.zarr").attrs["groupings"] == ["site"]


def test_a_cadence_that_a_budget_chose_is_kept(tmp_path: Path) -> None:
    model = network()
    optimizer = torch.optim.Adam(model.parameters())
    with gt.record(model, tmp_path / "run.zarr", budget=1.0) as recorder:
        train(recorder, model, optimizer, range(120))
    before = gt.open_run(tmp_path / "run.zarr")
    assert before.attrs["every"] is not None
    with gt.record(model, tmp_path / "run.zarr", budget=1.0, resume=120) as recorder:
        train(recorder, model, optimizer, range(120, 160))
    run = gt.open_run(tmp_path / "run.zarr")
    later = [step for step in run.stream().steps.tolist() if step >= 120]
    assert later == [step for step in range(120, 160) if step % before.attrs["every"] == 0]
    assert run.attrs["budget"] == 1.0


@pytest.mark.parametrize("resume", [-1, -5])
def test_a_step_that_cannot_be_is_refused(tmp_path: Path, resume: int) -> None:
    with pytest.raises(StoreError, match=f"resume={resume} is no step"):
        gt.record(network(), tmp_path / "run.zarr", resume=resume)


def test_a_live_run_is_told_apart_from_a_dead_one(tmp_path: Path) -> None:
    with (
        gt.record(network(), tmp_path / "run.zarr"),
        pytest.raises(StoreError, match="is being written by this process"),
    ):
        gt.record(network(), tmp_path / "run.zarr", resume=True)


# ---------------------------------------------------------------------- disks


def test_a_directory_that_vanishes_ends_the_recording_and_not_the_training(tmp_path: Path) -> None:
    model, plain = network(), network()
    optimizer, other = torch.optim.Adam(model.parameters()), torch.optim.Adam(plain.parameters())
    recorder = gt.record(model, tmp_path / "run.zarr")
    train(recorder, model, optimizer, range(2))
    recorder.flush()
    shutil.rmtree(tmp_path / "run.zarr")
    train(recorder, model, optimizer, range(2, 3))
    with pytest.raises(StoreError, match="vanished"):
        recorder.flush()
    with pytest.warns(StoreWarning, match=r"has vanished.*Training goes on, and is not recorded any more"):
        train(recorder, model, optimizer, range(3, 6))
    assert recorder.failure is not None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(recorder, model, optimizer, range(6, 8))
        recorder.close()
    for step in range(8):
        plain(batch(step)).square().mean().backward()
        other.step()
        other.zero_grad()
    for mine, theirs in zip(model.parameters(), plain.parameters(), strict=True):
        assert torch.equal(mine, theirs)


# ---------------------------------------------------------------------- signals

CHILD = """
import sys, time, torch
import gradtrace as gt
model = torch.nn.Linear(5, 3)
recorder = gt.record(model, sys.argv[1])
print("ready", flush=True)
for step in range(10_000):
    with recorder.step(groups=["a", "b", "a"]):
        loss = model(torch.randn(3, 5)).square().mean()
        time.sleep(0.02)
        loss.backward()
    if step == 3:
        print("trained", flush=True)
"""


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 128 + signal.SIGTERM), (signal.SIGINT, -signal.SIGINT)])
def test_a_signal_lets_the_step_end_and_the_run_is_closed(tmp_path: Path, number: int, code: int) -> None:
    path = tmp_path / "run.zarr"
    command = [sys.executable, "-c", CHILD, str(path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as child:
        assert child.stdout is not None
        assert [child.stdout.readline().strip() for _ in range(2)] == ["ready", "trained"]
        time.sleep(0.005)
        child.send_signal(number)
        assert child.wait(60) == code
    run = gt.open_run(path)
    assert run.closed
    assert run.stream().steps.tolist() == list(range(run.committed["steps"]))
    assert run.committed["steps"] >= 4


def test_signals_are_as_they_were_once_the_recorder_is_closed(tmp_path: Path) -> None:
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    with gt.record(network(), tmp_path / "run.zarr"):
        assert signal.getsignal(signal.SIGTERM) != before[1]
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


def test_a_handler_of_the_users_is_left_alone(tmp_path: Path) -> None:
    seen: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: seen.append(number))
    try:
        model = network()
        with gt.record(model, tmp_path / "run.zarr") as recorder, recorder.step(groups=LABELS):
            os.kill(os.getpid(), signal.SIGTERM)
            model(batch(0)).square().mean().backward()
        assert seen == [signal.SIGTERM]
    finally:
        signal.signal(signal.SIGTERM, before)


def test_a_second_interrupt_does_not_wait(tmp_path: Path) -> None:
    reached = []

    def interrupted_twice() -> None:
        with gt.record(network(), tmp_path / "run.zarr") as recorder, recorder.step(groups=LABELS):
            os.kill(os.getpid(), signal.SIGINT)
            reached.append("after the first")
            os.kill(os.getpid(), signal.SIGINT)
            reached.append("after the second")

    with pytest.raises(KeyboardInterrupt):
        interrupted_twice()
    assert reached == ["after the first"]


def test_an_interrupt_waits_for_the_step(tmp_path: Path) -> None:
    model = network()

    def interrupted() -> None:
        with gt.record(model, tmp_path / "run.zarr") as recorder, recorder.step(groups=LABELS):
            os.kill(os.getpid(), signal.SIGINT)
            model(batch(0)).square().mean().backward()

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    run = gt.open_run(tmp_path / "run.zarr")
    assert run.closed
    assert run.stream().steps.tolist() == [0]


def test_an_exception_in_the_loop_closes_the_run(tmp_path: Path) -> None:
    model = network()
    optimizer = torch.optim.Adam(model.parameters())

    def failing() -> None:
        with gt.record(model, tmp_path / "run.zarr") as recorder:
            train(recorder, model, optimizer, range(3))
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        failing()
    assert gt.open_run(tmp_path / "run.zarr").closed
    assert gt.open_run(tmp_path / "run.zarr").committed["steps"] == 3


# ---------------------------------------------------------------------- small groups


def test_groups_that_are_too_small_are_not_stored_nor_those_that_tell_of_them(tmp_path: Path) -> None:
    model = network()
    optimizer = torch.optim.Adam(model.parameters())
    groups = {"site": ["a", "a", "a", "b", "b", "b", "c"], "sex": ["f", "m", "f", "m", "f", "m", "f"]}
    with gt.record(model, tmp_path / "run.zarr", min_samples=2) as recorder:
        train(recorder, model, optimizer, range(2), groups)
        recorder.probe("val", [batch(5)], lambda out, _: out.square().mean(), groups=groups, inputs=lambda b: b)
    run = gt.open_run(tmp_path / "run.zarr")
    for tree in (run.tree, run.probes["val"]):
        node = tree["0.weight"]
        codes = dict(zip(node["group"].values.tolist(), node["status"].values[0].tolist(), strict=True))
        assert codes["site=c"] == 5
        assert sorted(codes[f"site={s}"] for s in "ab") == [1, 5], "with both of them c could be had"
        assert codes["all"] == codes["sex=f"] == codes["sex=m"] == 1
        for name, code in codes.items():
            values = node["gradient"].sel(group=name).values
            assert np.isnan(values).all() == (code == 5)
            assert np.isnan(node["inner_product"].sel(group=name).values).all() == (code == 5)
            assert (node["n_samples"].sel(group=name).values == 0).all() == (code == 5)
            assert np.isnan(node["adjoint_nuclear"].sel(group=name).values).all() == (code == 5)
    assert run.attrs["min_samples"] == 2


@pytest.mark.parametrize("least", [0, -1, 1.5, True])
def test_a_least_number_of_samples_that_cannot_be_is_refused(tmp_path: Path, least: Any) -> None:
    with pytest.raises(CaptureError, match="min_samples"):
        gt.record(network(), tmp_path / "run.zarr", min_samples=least)
