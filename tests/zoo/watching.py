"""How a training loop is watched: by nobody, by a recorder, or by autograd.

A loop takes its networks and a `Watch`. It opens `watch.step` around what is one optimizer step, and asks `watch.mean`
for the mean of its per-sample losses just before the backward pass; else it is what it would be anywhere.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from tests.case import DIAGNOSIS

LABELS = list(DIAGNOSIS)
Gradients = dict[str, dict[str, Tensor]]  # group -> parameter -> gradient


class Watch:
    """Nobody watches: the loop as it is."""

    def step(self, groups: Sequence[str] | None = LABELS) -> AbstractContextManager[Any]:
        """Spans one optimizer step; None: its micro-batches bring their own labels."""
        return nullcontext(self)

    def batch(self, groups: Sequence[str]) -> AbstractContextManager[Any]:
        """Spans one micro-batch."""
        return nullcontext()

    def mean(self, per_sample: Tensor, *, of: int | None = None) -> Tensor:
        """The loss: the mean over the samples, or the sum over `of`."""
        return per_sample.sum() / (of or len(per_sample))


class Recorded(Watch):
    """A recorder watches."""

    def __init__(self, recorder: Any) -> None:
        self.recorder, self.running = recorder, None

    @contextmanager
    def step(self, groups: Sequence[str] | None = LABELS) -> Iterator[Any]:
        with self.recorder.step(**({} if groups is None else {"groups": groups})) as self.running:
            yield self

    def batch(self, groups: Sequence[str]) -> AbstractContextManager[Any]:
        return self.running.batch(groups=groups)


class Judged(Watch):
    """Autograd watches: the gradients of every group's share of every step's loss."""

    def __init__(self, network: nn.Module) -> None:
        self.parameters = dict(network.named_parameters())
        self.steps: list[Gradients] = []
        self.labels: Sequence[str] = LABELS

    @contextmanager
    def step(self, groups: Sequence[str] | None = LABELS) -> Iterator[Any]:
        self.steps.append({})
        self.labels = groups or ()
        yield self

    @contextmanager
    def batch(self, groups: Sequence[str]) -> Iterator[None]:
        self.labels = groups
        yield

    def mean(self, per_sample: Tensor, *, of: int | None = None) -> Tensor:
        names = {"all": None, **{f"group={label}": label for label in set(self.labels)}}
        trained = {name: p for name, p in self.parameters.items() if p.requires_grad}
        for group, label in names.items():
            mask = torch.tensor([label in (None, other) for other in self.labels])
            share = torch.where(mask, per_sample, 0).sum() / (of or len(per_sample))
            found = torch.autograd.grad(share, list(trained.values()), retain_graph=True, allow_unused=True)
            sums = self.steps[-1].setdefault(group, {})
            for name, gradient in zip(trained, found, strict=True):
                if gradient is not None:
                    sums[name] = sums.get(name, 0) + gradient
        return super().mean(per_sample, of=of)
