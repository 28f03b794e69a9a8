"""What one op's adjoint contributes to the gradients of its effective weights: by factors, or by the local way."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from gradtrace.calls import RowsCutError
from gradtrace.errors import AdapterError
from gradtrace.factors import Factors
from gradtrace.ops import Op, Operand
from gradtrace.pull import through_graph, through_op
from gradtrace.values import Value


@dataclass(frozen=True)
class Factored:
    """An operand's contribution as factors (rung *factored*)."""

    operand: Operand
    factors: Factors


@dataclass(frozen=True)
class Local:
    """An operand's contribution, to be pulled back through the op for any weighting of its samples (rung *local*)."""

    operand: Operand
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


def contributions(op: Op, output: int, adjoint: Tensor, owners: Tensor) -> list[Factored | Local]:
    """One contribution per operand of `op`, from the adjoint of one of its outputs.

    owners: the sample of every element of the output, broadcastable to it; -1 where none is known.
    """
    usable = not op.changed_in_place()
    found: list[Factored | Local] = []
    for operand in op.operands:
        factors = _factors(op, output, operand, adjoint, owners) if operand.adapter and usable else None
        if factors is not None:
            found.append(Factored(operand, factors))
        else:
            found.append(Local(operand, _puller(op, output, operand, adjoint, owners), adjoint, owners))
    return found


def _factors(op: Op, output: int, operand: Operand, adjoint: Tensor, owners: Tensor) -> Factors | None:
    assert operand.adapter is not None
    try:
        return operand.adapter.factors(op.call(operand, output, owners), adjoint)
    except RowsCutError:
        return None
    except (RuntimeError, ValueError, IndexError, TypeError, AssertionError) as error:
        raise AdapterError(
            f"Adapter {operand.adapter.name!r} claimed `{op.key.function}` for "
            f"{', '.join(sorted(operand.value.parameters))} and failed on it: {type(error).__name__}: {error}. "
            "Correct its `claims`, or choose another adapter for this call."
        ) from error


def _puller(
    op: Op, output: int, operand: Operand, adjoint: Tensor, owners: Tensor
) -> Callable[[Tensor], Tensor | None]:
    def pull(weights: Tensor) -> Tensor | None:
        kind = adjoint.real.dtype if adjoint.is_complex() else adjoint.dtype
        factor = weights.to(device=adjoint.device, dtype=kind)[owners]
        masked = torch.where(factor == 0, torch.zeros_like(adjoint), adjoint * factor)  # a NaN times zero is a NaN
        return through_op(op, output, masked, [operand])[0]

    return pull


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
