"""Products of the input with a weight: linear, matmul, mm, bmm, addmm, tensordot, einsum and their like.

Every one is a contraction. Which axes of which operands meet is told in `labels`, what the factors are in
`contraction`.
"""

from __future__ import annotations

from typing import Any

from gradtrace_plugins.contraction import Contraction, factored
from gradtrace_plugins.labels import labels_of
from torch import Tensor

from gradtrace.calls import OpCall, Path, is_dense
from gradtrace.factors import Factors

# Where the two operands stand, by position and keyword.
_OPERANDS = {
    **dict.fromkeys(("matmul", "__matmul__", "__rmatmul__", "linalg_matmul"), ((0, "input"), (1, "other"))),
    **dict.fromkeys(("inner", "vdot", "kron"), ((0, "input"), (1, "other"))),
    **dict.fromkeys(("mm", "bmm"), ((0, "input"), (1, "mat2"))),
    **dict.fromkeys(("outer", "ger"), ((0, "input"), (1, "vec2"))),
    **dict.fromkeys(("baddbmm", "addbmm"), ((1, "batch1"), (2, "batch2"))),
    "linear": ((0, "input"), (1, "weight")),
    "mv": ((0, "input"), (1, "vec")),
    "dot": ((0, "input"), (1, "tensor")),
    "tensordot": ((0, "a"), (1, "b")),
    "linalg_vecdot": ((0, "x"), (1, "y")),
    "addmm": ((1, "mat1"), (2, "mat2")),
    "addmv": ((1, "mat"), (2, "vec")),
    "addr": ((1, "vec1"), (2, "vec2")),
}
_LISTED = {"einsum", "linalg_multi_dot", "chain_matmul"}
_ADDED = {"addmm", "addmv", "addr", "baddbmm", "addbmm"}  # to something, which in place does not change the operands
_CONJUGATING = {"vdot", "linalg_vecdot"}  # their first operand


class LinearAdapter:
    """Factors of every product of data with a weight."""

    name = "linear"
    ops = (
        "linear, matmul, mm, bmm, mv, dot, vdot, inner, outer, ger, kron, tensordot, linalg.vecdot, linalg.multi_dot, "
        "chain_matmul, addmm, addmv, addr, addbmm, baddbmm, einsum"
    )

    def claims(self, call: OpCall) -> bool:
        contraction = contraction_of(call)
        return contraction is not None and contraction.is_product()

    def factors(self, call: OpCall, adjoint: Tensor) -> Factors:
        """A and D with one row per position of the output outside the weight's axes."""
        contraction = contraction_of(call)
        assert contraction is not None
        return factored(contraction, call, adjoint)


def contraction_of(call: OpCall) -> Contraction | None:
    """The contraction that `call` performs with its effective weight, or None when it does something else."""
    name = call.name[:-1] if call.name[:-1] in _ADDED else call.name
    scale = call.kwargs.get("alpha", 1) if name in _ADDED else 1
    if not isinstance(scale, (int, float, complex)):
        return None
    operands = _operands(name, call)
    if call.operand not in operands or not all(map(is_dense, operands.values())):
        return None
    labels = labels_of(name, call, list(operands.values()))
    if labels is None:
        return None
    place = list(operands).index(call.operand)
    others = [(x, axes) for x, axes in zip(operands.values(), labels.operands, strict=True)]
    weight, w_axes = others.pop(place)
    if name in _CONJUGATING and place == 1:
        others = [(x.conj(), axes) for x, axes in others]
    elif name in _CONJUGATING and weight.is_complex():
        return None  # the weight itself is conjugated
    return Contraction(tuple(others), weight, w_axes, labels.output, scale, labels.merged)


def _operands(name: str, call: OpCall) -> dict[Path, Any]:
    """Everything that `call` multiplies, by its path; empty where that is not known."""
    if name in _LISTED:
        return _listed(name, call)
    if name not in _OPERANDS or (name in _ADDED and not isinstance(call.argument(0, "input"), Tensor)):
        return {}  # an old signature has a number there
    places = _OPERANDS[name]
    return {(i,) if i < len(call.args) else (word,): call.argument(i, word) for i, word in places}


def _listed(name: str, call: OpCall) -> dict[Path, Any]:
    """The operands of an op that takes any number of them, in a list or one by one."""
    first = 1 if name == "einsum" else 0
    if name == "einsum" and not (call.args and isinstance(call.args[0], str)):
        return {}
    if len(call.args) == first + 1 and isinstance(call.args[first], (tuple, list)):
        return {(first, i): operand for i, operand in enumerate(call.args[first])}
    if "tensors" in call.kwargs:
        return {("tensors", i): operand for i, operand in enumerate(call.kwargs["tensors"])}
    return {(i,): operand for i, operand in enumerate(call.args) if i >= first}
