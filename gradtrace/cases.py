"""Calls written down for tests, and two oracles for their gradients: autograd, and a loop that knows nothing of it."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import product
from typing import Any

import torch
from torch import Tensor

from gradtrace.calls import OpCall, Path, meta_like


def draw(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    """Standard normal numbers, the same for the same shape and seed; torch's own random state is left alone."""
    number = seed
    for size in shape:
        number = 1009 * number + size + 1
    return torch.randn(shape, dtype=dtype, generator=torch.Generator().manual_seed(number))


@dataclass(frozen=True)
class OpCase:
    """One call that an adapter claims, in float64 or complex128, with sizes that are distinct primes.

    operand: where the effective weight stands in `args` or `kwargs`: `(1,)`, `("weight",)`, or `(0, 2)` inside a list.
    sample_axis: the axis of the output along which the samples lie; None where all of it is one sample's.
    owners: the owner of every element of the output, broadcastable to it, where no single axis tells it.
    output: which output, of a call that returns several.
    rows: how many rows the factors have; None where every element of the output stands in exactly one row.
    loop: False where autograd's gradient is, by design, not the derivative (embedding's padding index).
    """

    name: str
    function: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    operand: Path = (1,)
    sample_axis: int | None = 0
    owners: Tensor | None = None
    output: int | None = None
    rows: int | None = None
    loop: bool = True

    def call(self) -> OpCall:
        """The call as an adapter sees it while the model runs: before its output and its owners are known."""
        return OpCall(self.function, self.args, self.kwargs, self.operand)

    def calls_with_owners(self) -> Iterator[OpCall]:
        """The call as an adapter sees it in the backward pass, with one layout of owners after another.

        The layouts: every index along the sample axis is a sample; samples have several indices, in no order, and one
        index belongs to nobody. With `owners`, that one alone.
        """
        result = apply(self.call(), output=self.output)
        call = replace(self.call(), output=meta_like(result))
        if self.owners is not None:
            yield replace(
                call, owners=self.owners.reshape((1,) * (result.dim() - self.owners.dim()) + self.owners.shape)
            )
            return
        if self.sample_axis is None:
            yield replace(call, owners=torch.zeros((1,) * result.dim(), dtype=torch.int64))
            return
        axis = self.sample_axis % result.dim()
        length = result.shape[axis]
        shape = [length if a == axis else 1 for a in range(result.dim())]
        yield replace(call, owners=torch.arange(length).reshape(shape))
        if length > 2:
            shared = (torch.arange(length) * 2 + 1) % (length - 2)
            shared[length // 2] = -1
            yield replace(call, owners=shared.reshape(shape))


def apply(call: OpCall, weight: Tensor | None = None, *, output: int | None = None) -> Tensor:
    """What the call returns, with `weight` in place of its effective weight; no tensor of the call is written on."""
    args, kwargs = _copied(call.args), dict(_copied(call.kwargs))
    args, kwargs = put(args, kwargs, call.operand, call.weight.clone() if weight is None else weight.clone())
    result = call.function(*args, **kwargs)
    return result if output is None else result[output]


def reference_gradient(call: OpCall, adjoint: Tensor, *, output: int | None = None) -> Tensor:
    """The gradient of the call with respect to its effective weight that `torch.func.vjp` gives for `adjoint`.

    adjoint: the output's shape. For a group's gradient, zero outside the group's rows: see `masked`.
    """
    pull = torch.func.vjp(lambda weight: apply(call, weight, output=output), call.weight)[1]
    (gradient,) = pull(adjoint)
    return gradient.to_dense() if gradient.is_sparse else gradient


def looped_gradients(call: OpCall, adjoint: Tensor, *, output: int | None = None) -> dict[int, Tensor]:
    """The gradient of every owner (-1: nobody), without autograd: a loop over weight entries and over owners.

    Central differences of fourth order, so exact up to rounding (about 1e-12) for an op that is linear in its weight.
    """
    assert call.owners is not None
    weight, h = call.weight, 1e-3
    owners = call.owners.expand(adjoint.shape)
    found = {owner: torch.zeros_like(weight) for owner in torch.unique(owners).tolist()}
    units: tuple[complex, ...] = (1, 1j) if weight.is_complex() else (1,)
    for index, unit in product(_indices(weight.shape), units):
        moved = functools.partial(_moved, call, index, unit, output)
        slope = (8 * (moved(h) - moved(-h)) - (moved(2 * h) - moved(-2 * h))) / (12 * h)
        share = (adjoint.conj() * slope).real
        for owner, gradient in found.items():
            gradient[index] += unit * share[owners == owner].sum()
    return found


def _moved(call: OpCall, index: tuple[int, ...], unit: complex, output: int | None, by: float) -> Tensor:
    weight = call.weight.clone()
    weight[index] += by * unit
    return apply(call, weight, output=output)


def masked(call: OpCall, adjoint: Tensor, keep: Tensor) -> Tensor:
    """The adjoint, zero where `keep` (one boolean per sample and a last one for nobody) does not hold for the owner."""
    assert call.owners is not None
    return torch.where(keep[call.owners], adjoint, torch.zeros((), dtype=adjoint.dtype))


def put(args: Any, kwargs: dict[str, Any], path: Path, value: Tensor) -> tuple[Any, dict[str, Any]]:
    """The arguments with `value` at `path`."""
    head, rest = path[0], path[1:]
    if isinstance(head, str):
        return args, {**kwargs, head: put(kwargs[head], {}, rest, value)[0] if rest else value}
    items = list(args)
    items[head] = put(items[head], {}, rest, value)[0] if rest else value
    return type(args)(items), kwargs


def _copied(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.clone()
    if isinstance(value, (tuple, list)):
        return type(value)(_copied(item) for item in value)
    return {key: _copied(item) for key, item in value.items()} if isinstance(value, Mapping) else value


def paths(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Iterator[tuple[Path, Tensor]]:
    """Every tensor among the arguments, with where it stands."""
    items: list[tuple[int | str, Any]] = [*enumerate(args), *kwargs.items()]
    for key, value in items:
        if isinstance(value, Tensor):
            yield (key,), value
        elif isinstance(value, (tuple, list)):
            yield from (((key, place), item) for place, item in enumerate(value) if isinstance(item, Tensor))


def _indices(shape: Sequence[int]) -> Iterator[tuple[int, ...]]:
    return product(*(range(size) for size in shape))
