"""Trains the demo's networks while gradtrace watches every step."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import gradtrace as gt
from gradtrace.demo.data import Recordings, Windows, balanced_batches, split_people
from gradtrace.demo.models import Attention, FeedForward, Recurrent

PER_CELL = 10  # windows of each combination of the two groupings in a batch
PROBE = "held-out"


@dataclass(frozen=True)
class Side:
    """Windows as one network sees them: the left half (`given`) and the right half (`target`)."""

    given: Tensor
    target: Tensor
    windows: Windows


@dataclass(frozen=True)
class Task:
    """One network, the people it learns from, and the people held out."""

    name: str
    model: nn.Module
    train: Side
    held: Side


@dataclass(frozen=True)
class Outcome:
    """How one network's training went. explained: cohort -> share of the held-out variance that it predicts."""

    name: str
    weights: int
    store: Path
    steps: int
    losses: tuple[float, float]  # of the first and the last epoch
    explained: dict[str, float]


def tasks(recordings: Recordings, *, held_out: int = 2, seed: int = 0) -> list[Task]:
    """The three networks with the same people to learn from and the same people held out."""
    sides = split_people(recordings.windows, held_out=held_out, seed=seed)
    series = [Side(torch.from_numpy(side.left), torch.from_numpy(side.right), side) for side in sides]
    features = _features(recordings.features, *sides)
    _, time, regions = series[0].given.shape
    torch.manual_seed(seed)
    return [
        Task("recurrent", Recurrent(regions), *series),
        Task("attention", Attention(regions, time), *series),
        Task("feed-forward", FeedForward(features[0].given.shape[1]), *features),
    ]


def steps_in(task: Task, epochs: int) -> int:
    """How many steps `epochs` epochs take."""
    return epochs * sum(
        1 for _ in balanced_batches(task.train.windows, per_cell=PER_CELL, rng=np.random.default_rng(0))
    )


@contextmanager
def one_thread() -> Iterator[None]:
    """Torch on one thread: these tensors are tiny, and on a busy machine several threads wait for each other (25x)."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def train(task: Task, store: Path, *, epochs: int, seed: int, tick: Callable[[float], None]) -> Outcome:
    """Trains one network, recording every step and, after each epoch, the held-out people at constant weights."""
    rng = np.random.default_rng(seed)
    torch.manual_seed(seed)
    optimizer = torch.optim.Adam(task.model.parameters(), lr=2e-3)
    epoch_losses = []
    with gt.record(task.model, store, attrs={"demo": task.name, "seed": seed}) as recorder:
        for epoch in range(epochs):
            epoch_losses.append(_epoch(task, recorder, optimizer, epoch=epoch, rng=rng, tick=tick))
            recorder.probe(PROBE, held_batches(task), held_loss, groups=task.held.windows.labels)
    steps = steps_in(task, epochs)
    weights = sum(parameter.numel() for parameter in task.model.parameters())
    return Outcome(task.name, weights, store, steps, (epoch_losses[0], epoch_losses[-1]), explained(task))


def _epoch(
    task: Task,
    recorder: gt.Recorder,
    optimizer: torch.optim.Optimizer,
    *,
    epoch: int,
    rng: np.random.Generator,
    tick: Callable[[float], None],
) -> float:
    """Mean loss of one epoch."""
    task.model.train()
    losses = []
    for chosen in balanced_batches(task.train.windows, per_cell=PER_CELL, rng=rng):
        with recorder.step(groups=task.train.windows.take(chosen).labels, epoch=epoch):
            loss = F.mse_loss(task.model(task.train.given[chosen]), task.train.target[chosen])
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        tick(losses[-1])
    return float(np.mean(losses))


def held_batches(task: Task) -> Iterator[tuple[Tensor, Tensor]]:
    """The held-out windows in order, as one batch."""
    yield task.held.given, task.held.target


def held_loss(output: Tensor, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Mean squared error, as in training."""
    return F.mse_loss(output, batch[1])


def explained(task: Task) -> dict[str, float]:
    """Per cohort, the share of the held-out target's variance (about the training people's mean) that is predicted."""
    task.model.eval()
    with torch.no_grad():
        error = (task.model(task.held.given) - task.held.target).square().flatten(1).mean(1).numpy()
    variance = task.held.target.square().flatten(1).mean(1).numpy()
    cohort = next(iter(task.held.windows.labels.values()))
    return {str(c): float(1 - error[cohort == c].mean() / variance[cohort == c].mean()) for c in np.unique(cohort)}


def _features(of: Callable[[np.ndarray], np.ndarray], train: Windows, held: Windows) -> tuple[Side, Side]:
    """The training and the held-out side for a network without time, from features such as connectivity."""
    given = _standardised(of(train.left), of(held.left))
    target = _standardised(of(train.right), of(held.right))
    return Side(given[0], target[0], train), Side(given[1], target[1], held)


def _standardised(train: np.ndarray, held: np.ndarray) -> tuple[Tensor, Tensor]:
    """Both about the training people's mean, in units of their standard deviation over all features."""
    mean, scale = train.mean(axis=0), train.std()
    return torch.from_numpy((train - mean) / scale), torch.from_numpy((held - mean) / scale)
