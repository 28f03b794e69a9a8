"""One architecture of the zoo: a case, with the name that people look for and where it comes from; and tiny data."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tests.case import SAMPLES, Case, Problem, SquaredError

WORDS, LENGTH, WIDTH = 29, 5, 12


@dataclass(frozen=True)
class Architecture(Case):
    """A case of the zoo.

    title: what people call it. source: the package that it comes from. dtype: that of the model; float32 for models
    that compute something in float32 whatever dtype they have. loss_couples: the loss itself compares samples, so that
    no share of it is one group's; what is a group's is the part of its rows of the output.
    """

    title: str = ""
    source: str = ""
    dtype: torch.dtype = torch.float64
    loss_couples: bool = False


def architecture(make: Callable[[], Problem], title: str, source: str, **facts: Any) -> Architecture:
    """The architecture that `make` builds, named like that function."""
    return Architecture(make.__name__, make, title=title, source=source, **facts)


def logits(output: Any) -> Tensor:
    """What most classifiers and language models return."""
    return output.logits


def states(output: Any) -> Tensor:
    """What most bare encoders return."""
    return output.last_hidden_state


def training(model: nn.Module, read: Any = logits, **inputs: Any) -> Problem:
    """The model in training mode, dropout included, on keyword inputs."""
    return Problem(model.train(), inputs, SquaredError(read=read))


def words(length: int = LENGTH) -> Tensor:
    """Sentences without special tokens, which are the first three."""
    return torch.randint(3, WORDS, (SAMPLES, length))


def padding() -> Tensor:
    """1 where there is a word: sentences of different lengths."""
    return (torch.arange(LENGTH) < torch.tensor([5, 3, 4, 5, 2, 5, 3])[:, None]).long()


def images(size: int, channels: int = 3) -> Tensor:
    """Square images."""
    return torch.randn(SAMPLES, channels, size, size)
