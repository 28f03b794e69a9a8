"""What was measured, as ratios to the untraced step of the same rounds."""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.benchmarks.models import Problem
from tests.benchmarks.rounds import Clock, Cost, Timings, interleaved
from tests.benchmarks.ways import UNTRACED, WAYS, Way, opened


@dataclass(frozen=True)
class Result:
    """One way of training one model.

    wall, cpu: medians over rounds of the ratio to the untraced step of the same round. low, high: quartiles of the
    former. seconds: median time of a step. first_steps: mean of the first steps, to the median untraced step; in them
    owners are probed. rounds, steps: how many, and the steps of a way's turn in each.
    """

    wall: float
    cpu: float
    low: float
    high: float
    seconds: float
    first_steps: float
    rounds: int
    steps: int


Results = dict[str, Result]


def results(timings: Mapping[str, Timings]) -> Results:
    """Way -> its result; the untraced one's quartiles are those of its time, to the median."""
    untraced = timings[UNTRACED].rounds
    usual = statistics.median(cost.wall for cost in untraced)
    found = {}
    for name, one in timings.items():
        wall = [cost.wall for cost in one.rounds]
        ratios = _ratios(one.rounds, untraced, "wall")
        low, high = quartiles([seconds / usual for seconds in wall] if name == UNTRACED else ratios)
        found[name] = Result(
            wall=statistics.median(ratios),
            cpu=statistics.median(_ratios(one.rounds, untraced, "cpu")),
            low=low,
            high=high,
            seconds=statistics.median(wall),
            first_steps=one.first.wall / usual,
            rounds=len(one.rounds),
            steps=one.steps,
        )
    return found


def measured(
    problem: Problem,
    *,
    ways: Mapping[str, Way] = WAYS,
    repeats: int,
    seconds: float,
    now: Clock,
    tell: Callable[[str], None] = lambda _: None,
) -> Results:
    """The results of every way that the model allows; the stores are written to a temporary directory."""
    with tempfile.TemporaryDirectory() as folder, opened(problem, {UNTRACED: Way(), **ways}, Path(folder)) as lanes:
        return results(interleaved(lanes, repeats=repeats, seconds=seconds, now=now, tell=tell))


def quartiles(values: Sequence[float]) -> tuple[float, float]:
    """The lower and the upper one."""
    if len(values) < 2:
        return values[0], values[0]
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, high


def _ratios(costs: Sequence[Cost], untraced: Sequence[Cost], field: str) -> list[float]:
    return [getattr(one, field) / getattr(other, field) for one, other in zip(costs, untraced, strict=True)]
