"""Small studies for tests of `examine`, made of a model and, where it matters, of other functions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from gradtrace.checkup import ParameterCheck, examine
from gradtrace.study import Study

SAMPLES, FEATURES, HIDDEN, OUT = 7, 5, 3, 2
SITES = ["Bern", "Oslo", "Bern", "Bern", "Oslo", "Oslo", "Bern"]


def study_of(make: Callable[[], Any], **functions: Any) -> Study:
    """A study of that model on normal noise, with the mean squared output as its loss."""
    plain: dict[str, Any] = {
        "batches": lambda: [(torch.randn(SAMPLES, FEATURES), SITES)] * 2,
        "inputs": lambda batch: batch[0],
        "loss": lambda output, batch: (output - 1).square().mean(),
        "groups": lambda batch: {"site": batch[1]},
    }
    return Study(target="trial.py", name="trial", model=make, optimizer=None, **{**plain, **functions})


def checked(make: Callable[[], Any], *, options: Any = None, **functions: Any) -> dict[str, ParameterCheck]:
    """The rows of a model by the parameters' names."""
    found = examine(study_of(make, **functions), **(options or {}))
    return {row.parameter: row for row in found.parameters}


def perceptron() -> nn.Module:
    return nn.Sequential(nn.Linear(FEATURES, HIDDEN), nn.Tanh(), nn.Linear(HIDDEN, OUT))


class Around(nn.Module):
    """An encoder, a part to be looked at, and a head."""

    def __init__(
        self, part: nn.Module | None = None, call: Callable[[nn.Module, Tensor], Tensor] | None = None
    ) -> None:
        super().__init__()
        self.encoder, self.head = nn.Linear(FEATURES, HIDDEN), nn.Linear(HIDDEN, OUT)
        self.part = part or nn.Module()
        self.call = call

    def forward(self, x: Tensor) -> Any:
        hidden = self.encoder(x).tanh()
        return self.head(self.call(self.part, hidden) if self.call else self.part(hidden))


def weighted(call: Callable[[Tensor, Tensor], Tensor]) -> Callable[[], nn.Module]:
    """A model whose part is `call(hidden, part.weight)`."""

    def make() -> nn.Module:
        part = nn.Module()
        part.weight = nn.Parameter(torch.randn(HIDDEN, HIDDEN))
        return Around(part, lambda held, hidden: call(hidden, held.weight))

    return make
