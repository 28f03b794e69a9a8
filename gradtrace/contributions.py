"""What one op's adjoint contributes to the gradients of its effective weights: by factors, or by the local way."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from gradtrace.adapters import is_joint
from gradtrace.calls import Adjoint, Path, RowsCutError
from gradtrace.errors import AdapterError
from gradtrace.factors import Factors
from gradtrace.hosted import sent
from gradtrace.ops import Op, Operand
from gradtrace.pull import through_graph, through_op
from gradtrace.values import Value


@dataclass(frozen=True)
class Factored:
    """An operand's contribution as factors (rung *factored*)."""

    operand: Operand
    output: int
    factors: Factors


@dataclass(frozen=True)
class Local:
    """An operand's contribution, to be pulled back through the op for any weighting of its samples (rung *local*)."""

    operand: Operand
    output: int
    pull: Callable[[Tensor], Tensor | None]  # a factor per sample (samples + 1,) -> gradient at the effective weight
    adjoint: Tensor
    owners: Tensor

    def by_cell(self, cells: Tensor) -> dict[int, Tensor]:
        """The gradient at the effective weight, one cell at a time."""
        found = {}
        for cell in torch.unique(cells[self.owners]).tolist():
            gradient = self.pull((cells == cell).to(torch.float64))
            if gradient is not None:
                found[cell] = gradient
        return found


def contributions(op: Op, adjoints: Mapping[int, Adjoint]) -> list[Factored | Local]:
    """What the adjoints of an op's outputs contribute to every operand of it.

    One contribution per operand and output, or, of an adapter that takes them together, one per operand.
    """
    usable = not op.changed_in_place()
    found: list[Factored | Local] = []
    together = _joint(op, adjoints) if usable else {}
    for operand in op.operands:
        if operand.path in together:
            found.append(Factored(operand, min(adjoints), together[operand.path]))
            continue
        for output, adjoint in adjoints.items():
            alone = operand.adapter is not None and usable and not is_joint(operand.adapter)
            factors = _factors(op, output, operand, adjoint) if alone else None
            if factors is not None:
                found.append(Factored(operand, output, factors))
            else:
                pull = _puller(op, output, operand, adjoint)
                found.append(Local(operand, output, pull, adjoint.value, adjoint.owners))
    return found


def _joint(op: Op, adjoints: Mapping[int, Adjoint]) -> dict[Path, Factors]:
    """The factors of every operand whose adapter takes all outputs together."""
    found: dict[Path, Factors] = {}
    adapters = [o.adapter for o in op.operands if is_joint(o.adapter)]
    for adapter in {id(a): a for a in adapters}.values():
        operands = [o for o in op.operands if o.adapter is adapter]
        first = min(adjoints)
        call = op.call(operands[0], first, adjoints[first].owners)
        by_position = {op.outputs[place].position: adjoint for place, adjoint in adjoints.items()}
        with _failing_by_name(op, operands):
            try:
                found |= adapter.joint_factors(call, [o.path for o in operands], by_position)
            except RowsCutError:
                continue
    return found


def _factors(op: Op, output: int, operand: Operand, adjoint: Adjoint) -> Factors | None:
    assert operand.adapter is not None
    with _failing_by_name(op, [operand]):
        try:
            return operand.adapter.factors(op.call(operand, output, adjoint.owners), adjoint.value)
        except RowsCutError:
            return None


def weighted(op: Op, part: Factored, weights: Tensor) -> Tensor:
    """The gradient at the effective weight, each sample's share weighted; AdapterError where the factors do not fit."""
    with _failing_by_name(op, [part.operand]):
        gradient = part.factors.weighted(weights).densify()
        if tuple(gradient.shape) != part.operand.shape:
            raise ValueError(f"its factors are of shape {tuple(gradient.shape)}, the weight is {part.operand.shape}")
        return gradient


@contextmanager
def _failing_by_name(op: Op, operands: Sequence[Operand]) -> Iterator[None]:
    """An adapter that fails on a call it claimed is named."""
    try:
        yield
    except (RuntimeError, ValueError, IndexError, TypeError, KeyError, AttributeError, AssertionError) as error:
        adapter = operands[0].adapter
        names = sorted(frozenset().union(*(o.value.parameters for o in operands)))
        raise AdapterError(
            f"Adapter {adapter.name if adapter else None!r} claimed `{op.key.function}` for {', '.join(names)} and "
            f"failed on it: {type(error).__name__}: {error}. Correct its `claims`, or choose another adapter for this "
            "call."
        ) from error


def _puller(op: Op, output: int, operand: Operand, given: Adjoint) -> Callable[[Tensor], Tensor | None]:
    adjoint, owners = given.value, given.owners

    def pull(weights: Tensor) -> Tensor | None:
        kind = adjoint.real.dtype if adjoint.is_complex() else adjoint.dtype
        factor = sent(weights.to(kind)[owners], adjoint.device)
        masked = torch.where(factor == 0, torch.zeros_like(adjoint), adjoint * factor)  # a NaN times zero is a NaN
        return through_op(op, output, masked, [operand])[0]

    return pull


def storages(parts: Sequence[Factored | Local]) -> frozenset[int]:
    """The addresses of the storages that the contributions hold."""
    held = [part.factors if isinstance(part, Factored) else part for part in parts]
    return frozenset(
        value.untyped_storage().data_ptr() for one in held for value in vars(one).values() if isinstance(value, Tensor)
    )


def to_parameters(
    gradient: Tensor, edge: GradientEdge, value: Value, parameters: Mapping[str, GradientEdge]
) -> dict[str, Tensor]:
    """A gradient at an effective weight, carried on to the parameters it was made of."""
    if value.moves is not None:
        (name,) = value.parameters
        for move in reversed(value.moves):
            gradient = move.inverse(gradient)
        return {name: gradient}
    names = [name for name in sorted(value.parameters) if name in parameters]
    pulled = through_graph([edge], [gradient], [parameters[name] for name in names])
    return {name: g for name, g in zip(names, pulled, strict=True) if g is not None}
