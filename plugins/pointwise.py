"""Ops that multiply a weight by something of their own, element by element: addcmul, prelu."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from gradtrace.calls import OpCall, cast_as_used, is_dense
from gradtrace.factors import ElementFactors, Factors

_OPERANDS = {
    "addcmul": ("input", "tensor1", "tensor2"),
    "addcmul_": ("input", "tensor1", "tensor2"),  # writes on the first alone, which is a summand
    "prelu": ("input", "weight"),
}


class PointwiseAdapter:
    """Factors of `addcmul`, wherever the weight stands in it, and of the slopes of `prelu`."""

    name = "pointwise"
    ops = "addcmul, prelu"

    def claims(self, call: OpCall) -> bool:
        operands = _operands(call)
        place = _place(call)
        if place is None or (call.name, place) == ("prelu", 0) or not _is_number(call.kwargs.get("value", 1)):
            return False
        if not all(map(is_dense, operands)):
            return False
        return call.weight.is_complex() or not any(isinstance(o, Tensor) and o.is_complex() for o in operands)

    def factors(self, call: OpCall, adjoint: Tensor) -> Factors:
        """The adjoint, and what the weight is multiplied by, broadcast as the op broadcasts it."""
        owners, activation = call.owners, _activation(call)
        assert owners is not None
        if activation is not None:
            activation = cast_as_used(activation, adjoint)
        if call.name == "prelu" and call.weight.numel() > 1:  # one per channel, moved last so that it broadcasts
            adjoint, owners, activation = (t.movedim(1, -1) for t in (adjoint, owners, activation))
        return ElementFactors(activation, adjoint, owners, tuple(call.weight.shape))


def _activation(call: OpCall) -> Tensor | None:
    """What the weight is multiplied by; None where it is only added."""
    operands, place = _operands(call), _place(call)
    assert place is not None
    if call.name == "prelu":
        return operands[0].clamp(max=0)
    return None if place == 0 else call.kwargs.get("value", 1) * operands[3 - place]


def _operands(call: OpCall) -> list[Any]:
    return [call.argument(i, name) for i, name in enumerate(_OPERANDS.get(call.name, ()))]


def _place(call: OpCall) -> int | None:
    """Which of the operands is the effective weight."""
    found = [i for i, name in enumerate(_OPERANDS.get(call.name, ())) if call.is_operand(i, name)]
    return found[0] if found else None


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float, complex))
