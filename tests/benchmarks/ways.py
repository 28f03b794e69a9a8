"""The ways a model is trained in: untraced, traced, and with AutoSpec's hooks."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import gradtrace as gt
from tests.benchmarks.autospec import AutoSpec, possible
from tests.benchmarks.labels import groups
from tests.benchmarks.models import Problem
from tests.benchmarks.rounds import Lane

GRADIENT = ("gradient",)
ALL = ("gradient", "activation", "adjoint")
FIRST = 4  # recorded steps in which owners are probed: the warm-up
FEWEST_BEHIND = 8  # steps of a block: the last two hide behind nothing
# Hundreds of steps are made on one batch: were it fitted, adjoints would vanish, and denormal numbers are slow.
LEARNING_RATE = 1e-5


@dataclass(frozen=True)
class Way:
    """How a step is traced: kinds (none: not at all), every how many steps, and the labels of the samples.

    period: after how many steps the work repeats. behind: decomposed on a thread behind the training.
    """

    kinds: tuple[str, ...] = ()
    every: int = 1
    groupings: int = 1
    labels: int = 2
    period: int = 1
    autospec: bool = False
    behind: bool = False


UNTRACED = "untraced"
WAYS = {
    UNTRACED: Way(),
    "gradient": Way(GRADIENT),
    "all kinds": Way(ALL),
    "every=10": Way(ALL, every=10, period=10),
    "four groupings": Way(ALL, groupings=4),
    "unrecorded": Way(ALL, every=sys.maxsize),  # all steps but the first
    "autospec": Way(GRADIENT, autospec=True),
    "behind": Way(ALL, behind=True),
}
USUAL = [name for name, way in WAYS.items() if not way.behind]  # that one pays where cores are idle: see --threads


@contextmanager
def opened(problem: Problem, ways: Mapping[str, Way], folder: Path) -> Iterator[dict[str, Lane]]:
    """A lane for each way that the model allows, each with a copy of the model and an optimizer of its own.

    folder: where the stores are written.
    """
    with ExitStack() as stack:
        lanes = {}
        for place, (name, way) in enumerate(ways.items()):
            if not way.autospec or possible(problem[0]):
                lanes[name] = stack.enter_context(_lane(problem, way, folder / f"{place}.zarr"))
        yield lanes


@contextmanager
def _lane(problem: Problem, way: Way, path: Path) -> Iterator[Lane]:
    model, batch, loss = copy.deepcopy(problem[0]), problem[1], problem[2]
    training = Training(model, batch, loss)
    labels = groups(len(batch), groupings=way.groupings, labels=way.labels)
    if way.autospec:
        with closing(AutoSpec(model)) as watching:
            yield Lane(lambda: training.step(lambda: watching.spectra(labels)), fewest=1)
    elif not way.kinds:
        yield Lane(training.step, warm_ups=FIRST)
    else:
        with gt.record(model, path, kinds=way.kinds, every=way.every, behind=way.behind or None) as recorder:
            lane = recorded_lane(recorder, training, labels, way.period)
            yield replace(lane, fewest=FEWEST_BEHIND) if way.behind else lane


class Training:
    """Steps of Adam on one batch."""

    def __init__(self, model: nn.Module, batch: Tensor, loss: Callable[[Any], Tensor]) -> None:
        self._model, self._batch, self._loss = model, batch, loss
        self._optimizer = torch.optim.Adam(model.parameters(), lr=LEARNING_RATE)

    def backward(self) -> None:
        """The forward pass and the backward pass."""
        self._loss(self._model(self._batch)).backward()

    def update(self) -> None:
        """What follows the backward pass."""
        self._optimizer.step()
        self._optimizer.zero_grad()

    def step(self, between: Callable[[], object] = lambda: None) -> None:
        """One training step; `between` is called after the backward pass."""
        self.backward()
        between()
        self.update()


def recorded_lane(recorder: gt.Recorder, training: Training, labels: Mapping[str, Any], period: int) -> Lane:
    """The lane of a recorder. Its warm-up passes over the steps that are not recorded: they teach it nothing."""

    def step() -> None:
        with recorder.step(groups=labels):
            training.backward()
        training.update()

    def warm() -> None:
        step()
        for _ in range(period - 1):
            with recorder.step(groups=labels):
                pass

    return Lane(step, recorder.flush, warm, FIRST, period)
