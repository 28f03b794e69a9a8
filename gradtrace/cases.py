"""Calls written down for tests, and two oracles for their gradients: autograd, and a loop that knows nothing of it."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import product
from typing import Any

import torch
from torch import Tensor

from gradtrace.adapters import Adapter, NotingAdapter
from gradtrace.arguments import paths
from gradtrace.calls import Adjoint, OpCall, Path, meta_like
from gradtrace.factors import Factors


def draw(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    """Standard normal numbers, the same for the same shape and seed; torch's own random state is left alone."""
    number = seed
    for size in shape:
        number = 1009 * number + size + 1
    return torch.randn(shape, dtype=dtype, generator=torch.Generator().manual_seed(number))


@contextmanager
def seeded() -> Iterator[None]:
    """Random numbers inside are the same each time, as if at the call; torch's own random state is left alone."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        yield


@dataclass(frozen=True)
class OpCase:
    """One call that an adapter claims, in float64 or complex128, with sizes that are distinct primes.

    operand: where the effective weight stands in `args` or `kwargs`: `(1,)`, `("weight",)`, or `(0, 2)` inside a list.
    sample_axis: the axis of the output along which the samples lie; None where all of it is one sample's.
    owners: the owner of every element of the output, broadcastable to it, where no single axis tells it.
    output: which output, of a call that returns several.
    together: of a call that returns several, and whose adapter takes them together: for each of them, in order, its
    sample axis, or the owner of every element of it.
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
    together: tuple[int | Tensor, ...] | None = None

    def call(self) -> OpCall:
        """The call as an adapter sees it while the model runs: before its output and its owners are known."""
        return OpCall(self.function, self.args, self.kwargs, self.operand)

    def calls_with_owners(self) -> Iterator[OpCall]:
        """The call as an adapter sees it in the backward pass, with one layout of owners after another.

        The layouts: every index along the sample axis is a sample; samples have several indices, in no order, and one
        index belongs to nobody. With `owners`, that one alone.
        """
        result = apply(self.call(), output=self.output)
        call = replace(self.call(), output=meta_like(result), position=self.output or 0)
        for owners in layouts(result, self.sample_axis if self.owners is None else self.owners):
            yield replace(call, owners=owners)


def layouts(output: Tensor, where: int | Tensor | None) -> Iterator[Tensor]:
    """Owners of an output's elements, with as many axes; `where` is its sample axis, or says whose each element is."""
    if where is None:
        yield torch.zeros((1,) * output.dim(), dtype=torch.int64)
    elif isinstance(where, Tensor):
        yield where.reshape((1,) * (output.dim() - where.dim()) + where.shape)
    else:
        axis = where % output.dim()
        length = output.shape[axis]
        shape = [length if a == axis else 1 for a in range(output.dim())]
        yield torch.arange(length).reshape(shape)
        if length > 2:
            shared = (torch.arange(length) * 2 + 1) % (length - 2)
            shared[length // 2] = -1
            yield shared.reshape(shape)


def settings(case: OpCase, adapter: Adapter) -> Iterator[tuple[OpCall, Tensor, list[Tensor]]]:
    """The call with owners and what the adapter notes of it, a random adjoint, and groups: see `groups_of`."""
    for call in case.calls_with_owners():
        assert call.output is not None
        assert call.owners is not None
        adjoint = draw(*call.output.shape, dtype=call.output.dtype, seed=2)
        yield noted(call, adapter), adjoint, groups_of(call.owners)


def joint_settings(
    case: OpCase, adapter: Adapter
) -> Iterator[tuple[OpCall, list[Path], list[Tensor], tuple[Tensor, ...]]]:
    """The call, where its claimed weights stand, and for every output a random cotangent and the owners."""
    assert case.together is not None
    call, results = noted(case.call(), adapter), outputs(case.call())
    weights = [path for path, _ in paths(call.args, call.kwargs) if adapter.claims(replace(call, operand=path))]
    drawn = [draw(*result.shape, dtype=result.dtype, seed=5) for result in results]
    for owners in zip(*map(layouts, results, case.together), strict=False):  # the first alone, where some are told
        yield call, weights, drawn, owners


def groups_of(owners: Tensor) -> list[Tensor]:
    """Groups of samples, nobody last: nobody's rows, each sample alone, every other one, none, all."""
    number = int(owners.max()) + 1 if owners.numel() else 0
    alone = torch.eye(number + 1, dtype=torch.bool)
    every_other = torch.arange(number + 1) % 2 == 0
    return [*alone, every_other, torch.zeros_like(every_other), torch.ones_like(every_other)]


def noted(call: OpCall, adapter: Adapter) -> OpCall:
    """The call with what the adapter notes just before it."""
    if not isinstance(adapter, NotingAdapter) or not adapter.claims(call):
        return call
    with seeded():
        return replace(call, noted=adapter.note(call))


def apply(call: OpCall, weight: Tensor | None = None, *, output: int | None = None) -> Tensor:
    """What the call returns, with `weight` in place of its effective weight; no tensor of the call is written on."""
    args, kwargs = _copied(call.args), dict(_copied(call.kwargs))
    args, kwargs = put(args, kwargs, call.operand, call.weight.clone() if weight is None else weight.clone())
    with seeded():
        result = call.function(*args, **kwargs)
    return result if output is None else result[output]


def outputs(call: OpCall) -> tuple[Tensor, ...]:
    """All that the call returns."""
    result = apply(call)
    return (result,) if isinstance(result, Tensor) else tuple(result)


def delivered(call: OpCall, weights: Sequence[Path], cotangents: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """What autograd delivers at all outputs of a call and at its weights, for the outputs' cotangents.

    What it delivers at an output that another is computed from has in it what comes through that one.
    """
    args, kwargs = _copied(call.args), dict(_copied(call.kwargs))
    leaves = [call.at(path).clone().requires_grad_() for path in weights]
    for path, leaf in zip(weights, leaves, strict=True):
        args, kwargs = put(args, kwargs, path, leaf)
    with seeded(), torch.enable_grad():
        made = call.function(*args, **kwargs)
    results = [made] if isinstance(made, Tensor) else list(made)
    found = torch.autograd.grad(results, [*results, *leaves], cotangents, allow_unused=True, materialize_grads=True)
    return list(found[: len(results)]), list(found[len(results) :])


def adjoints_of(values: Sequence[Tensor], owners: Sequence[Tensor]) -> dict[int, Adjoint]:
    """The adjoints of a call's outputs, by output."""
    return {place: Adjoint(*pair) for place, pair in enumerate(zip(values, owners, strict=True))}


def reference_gradient(call: OpCall, adjoint: Tensor, *, output: int | None = None) -> Tensor:
    """The gradient of the call with respect to its effective weight that autograd gives for `adjoint`.

    What `torch.func.vjp` gives, which cannot run packed sequences. adjoint: the output's shape; for a group's gradient,
    zero outside the group's rows: see `masked`.
    """
    weight = call.weight.detach().clone().requires_grad_()
    with torch.enable_grad():
        result = apply(call, weight, output=output)
    if not result.requires_grad:
        return torch.zeros_like(call.weight)
    (gradient,) = torch.autograd.grad(result, weight, adjoint)
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


def ask_all(factors: Factors, keep: Tensor) -> None:
    """Everything that is asked of factors."""
    factors.densify()
    factors.restrict(keep).densify()
    factors.weighted(torch.full(keep.shape, 2.0, dtype=torch.float64)).densify()
    factors.by_cell(keep.long())
    factors.rows()
    factors.scale()


def reordered(case: OpCase, call: OpCall, adjoint: Tensor) -> tuple[OpCall, Tensor] | None:
    """The call with its samples backwards, where turning every axis as long as the sample axis turns its output."""
    if case.sample_axis is None or case.owners is not None or not adjoint.numel():
        return None
    length = adjoint.shape[case.sample_axis]
    args, kwargs = case.args, dict(case.kwargs)
    for path, tensor in paths(args, kwargs):
        axes = [axis for axis, size in enumerate(tensor.shape) if size == length]
        if path != case.operand:
            args, kwargs = put(args, kwargs, path, tensor.flip(axes))
    turned = replace(call, args=args, kwargs=kwargs)
    axis = case.sample_axis % adjoint.dim()
    try:
        there, here = (apply(c, output=case.output) for c in (turned, call))
    except RuntimeError:
        return None  # an argument whose order is no sample's, such as the offsets of bags
    if not torch.allclose(there, here.flip(axis), rtol=1e-12, atol=1e-12):
        return None
    assert call.owners is not None
    return replace(turned, owners=call.owners.flip(axis)), adjoint.flip(axis)


def tensors(call: OpCase | OpCall) -> list[Tensor]:
    """Every tensor among the arguments."""
    return [tensor for _, tensor in paths(call.args, call.kwargs)]


def _indices(shape: Sequence[int]) -> Iterator[tuple[int, ...]]:
    return product(*(range(size) for size in shape))
