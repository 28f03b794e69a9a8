"""Steps that are decomposed behind the training: the same numbers, in order, and nothing is lost."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import xarray as xr
from torch import nn

import gradtrace as gt
import gradtrace.recorder
from gradtrace.behind import AHEAD, Behind

SAMPLES, STEPS = 7, 6
LABELS = ["SZ", "HC", "SZ", "SZ", "HC", "HC", "HC"]


def network(dtype: torch.dtype) -> nn.Module:
    """With rows that wait as they are (few: the first layer's are the batch itself), and rows that are folded."""
    torch.manual_seed(3)
    image = nn.Sequential(nn.Linear(25, 25), nn.Tanh(), nn.Unflatten(1, (1, 5, 5)))
    convolutions = nn.Sequential(nn.Conv2d(1, 3, 3, padding=1), nn.ReLU(), nn.Conv2d(3, 11, 5), nn.Flatten())
    return nn.Sequential(nn.Flatten(), image, convolutions, nn.Tanh(), nn.Linear(11, 2)).to(dtype)


def trained(path: Path, *, behind: bool | None, dtype: torch.dtype = torch.float32) -> nn.Module:
    """Trains in a way that writes over everything a step had: the batch, the gradients, the output's gradient."""
    model = network(dtype)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    batch, draw = torch.empty(SAMPLES, 1, 5, 5, dtype=dtype), torch.Generator().manual_seed(0)
    with gt.record(model, path, behind=behind) as recorder:
        for number in range(STEPS):
            batch.normal_(generator=draw)
            with recorder.step(groups=LABELS, epoch=number):
                output = model(batch)
                output.retain_grad()
                output.square().mean().backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=False)
            for written_over in (batch, output.detach(), output.grad):
                assert written_over is not None
                written_over.fill_(float("nan"))
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_numbers_are_those_of_steps_decomposed_at_once(
    dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = gradtrace.recorder.Pending.row

    def late(*arguments: object, **more: object) -> object:
        time.sleep(0.05)  # until what the step had is written over
        return original(*arguments, **more)  # type: ignore[arg-type]

    monkeypatch.setattr(gradtrace.recorder.Pending, "row", late)
    models = [trained(tmp_path / f"{behind}.zarr", behind=behind, dtype=dtype) for behind in (False, True)]
    at_once, later = (gt.open_run(tmp_path / f"{behind}.zarr") for behind in (False, True))
    assert_same_parameters(models)
    assert set(later.tree.children) == set(at_once.tree.children)
    for name in at_once.tree.children:
        expected, found = (run.tree[name].to_dataset().drop_dims("part") for run in (at_once, later))
        assert not np.isnan(expected["gradient"]).all()
        xr.testing.assert_equal(found, expected)  # to the last bit


def assert_same_parameters(models: list[nn.Module]) -> None:
    for one, other in zip(*(model.parameters() for model in models), strict=True):
        assert torch.isfinite(one).all()
        assert torch.equal(one, other)


def test_what_it_cost_is_told_apart(tmp_path: Path) -> None:
    trained(tmp_path / "run.zarr", behind=True)
    run = gt.open_run(tmp_path / "run.zarr")
    parts = run.stream().per_step("cost")
    behind = parts[:, list(run.stream().cost_parts).index("behind")]
    assert (behind > 0).all()


def test_it_happens_behind_the_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps end while the first is not decomposed yet, as many as may wait; a flush waits for all of them."""
    go_on, original = threading.Event(), gradtrace.recorder.Pending.row

    def slow(*arguments: object, **more: object) -> object:
        assert go_on.wait(30)
        assert threading.current_thread() is not threading.main_thread()
        return original(*arguments, **more)  # type: ignore[arg-type]

    monkeypatch.setattr(gradtrace.recorder.Pending, "row", slow)
    model = network(torch.float32)
    with gt.record(model, tmp_path / "run.zarr", behind=True) as recorder:
        for _ in range(AHEAD):
            with recorder.step(groups=LABELS):
                model(torch.randn(SAMPLES, 1, 5, 5)).square().mean().backward()
        go_on.set()
        recorder.flush()
        assert gt.open_run(tmp_path / "run.zarr").stream().steps.tolist() == list(range(AHEAD))


def test_whoever_hands_over_too_much_waits() -> None:
    behind, go_on = Behind(torch.device("cpu")), threading.Event()
    for _ in range(AHEAD):
        assert behind.hand_over(lambda: assert_set(go_on)) < 1.0
    threading.Timer(0.2, go_on.set).start()
    began = time.perf_counter()
    waited = behind.hand_over(lambda: None)
    assert go_on.is_set(), "there was no room before"
    assert 0 < waited <= time.perf_counter() - began
    behind.close()


def assert_set(event: threading.Event) -> None:
    assert event.wait(30)


def test_pieces_are_done_in_order_without_gradients_and_on_one_thread() -> None:
    behind, found = Behind(torch.device("cpu")), []
    torch_threads = torch.get_num_threads()
    for number in range(5):
        behind.hand_over(lambda n=number: found.append((n, torch.is_grad_enabled(), torch.get_num_threads())))
    behind.wait()
    assert found == [(number, False, 1) for number in range(5)]
    assert torch.get_num_threads() == torch_threads
    behind.close()


def test_what_a_piece_raises_is_told_and_later_pieces_are_not_begun() -> None:
    behind, begun = Behind(torch.device("cpu")), []
    behind.hand_over(lambda: 1 / 0)  # type: ignore[arg-type,return-value]
    behind.hand_over(lambda: begun.append(2))
    with pytest.raises(ZeroDivisionError):
        behind.wait()
    with pytest.raises(ZeroDivisionError):
        behind.hand_over(lambda: begun.append(3))
    assert begun == []


def test_a_failure_behind_reaches_the_training_and_earlier_rows_are_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original, count = gradtrace.recorder.Pending.row, iter(range(100))

    def failing(*arguments: object, **more: object) -> object:
        if next(count) == 1:
            raise MemoryError("no room for a copy")
        return original(*arguments, **more)  # type: ignore[arg-type]

    monkeypatch.setattr(gradtrace.recorder.Pending, "row", failing)
    with pytest.raises(MemoryError, match="no room"):
        trained(tmp_path / "run.zarr", behind=True)
    assert gt.open_run(tmp_path / "run.zarr").stream().steps.tolist() == [0]


def test_a_script_that_ends_without_closing_loses_nothing(tmp_path: Path) -> None:
    code = f"""
import torch, gradtrace as gt
model = torch.nn.Linear(3, 2)
recorder = gt.record(model, {str(tmp_path / "run.zarr")!r}, behind=True)
for _ in range(5):
    with recorder.step(groups=["a", "b"]):
        model(torch.randn(2, 3)).square().mean().backward()
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
    assert gt.open_run(tmp_path / "run.zarr").stream().steps.tolist() == list(range(5))
