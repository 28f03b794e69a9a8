"""Ways of training measured in turn, each step with what it put off.

A turn is a block of consecutive steps and then `finish`, which returns when everything that the steps put off is done:
spectra that are still to be decomposed, rows that are still to be written. Its time divided by its steps is the cost
of a step. So work may go on behind the steps of its own way, as in training; what has not been hidden by the end is
waited for, and none of it runs into the turn of another way. (Single steps in turn would not do: one way's work in the
background would slow down the next way.) A block ends in a commit of the store, which training has every 64 steps or
5 seconds: short blocks overstate that part.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

MOST_STEPS = 256  # of a block
FEWEST_STEPS = 2


class Cost(NamedTuple):
    """Seconds on the wall, and of processors (all threads of this process)."""

    wall: float
    cpu: float


Clock = Callable[[], Cost]


@dataclass(frozen=True)
class Lane:
    """One way of training, under way.

    warm: one step of the warm-up. period: after how many steps the work repeats; blocks are multiples of it.
    fewest: steps of a block.
    """

    step: Callable[[], None]
    finish: Callable[[], None] = lambda: None
    warm: Callable[[], None] | None = None
    warm_ups: int = 1
    period: int = 1
    fewest: int = FEWEST_STEPS


@dataclass
class Timings:
    """Costs of a step of one way: the mean of its first steps, and one number per round."""

    steps: int
    first: Cost
    rounds: list[Cost] = field(default_factory=list)


def clock(device: str) -> Clock:
    """A clock that waits for the device first."""

    def now() -> Cost:
        if device == "cuda":
            torch.cuda.synchronize()
        return Cost(time.perf_counter(), time.process_time())

    return now


def interleaved(
    lanes: Mapping[str, Lane], *, repeats: int, seconds: float, now: Clock, tell: Callable[[str], None] = lambda _: None
) -> dict[str, Timings]:
    """What every lane's steps cost, in rounds in which each has one turn; every round begins with another lane.

    At most `repeats` rounds, as many as fit into `seconds` (the warm-up is not counted), and at least one.
    """
    turn = min(1.0, seconds / (len(lanes) * repeats))
    found = {}
    for name, lane in lanes.items():
        tell(f"warm-up: {name}")
        found[name] = _warmed(lane, turn, now)
    began, names = now().wall, list(lanes)
    for count in range(repeats):
        tell(f"round {count + 1} of {repeats}")
        first = count % len(names)
        for name in names[first:] + names[:first]:
            found[name].rounds.append(block(lanes[name].step, lanes[name].finish, found[name].steps, now))
        spent = now().wall - began
        if spent + spent / (count + 1) > seconds:
            break
    return found


def block(step: Callable[[], None], finish: Callable[[], None], steps: int, now: Clock) -> Cost:
    """The cost of one of `steps` steps, with its part of what they put off."""
    gc.collect()  # nobody pays for what another way left behind
    before = now()
    for _ in range(steps):
        step()
    finish()
    after = now()
    return Cost((after.wall - before.wall) / steps, (after.cpu - before.cpu) / steps)


def _warmed(lane: Lane, turn: float, now: Clock) -> Timings:
    """The first steps' mean cost, and how many steps make a block of about `turn` seconds."""
    first = block(lane.warm or lane.step, lane.finish, lane.warm_ups, now)
    one = block(lane.warm or lane.step, lane.finish, 1, now).wall
    wanted = min(MOST_STEPS, max(lane.fewest, round(turn / max(one, 1e-9))))
    return Timings(-(-wanted // lane.period) * lane.period, first)
