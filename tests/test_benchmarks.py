"""The benchmark measures what it says: AutoSpec's way is right, work put off is counted, ratios are of one round."""

from __future__ import annotations

import itertools
import json
import math
import platform
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from torch import Tensor, nn

import gradtrace as gt
from tests.benchmarks import __main__ as command
from tests.benchmarks import rounds
from tests.benchmarks.autospec import AutoSpec, possible
from tests.benchmarks.chart import draw
from tests.benchmarks.environment import environment, headline
from tests.benchmarks.labels import groups
from tests.benchmarks.models import LARGE, MODELS, Problem, problem
from tests.benchmarks.report import tables
from tests.benchmarks.results import Result, measured, results
from tests.benchmarks.rounds import Cost, Lane, clock, interleaved
from tests.benchmarks.scaling import scaled, scaling_table
from tests.benchmarks.targets import targets
from tests.benchmarks.ways import UNTRACED, WAYS, Way, opened

SAMPLES = 7


@pytest.fixture(autouse=True)
def _no_collections(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a whole test session has made takes long to look through, and nothing here asserts a time."""
    monkeypatch.setattr(rounds.gc, "collect", lambda: 0)


class Reused(nn.Module):
    """A layer that is used twice, on sequences."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(5, 5)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.layer(torch.tanh(self.layer(x)))
        return result


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(11, 13), nn.Tanh(), nn.Linear(13, 3))


def cnn() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1, stride=2), nn.Tanh(), nn.Conv2d(4, 6, 3, groups=2, dilation=2), nn.Flatten(),
        nn.Linear(6, 3),
    )  # fmt: skip


WATCHED: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "mlp": (mlp, (11,)),
    "cnn": (cnn, (2, 9, 9)),
    "conv1d": (lambda: nn.Sequential(nn.Conv1d(3, 5, 3), nn.Flatten()), (3, 11)),
    "conv3d": (lambda: nn.Sequential(nn.Conv3d(2, 5, 3, padding=1), nn.Flatten()), (2, 3, 4, 5)),
    "reused": (Reused, (3, 5)),
}


@pytest.mark.parametrize("name", WATCHED)
def test_autospecs_way_gives_the_same_singular_values(name: str) -> None:
    torch.manual_seed(0)
    build, shape = WATCHED[name]
    model, inputs, labels = build().double(), torch.randn(SAMPLES, *shape, dtype=torch.float64), groups(SAMPLES)

    def loss(output: Tensor) -> Tensor:
        return output.square().mean()

    tree = gt.spectra(model, inputs, loss, groups=labels, kinds=("gradient",), keep=None)
    watching = AutoSpec(model)
    loss(model(inputs)).backward()
    found = watching.spectra(labels)
    watching.close()
    assert found
    for parameter, of_group in found.items():
        for group, values in of_group.items():
            expected = tree[parameter]["gradient"].sel(group=group).to_numpy()
            largest = values.max().item()
            np.testing.assert_allclose(values.numpy(), expected[: len(values)], rtol=1e-9, atol=1e-12 * largest)


def test_autospecs_hooks_are_taken_off() -> None:
    model = mlp()
    AutoSpec(model).close()
    assert not any(module._forward_hooks for module in model.modules())


def test_autospecs_way_is_not_defined_for_recurrent_modules() -> None:
    assert not possible(MODELS["lstm"]()[0])
    assert possible(mlp())


@dataclass
class Time:
    """A clock that only what is measured moves on."""

    at: float = 0.0
    owed: float = 0.0
    speed: float = 1.0

    def now(self) -> Cost:
        return Cost(self.at, self.at / 2)

    def lane(self, cost: float, *, put_off: float = 0.0, **more: Any) -> Lane:
        def step() -> None:
            self.at += cost * self.speed
            self.owed += put_off

        def finish() -> None:
            self.at += self.owed * self.speed
            self.owed = 0.0

        return Lane(step, finish, **more)


def test_what_was_put_off_is_counted() -> None:
    time = Time()
    lanes = {UNTRACED: time.lane(1.0), "lazy": time.lane(1.5, put_off=2.5)}
    found = results(interleaved(lanes, repeats=3, seconds=math.inf, now=time.now))
    assert found["lazy"].wall == pytest.approx(4.0)
    assert found["lazy"].cpu == pytest.approx(4.0)
    assert found["lazy"].first_steps == pytest.approx(4.0)


def test_ratios_are_to_the_untraced_step_of_the_same_round() -> None:
    time = Time()
    speeds = iter([1.0, 8.0, 3.0])
    lanes = {UNTRACED: time.lane(1.0), "slow": time.lane(2.0)}

    def tell(what: str) -> None:
        if what.startswith("round"):
            time.speed = next(speeds)  # the machine is noisy

    found = results(interleaved(lanes, repeats=3, seconds=math.inf, now=time.now, tell=tell))
    assert (found["slow"].low, found["slow"].wall, found["slow"].high) == pytest.approx((2.0, 2.0, 2.0))
    assert found["slow"].seconds == pytest.approx(6.0)
    assert found[UNTRACED].high > found[UNTRACED].low  # its spread says how noisy it was


def test_every_round_has_every_way_and_begins_with_another() -> None:
    time, turns = Time(), []

    def lane(name: str) -> Lane:
        one = time.lane(1.0)
        return Lane(one.step, lambda: turns.append(name))

    interleaved({name: lane(name) for name in "abc"}, repeats=4, seconds=math.inf, now=time.now)
    assert "".join(turns[6:]) == "abc" + "bca" + "cab" + "abc"  # after two turns each of warm-up


def test_blocks_are_whole_periods() -> None:
    time = Time()
    found = interleaved({"a": time.lane(0.007, period=10)}, repeats=1, seconds=0.2, now=time.now)
    assert found["a"].steps == 30  # 29 steps fill the turn


def test_rounds_end_with_the_budget() -> None:
    time = Time()
    assert len(interleaved({"a": time.lane(1.0)}, repeats=9, seconds=6.5, now=time.now)["a"].rounds) == 3
    assert len(interleaved({"a": time.lane(1.0)}, repeats=9, seconds=0.1, now=time.now)["a"].rounds) == 1


def tiny() -> Problem:
    torch.manual_seed(0)
    return mlp(), torch.randn(8, 11), lambda output: output.square().mean()


def test_the_ways_record_the_steps_that_they_say(tmp_path: Path) -> None:
    ways = {name: WAYS[name] for name in ("gradient", "every=10", "unrecorded", "four groupings")}
    with opened(tiny(), ways, tmp_path) as lanes:
        for lane in lanes.values():
            assert lane.warm is not None
            for _ in range(lane.warm_ups):
                lane.warm()
            for _ in range(lane.period):
                lane.step()
    trees = {name: gt.open_run(tmp_path / f"{place}.zarr").tree for place, name in enumerate(ways)}
    assert trees["gradient"]["0.weight"]["step"].to_numpy().tolist() == [0, 1, 2, 3, 4]
    assert trees["every=10"]["0.weight"]["step"].to_numpy().tolist() == [0, 10, 20, 30, 40]
    assert trees["unrecorded"]["0.weight"]["step"].to_numpy().tolist() == [0]
    assert trees["four groupings"]["0.weight"].sizes["group"] == 9
    assert "activation" not in trees["gradient"]["0.weight"]


def test_a_measurement_has_every_way_and_leaves_the_model_alone() -> None:
    one = tiny()
    before = [parameter.clone() for parameter in one[0].parameters()]
    found = measured(one, repeats=2, seconds=0.01, now=clock("cpu"))
    assert list(found) == list(WAYS)
    assert found[UNTRACED].wall == 1.0
    assert found["every=10"].steps % 10 == 0
    assert all(torch.equal(p, b) for p, b in zip(one[0].parameters(), before, strict=True))


@pytest.mark.parametrize("n_samples", [8, 16, 32, 64])
def test_groupings_do_not_tell_each_other(n_samples: int) -> None:
    found = groups(n_samples, groupings=4)
    assert found["grouping0"][:4] == ["label0", "label1", "label0", "label1"]
    for one, other in itertools.combinations(found.values(), 2):
        counts = [list(zip(one, other, strict=True)).count(pair) for pair in itertools.product(set(one), set(other))]
        assert counts == [n_samples // 4] * 4


WEIGHTS = sum(a * b for a, b in itertools.pairwise((3, 32, 64, 64, 128, 128, 256, 256, 512, 512)))
# parameters, samples, output: what the documents state
STATED = {
    "mlp": (1378 * 512 + 512 + 512 * 256 + 256 + 256 * 2 + 2, 64, (64, 2)),
    "lstm": (4 * 200 * (53 + 200 + 2) + 200 * 2 + 2, 32, (32, 2)),
    "transformer": (54 * 256 + 4 * (12 * 256**2 + 13 * 256) + 257 * 2, 32, (32, 150, 2)),
    "cnn2d": (9 * WEIGHTS + 2 * (32 + 2 * (64 + 128 + 256 + 512)) + 513 * 10, 32, (32, 10)),
    "cnn3d": (28 * 16 + (16 * 27 + 1) * 32 + (32 * 27 + 1) * 64 + 65 * 2, 8, (8, 2)),
    "gpt": (2 * 8192 * 384 + 256 * 384 + 6 * (12 * 384**2 + 13 * 384) + 2 * 384, 8, (8, 256, 8192)),
    "gpt2": (124_439_808, 8, (8, 1024, 50257)),
    "resnet50": (25_557_032, 32, (32, 1000)),
}


@pytest.mark.parametrize("name", [*MODELS, *LARGE])
def test_models_are_as_stated(name: str) -> None:
    model, batch, loss = problem(name, "meta")
    n_parameters, n_samples, shape = STATED[name]
    assert len(batch) == n_samples
    assert sum(p.numel() for p in model.parameters()) == n_parameters
    if name != "gpt2":  # it reads values, and meta tensors have none
        output = model(batch)
        assert output.shape == shape
        assert loss(output).shape == ()


def test_the_late_layers_of_cnn2d_have_few_positions() -> None:
    model, batch, _ = problem("cnn2d", "meta")
    convolutions = [module for module in model.modules() if isinstance(module, nn.Conv2d)]
    shapes: list[torch.Size] = []
    for module in convolutions:
        module.register_forward_hook(lambda _, __, output: shapes.append(output.shape))
    model(batch)
    assert [c.out_channels for c in convolutions] == [32, 64, 64, 128, 128, 256, 256, 512, 512]
    assert (shapes[0][2:], shapes[-1][2:]) == ((32, 32), (2, 2))


def result(wall: float) -> Result:
    return Result(wall, 0.9 * wall, 0.95 * wall, 1.1 * wall, 0.01 * wall, 3.21, 9, 64)


def found_results() -> dict[str, dict[str, Result]]:
    by_way = {UNTRACED: result(1.0), "gradient": result(1.4), "all kinds": result(2.1), "every=10": result(1.08)}
    return {"mlp": {**by_way, "autospec": result(94.0)}, "lstm": by_way}


def test_tables_mark_what_misses_its_aim_and_what_is_not_defined() -> None:
    text = tables(found_results(), [UNTRACED, "gradient", "all kinds", "every=10", "autospec"], targets("cpu"))
    assert "| mlp | 10 ±8 % | 1.40 | 2.10 * | 1.08 | 94 | 3.21 |" in text
    assert "| lstm | 10 ±8 % | 1.40 | 2.10 * | 1.08 | – | 3.21 |" in text
    assert "| mlp | 1.26 | 1.89 | 0.97 | 84.6 |" in text


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_the_picture_is_written(tmp_path: Path, device: str) -> None:
    draw(found_results(), tmp_path / "cost.png", targets(device), note="2 cores")
    assert (tmp_path / "cost.png").read_bytes().startswith(b"\x89PNG")


def test_the_environment_names_nobody() -> None:
    assert platform.node() not in json.dumps(environment("cpu"))
    assert torch.__version__ in headline("cpu")


def test_scaling_has_a_table_for_every_axis() -> None:
    seen: list[int] = []

    def measure(one: Problem, ways: Any) -> dict[str, Result]:
        assert all(isinstance(way, Way) for way in ways.values())
        seen.append(len(one[1]))
        return {UNTRACED: result(1.0), **{name: result(2.0) for name in ways}}

    texts = [scaling_table(axis, found) for axis, found in scaled(measure, "meta")]
    assert len(texts) == 5
    assert "| 16 | 10 | 2.00 | 2.00 | 1.80 | 1.80 |" in texts[0]
    assert {16, 64, 256} <= set(seen)


def test_the_command_prints_tables_and_keeps_every_number(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "problem", lambda name, device: tiny())
    arguments = ["--model", "mlp", "--way", "gradient", "--repeats", "1", "--seconds", "0.01", "--device", "cpu"]
    files = ["--json", str(tmp_path / "found.json"), "--plot", str(tmp_path / "found.png")]
    ran = CliRunner().invoke(command.main, arguments + files, catch_exceptions=False)
    assert ran.exit_code == 0
    assert "| model | untraced, ms | gradient |" in ran.stdout
    assert "round 1 of 1" in ran.stderr
    kept = json.loads((tmp_path / "found.json").read_text())
    assert set(kept["models"]["mlp"]) == {UNTRACED, "gradient"}
    assert kept["environment"]["cores"] >= 1
    assert (tmp_path / "found.png").exists()
