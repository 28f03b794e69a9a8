"""A recorder with a budget: calibrates on the clock, then keeps its cadence; what tracing cost is in the store."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import gradtrace as gt
import gradtrace.recording
from gradtrace.cadence import Cadence
from gradtrace.errors import CaptureError
from gradtrace.store.queries.summary import run_summary

LABELS = ["SZ", "HC", "SZ", "SZ", "HC"]


class Clock:
    """Moves when it is told to: by a second per step, and by half of one more if the step is recorded."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """What a budget's cadence reads instead of the wall clock; tracing's own clocks see next to nothing beside it."""
    ticking = Clock()

    def checked(every: int, budget: float | None) -> Cadence:
        return Cadence(every=every, budget=budget, clock=ticking)

    monkeypatch.setattr(gradtrace.recording, "checked_cadence", checked)
    return ticking


def model() -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2)).double()


def data(number: int) -> Tensor:
    return torch.randn(5, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(number))


def train(network: nn.Module, recorder: gt.Recorder, clock: Clock, steps: int, **about: Any) -> list[int]:
    """The numbers of the recorded steps."""
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    recorded = []
    for number in range(steps):
        with recorder.step(groups={"diagnosis": LABELS}, **about) as step:
            network(data(number)).square().mean().backward()
        clock.now += 1000.0 + 500.0 * step.recorded
        recorded += [number] * step.recorded
        optimizer.step()
        optimizer.zero_grad()
    return recorded


def test_steps_of_the_calibration_are_rows_and_the_cadence_that_follows_is_stored(clock: Clock, tmp_path: Path) -> None:
    network = model()
    with gt.record(network, tmp_path / "run.zarr", budget=0.5) as recorder:
        recorded = train(network, recorder, clock, 40)
    assert recorded == [0, 7, 10, 14, 17, 21, 24, 28, 32, 34, 36, 38]
    run = gt.open_run(tmp_path / "run.zarr")
    np.testing.assert_array_equal(run.tree["step"], recorded)
    assert run.attrs["budget"] == 0.5
    assert run.attrs["every"] == 2
    found = run.attrs["calibration"]
    assert (found["plain_seconds"], found["extra_seconds"], found["first_step"]) == (1000.0, 500.0, 32)
    assert found["fraction"] == pytest.approx(8 * 500 / 31_000, rel=1e-2)


def test_the_run_repeated_with_every_has_the_same_numbers(clock: Clock, tmp_path: Path) -> None:
    for name, how in (("first", {"budget": 0.5}), ("again", {"every": 2})):
        network = model()
        with gt.record(network, tmp_path / name, **how) as recorder:  # type: ignore[arg-type]
            train(network, recorder, clock, 40)
    first, again = (gt.open_run(tmp_path / name).tree["0.weight"]["gradient"].load() for name in ("first", "again"))
    np.testing.assert_array_equal(first.sel(step=slice(32, None)), again.sel(step=slice(32, None)))


def test_a_probe_is_no_part_of_the_steps_around_it(clock: Clock, tmp_path: Path) -> None:
    network = model()

    def slow_loss(output: Tensor, batch: Any) -> Tensor:
        clock.now += 1e6
        return output.square().mean()

    with gt.record(network, tmp_path / "run.zarr", budget=0.5) as recorder:
        for number in range(35):
            with recorder.step(groups={"diagnosis": LABELS}) as step:
                network(data(number)).square().mean().backward()
            clock.now += 1000.0 + 500.0 * step.recorded
            if number % 2:
                recorder.probe("held-out", [data(0)], slow_loss)
    run = gt.open_run(tmp_path / "run.zarr")
    assert run.attrs["every"] == 2
    assert run.attrs["calibration"]["plain_seconds"] == pytest.approx(1000.0)
    assert run_summary(run)["cost in seconds"]["probes"] > 0


def test_a_step_that_raises_in_a_calibration_is_no_row(clock: Clock, tmp_path: Path) -> None:
    network = model()
    with gt.record(network, tmp_path / "run.zarr", budget=0.5) as recorder:
        with pytest.raises(ZeroDivisionError), recorder.step(groups={"diagnosis": LABELS}):
            raise ZeroDivisionError
        clock.now += 1000.0
        recorded = train(network, recorder, clock, 50)
    run = gt.open_run(tmp_path / "run.zarr")
    np.testing.assert_array_equal(run.tree["step"], [number + 1 for number in recorded])
    assert run.attrs["calibration"]["recorded"] == 9


def test_training_under_a_budget_is_training(tmp_path: Path) -> None:
    traced, plain = model(), model()
    with gt.record(traced, tmp_path / "run.zarr", budget=0.2) as recorder:
        train(traced, recorder, Clock(), 35)
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.1)
    for number in range(35):
        plain(data(number)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    for ours, theirs in zip(traced.parameters(), plain.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_on_the_wall_clock_a_cadence_is_found(tmp_path: Path) -> None:
    network = model()
    with gt.record(network, tmp_path / "run.zarr", budget=1.0) as recorder:
        train(network, recorder, Clock(), 32)
    attrs = gt.open_run(tmp_path / "run.zarr").attrs
    assert attrs["every"] >= 1
    assert attrs["calibration"]["plain_seconds"] > 0
    assert attrs["calibration"]["extra_seconds"] > 0


@pytest.mark.parametrize("every", [1, 2, 4])
def test_what_steps_took_is_stored_beside_what_tracing_took(every: int, clock: Clock, tmp_path: Path) -> None:
    network = model()
    with gt.record(network, tmp_path / "run.zarr", every=every) as recorder:
        train(network, recorder, clock, 9)
    cost = gt.open_run(tmp_path / "run.zarr").tree["cost"].load()
    assert {"survey", "reduce", "decompose", "waited", "step", "plain", "period"} <= set(cost["part"].values)
    period, plain = cost.sel(part="period"), cost.sel(part="plain")
    np.testing.assert_array_equal(np.isnan(period), [True] + [False] * (cost.sizes["step"] - 1))
    np.testing.assert_array_equal(period[1:], 1500.0)
    np.testing.assert_array_equal(plain[1:], np.nan if every == 1 else 1000.0)
    assert np.isnan(plain[0])


def summary_of(path: Path, clock: Clock, steps: int, how: dict[str, Any]) -> dict[str, Any]:
    network = model()
    with gt.record(network, path, **how) as recorder:
        train(network, recorder, clock, steps)
    return run_summary(gt.open_run(path))


def test_info_says_what_tracing_cost(clock: Clock, tmp_path: Path) -> None:
    summary = summary_of(tmp_path / "run.zarr", clock, 9, {"every": 4})
    total, median = summary["cost in seconds"], summary["cost per recorded step"]
    parts = {"survey", "reduce", "decompose", "waited"}
    assert parts | {"tracing", "recorded steps"} == set(total)
    assert total["tracing"] == pytest.approx(sum(total[part] for part in parts))
    assert 0 < median["tracing"] <= median["step"]
    assert (median["period"], median["plain"], median["added"]) == (1500.0, 1000.0, 500.0)
    fractions = summary["cost as a fraction"]
    assert 0 < fractions["of recorded steps"] <= 1
    assert fractions["of training time"] == pytest.approx(3 * 500 / 9000, rel=1e-2)
    assert summary["cadence"] == {"every": 4, "chosen by": "every=4"}


def test_where_every_step_is_recorded_the_training_time_is_not_known(clock: Clock, tmp_path: Path) -> None:
    summary = summary_of(tmp_path / "run.zarr", clock, 5, {})
    assert not {"plain", "added"} & set(summary["cost per recorded step"])
    assert set(summary["cost as a fraction"]) == {"of recorded steps"}


def test_info_says_who_chose_the_cadence(clock: Clock, tmp_path: Path) -> None:
    short = summary_of(tmp_path / "short.zarr", clock, 5, {"budget": 0.5})["cadence"]
    assert short["every"] is None
    assert "too few steps" in short["chosen by"]
    chosen = summary_of(tmp_path / "long.zarr", clock, 40, {"budget": 0.5})["cadence"]
    assert chosen["every"] == 2
    assert "budget=0.5" in chosen["chosen by"]
    assert "every=2" in chosen["chosen by"]


@pytest.mark.parametrize(("how", "says"), [({"budget": 2.0}, "fraction"), ({"budget": 0.1, "every": 3}, "both given")])
def test_a_budget_that_cannot_be_is_refused_before_a_store_is_made(
    how: dict[str, Any], says: str, tmp_path: Path
) -> None:
    with pytest.raises(CaptureError, match=says):
        gt.record(model(), tmp_path / "run.zarr", **how)
    assert not (tmp_path / "run.zarr").exists()


def test_every_part_of_the_cost_and_of_a_calibration_is_documented(clock: Clock, tmp_path: Path) -> None:
    page = (Path(__file__).parents[1] / "docs" / "reference" / "store.md").read_text(encoding="utf-8")
    network = model()
    with gt.record(network, tmp_path / "run.zarr", budget=0.5) as recorder:
        train(network, recorder, clock, 40)
        recorder.probe("held-out", [data(0)], lambda output, batch: output.square().mean())
    run = gt.open_run(tmp_path / "run.zarr")
    parts = {*run.stream().cost_parts, *run.stream("held-out").cost_parts}
    assert [name for name in (*parts, *run.attrs["calibration"]) if f"`{name}`" not in page] == []
