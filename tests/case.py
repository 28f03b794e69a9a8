"""One model with its data and its loss: what the tests of whole models run over."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

# Distinct primes, so that swapped axes fail.
SAMPLES, TIME, FEATURES, HIDDEN, OUTPUT = 7, 5, 11, 13, 3

DIAGNOSIS = ("SZ", "HC", "SZ", "SZ", "HC", "HC", "HC")
SITE = (0, 0, 1, 2, 1, 0, 2)


def labels() -> dict[str, Any]:
    """Two groupings of the samples: strings in a list, integers in a tensor."""
    return {"diagnosis": list(DIAGNOSIS), "site": torch.tensor(SITE)}


@dataclass(frozen=True)
class SquaredError:
    """Per-sample mean squared distance of an output to a fixed target.

    `samples` are the batch's samples by their number in the whole batch: a batch of one keeps its own target.
    """

    sample_dim: int = 0
    samples: tuple[int, ...] = tuple(range(SAMPLES))
    read: Callable[[Any], Tensor] | None = None

    def __call__(self, output: Any) -> Tensor:
        value = output if self.read is None else self.read(output)
        rows = value.movedim(self.sample_dim, 0).reshape(len(self.samples), -1)
        real = rows.real if rows.is_complex() else rows
        number = torch.tensor(self.samples, dtype=real.dtype)[:, None]
        target = torch.cos(1.3 * number + 0.71 * torch.arange(rows.shape[1], dtype=real.dtype))
        return (rows - target).abs().square().mean(1)


@dataclass(frozen=True)
class Problem:
    """A model, a batch, a loss and the labels: the arguments of `gradtrace.spectra`, and what the oracles need.

    per_sample: output -> one loss per sample; the loss is their mean.
    """

    model: nn.Module
    inputs: Any
    per_sample: Any = field(default_factory=SquaredError)
    options: Mapping[str, Any] = field(default_factory=dict)
    labels: Mapping[str, Any] = field(default_factory=labels)
    input_dim: int = 0
    loss: Callable[[Any], Tensor] | None = None

    def loss_fn(self, output: Any) -> Tensor:
        """The mean loss over the samples."""
        return self.per_sample(output).mean() if self.loss is None else self.loss(output)

    def of(self, samples: Sequence[int]) -> Problem:
        """The same problem with only some of the samples, for cases that permit a `loop`."""
        index = torch.tensor(samples)
        labels = {
            name: given[index] if isinstance(given, Tensor) else [given[n] for n in samples]
            for name, given in self.labels.items()
        }
        inputs = _pick(self.inputs, index, self.input_dim)
        return replace(self, inputs=inputs, labels=labels, per_sample=replace(self.per_sample, samples=tuple(samples)))


@dataclass(frozen=True)
class Case:
    """A way to build one problem, always the same for one dtype.

    coupled: samples see each other, so that a group's rows and its share of the loss have different gradients.
    opaque: an op hides, or mixes the samples' rows for good; masked backward passes are then a fair way to measure.
    loop: a batch of one sample gives that sample's part of the result.
    ungrouped: parameters for which no path from the output to the loss exists; they may be left ungrouped.
    """

    name: str
    make: Callable[[], Problem]
    coupled: bool = False
    opaque: bool = False
    loop: bool = True
    ungrouped: tuple[str, ...] = ()

    def build(self, dtype: torch.dtype = torch.float64, *, draw: int = 0) -> Problem:
        """A fresh problem; the global random state is left alone. `draw` numbers other weights and data."""
        with torch.random.fork_rng(devices=[]), default_dtype(dtype):
            torch.manual_seed(zlib.crc32(self.name.encode()) + draw)
            return self.make()

    def __str__(self) -> str:
        return self.name


def case(**facts: Any) -> Callable[[Callable[[], Problem]], Case]:
    """Decorator: a function that makes a problem becomes the case of that name."""
    return lambda make: Case(make.__name__, make, **facts)


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """The default floating dtype, for a while."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def call(model: nn.Module, inputs: Any) -> Any:
    """The model's output for inputs in any of the forms that gradtrace takes."""
    if isinstance(inputs, tuple):
        return model(*inputs)
    if isinstance(inputs, Mapping):
        return model(**inputs)
    if isinstance(inputs, Tensor):
        return model(inputs)
    return model(*inputs.args, **inputs.kwargs)


def _pick(inputs: Any, samples: Tensor, dim: int) -> Any:
    if isinstance(inputs, Tensor):
        return inputs.index_select(dim, samples)
    if isinstance(inputs, tuple):
        return tuple(_pick(value, samples, dim) for value in inputs)
    if isinstance(inputs, Mapping):
        return {key: _pick(value, samples, dim) for key, value in inputs.items()}
    return type(inputs)(_pick(inputs.args, samples, dim), _pick(inputs.kwargs, samples, dim))


class Apply(nn.Module):
    """Modules and parameters by name, and a function of them and the inputs: a model in one expression."""

    def __init__(self, function: Callable[..., Any], **parts: nn.Module | nn.Parameter | Tensor) -> None:
        super().__init__()
        self.function = function
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(self, *args, **kwargs)


class Hidden(torch.autograd.Function):
    """Nobody sees what is done with the weight: rung global."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return x @ weight.T

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        x, weight = ctx.saved_tensors
        return grad @ weight, grad.T @ x
