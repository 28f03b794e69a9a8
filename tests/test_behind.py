"""Steps that are decomposed behind the training: the same numbers, in order, and nothing is lost."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
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


def trained(path: Path, *, behind: bool | None, dtype: torch.dtype = torch.float32, device: str = "cpu") -> nn.Module:
    """Trains in a way that writes over everything a step had: the batch, the gradients, the output's gradient."""
    model = network(dtype).to(device)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    batch, draw = torch.empty(SAMPLES, 1, 5, 5, dtype=dtype, device=device), torch.Generator().manual_seed(0)
    with gt.record(model, path, behind=behind) as recorder:
        for number in range(STEPS):
            batch.copy_(torch.randn(batch.shape, generator=draw, dtype=dtype))
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


@pytest.fixture
def late(monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps are decomposed only when what they had is written over."""
    original = gradtrace.recorder.Pending.row

    def row(*arguments: object, **more: object) -> object:
        time.sleep(0.05)
        return original(*arguments, **more)  # type: ignore[arg-type]

    monkeypatch.setattr(gradtrace.recorder.Pending, "row", row)


@pytest.mark.usefixtures("late")
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_numbers_are_those_of_steps_decomposed_at_once(dtype: torch.dtype, device: str, tmp_path: Path) -> None:
    paths = {behind: tmp_path / f"{behind}.zarr" for behind in (False, True)}
    models = [trained(path, behind=behind, dtype=dtype, device=device) for behind, path in paths.items()]
    at_once, later = (gt.open_run(path) for path in paths.values())
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
    for _ in range(AHEAD + 1):  # none of them takes up room for good
        with pytest.raises(ZeroDivisionError):
            behind.hand_over(lambda: begun.append(3))
    assert begun == []


def test_an_error_of_the_training_is_not_hidden_by_one_behind_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(*arguments: object, **more: object) -> object:
        raise MemoryError("no room for a copy")

    monkeypatch.setattr(gradtrace.recorder.Pending, "row", failing)
    model = network(torch.float32)

    def train() -> None:
        with gt.record(model, tmp_path / "run.zarr", behind=True) as recorder:
            with recorder.step(groups=LABELS):
                model(torch.randn(SAMPLES, 1, 5, 5)).square().mean().backward()
            raise KeyError("a mistake in the loop")

    with pytest.raises(KeyError) as raised:
        train()
    assert any("no room for a copy" in note for note in raised.value.__notes__)


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


@pytest.mark.parametrize("idle", [0, 3])
def test_a_script_that_ends_without_closing_loses_nothing(idle: int, tmp_path: Path) -> None:
    """Also where threads that would share the work take nothing on any more."""
    code = f"""
import torch, gradtrace as gt, gradtrace.behind, gradtrace.schedule
gradtrace.behind.idle_cores, gradtrace.schedule.WORTH_SHARING = lambda: {idle}, 0
model = torch.nn.Linear(300, 200)
recorder = gt.record(model, {str(tmp_path / "run.zarr")!r}, behind=True)
for _ in range(5):
    with recorder.step(groups=["a", "b"] * 150):
        model(torch.randn(300, 300)).square().mean().backward()
"""
    ended = subprocess.run([sys.executable, "-c", code], check=True, timeout=120, capture_output=True, text=True)
    assert ended.stderr == ""
    assert gt.open_run(tmp_path / "run.zarr").stream().steps.tolist() == list(range(5))


def test_a_script_that_ends_without_closing_is_told_what_failed(tmp_path: Path) -> None:
    code = f"""
import torch, gradtrace as gt, gradtrace.recorder
def failing(*arguments, **more): raise MemoryError("no room for a copy")
gradtrace.recorder.Pending.row = failing
model = torch.nn.Linear(3, 2)
recorder = gt.record(model, {str(tmp_path / "run.zarr")!r}, behind=True)
with recorder.step(groups=["a", "b"]):
    model(torch.randn(2, 3)).square().mean().backward()
"""
    ended = subprocess.run([sys.executable, "-c", code], check=True, timeout=120, capture_output=True, text=True)
    assert "not recorded: MemoryError: no room for a copy" in ended.stderr


class Stream:
    """Stands for a stream of an accelerator, and notes what is asked of it."""

    def __init__(self, device: torch.device, noted: list[str] | None = None) -> None:
        self.device, self.noted = device, [] if noted is None else noted

    def record_event(self) -> str:
        self.noted.append("event recorded")
        return "event"

    def wait_event(self, event: str) -> None:
        self.noted.append(f"{event} waited for")

    def synchronize(self) -> None:
        self.noted.append("synchronized")


def test_on_an_accelerator_work_waits_for_what_was_put_on_the_trainings_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    """The order of calls alone; what they do was never tried there."""
    of_training = Stream(torch.device("cuda"))
    noted = of_training.noted

    @contextmanager
    def on(stream: Stream) -> Iterator[None]:
        noted.append("on its own stream" if stream is not of_training else "on the training's")
        yield
        noted.append("left")

    monkeypatch.setattr(torch.cuda, "Stream", lambda device: Stream(device, noted))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: of_training)
    monkeypatch.setattr(torch.cuda, "stream", on)
    behind = Behind(torch.device("cuda"))
    behind.hand_over(lambda: noted.append("work"))
    behind.close()
    expected = ["event recorded", "event waited for", "on its own stream", "work", "left", "synchronized"]
    assert noted == expected
    assert behind.workers == 1, "the device shares its work out itself"


@pytest.mark.gpu
def test_on_a_gpu_work_sees_what_the_training_had_put_off() -> None:
    device = torch.device("cuda", 0)
    behind, found = Behind(device), []
    values = torch.zeros(1000, device=device)
    torch.cuda._sleep(10**8)
    values.fill_(1.0)
    behind.hand_over(lambda: found.append(float(values.sum())))
    behind.wait()
    behind.close()
    assert found == [1000.0]
