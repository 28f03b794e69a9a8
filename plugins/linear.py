"""Products of the input with a weight: linear, matmul, mm, bmm, addmm, baddbmm, mv, einsum.

Every one is a contraction. With one label per axis of the input x, the weight w and the output y, labels in x and y
only are rows, in x and w the weight's inputs, in w and y its outputs, and in all three independent products.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from gradtrace.calls import OpCall, cast_as_used, is_dense
from gradtrace.factors import BatchedFactors, Factors, OuterFactors

_PRODUCTS = {"matmul", "__matmul__", "__rmatmul__", "mm", "bmm", "mv", "linear", "einsum"}
_ADDED = {"addmm", "addmv", "baddbmm"}


@dataclass(frozen=True)
class Contraction:
    """The axes of x, w and y by label, and the factor that multiplies the product."""

    x: Tensor
    x_axes: str
    w_axes: str
    y_axes: str
    scale: complex = 1

    @property
    def rows(self) -> str:
        return "".join(a for a in self.y_axes if a in self.x_axes and a not in self.w_axes)

    @property
    def inputs(self) -> str:
        return "".join(a for a in self.w_axes if a in self.x_axes and a not in self.y_axes)

    @property
    def outputs(self) -> str:
        return "".join(a for a in self.w_axes if a in self.y_axes and a not in self.x_axes)

    @property
    def batch(self) -> str:
        return "".join(a for a in self.w_axes if a in self.y_axes and a in self.x_axes)

    def is_product(self) -> bool:
        """No axis is summed within one operand alone, and none is repeated within an operand."""
        labels = (self.x_axes, self.w_axes, self.y_axes)
        return all(len(set(part)) == len(part) for part in labels) and (
            set(self.x_axes) == set(self.batch + self.rows + self.inputs)
            and set(self.w_axes) == set(self.batch + self.inputs + self.outputs)
            and set(self.y_axes) == set(self.batch + self.rows + self.outputs)
        )


class LinearAdapter:
    """Factors of every product of data with a weight."""

    name = "linear"
    ops = "linear, matmul, mm, bmm, mv, addmm, addmv, baddbmm, einsum"

    def claims(self, call: OpCall) -> bool:
        contraction = contraction_of(call)
        return contraction is not None and contraction.is_product() and not _stretched(contraction, call.weight)

    def factors(self, call: OpCall, adjoint: Tensor) -> Factors:
        """A and D with one row per position of the output outside the weight's axes."""
        c = contraction_of(call)
        assert c is not None
        adjoint = adjoint * c.scale.conjugate() if c.scale != 1 else adjoint
        size = dict(zip(c.w_axes, call.weight.shape, strict=True))
        x = cast_as_used(c.x, adjoint)
        x = x.expand([size.get(a, length) for a, length in zip(c.x_axes, x.shape, strict=True)])
        shape = tuple(size[a] for a in c.batch + c.inputs + c.outputs)
        order = tuple((c.batch + c.inputs + c.outputs).index(a) for a in c.w_axes)
        row_axes = tuple(c.y_axes.index(a) for a in c.batch + c.rows)
        row_shape = tuple(adjoint.shape[i] for i in row_axes)
        owners = call.owner_rows(row_axes, row_shape)
        n_batch, n_rows = prod(size[a] for a in c.batch), prod(row_shape[len(c.batch) :])
        n_in, n_out = prod(size[a] for a in c.inputs), prod(size[a] for a in c.outputs)
        a = _arranged(x, c.x_axes, c.batch + c.rows + c.inputs, (n_batch, n_rows, n_in))
        d = _arranged(adjoint, c.y_axes, c.batch + c.rows + c.outputs, (n_batch, n_rows, n_out))
        if c.batch:
            return BatchedFactors(a, d, owners.reshape(n_batch, n_rows), shape, order)
        return OuterFactors(a[0], d[0], owners, shape, order)


def contraction_of(call: OpCall) -> Contraction | None:
    """The contraction that `call` performs with its effective weight, or None when it does something else."""
    if call.name == "einsum":
        return _einsum(call)
    if call.name == "linear":
        return _linear(call)
    if call.name in _PRODUCTS:
        return _matmul(call, 0, 1, 1)
    alpha = call.kwargs.get("alpha", 1)
    if (
        call.name in _ADDED
        and isinstance(call.argument(0, "input"), Tensor)
        and isinstance(alpha, (int, float, complex))
    ):
        return _matmul(call, 1, 2, alpha)
    return None


def _linear(call: OpCall) -> Contraction | None:
    x = call.argument(0, "input")
    if not call.is_operand(1, "weight") or not is_dense(x):
        return None
    rows, out = _letters(x.dim() - 1), "O" if call.weight.dim() == 2 else ""
    return Contraction(x, rows + "I", out + "I", rows + out)


def _matmul(call: OpCall, first: int, second: int, scale: complex) -> Contraction | None:
    names = {"mm": ("input", "mat2"), "bmm": ("input", "mat2"), "mv": ("input", "vec"), "addmm": ("mat1", "mat2"),
             "addmv": ("mat", "vec"), "baddbmm": ("batch1", "batch2")}.get(call.name, ("input", "other"))  # fmt: skip
    left, right = call.argument(first, names[0]), call.argument(second, names[1])
    if not (is_dense(left) and is_dense(right)):
        return None
    weight_left = call.is_operand(first, names[0])
    if not weight_left and not call.is_operand(second, names[1]):
        return None
    if call.name == "__rmatmul__":
        left, right, weight_left = right, left, not weight_left
    left_axes, right_axes, out_axes = _matmul_axes(left, right)
    x = right if weight_left else left
    x_axes, w_axes = (right_axes, left_axes) if weight_left else (left_axes, right_axes)
    return Contraction(x, x_axes, w_axes, out_axes, scale)


def _matmul_axes(left: Tensor, right: Tensor) -> tuple[str, str, str]:
    batch = _letters(max(left.dim(), right.dim(), 2) - 2)
    left_core = "I" if left.dim() == 1 else "LI"
    right_core = "I" if right.dim() == 1 else "IR"
    left_batch = batch[len(batch) - max(left.dim() - 2, 0) :]
    right_batch = batch[len(batch) - max(right.dim() - 2, 0) :]
    out = batch[len(batch) - max(left.dim() - 2, right.dim() - 2, 0) :]
    return left_batch + left_core, right_batch + right_core, out + left_core[:-1] + right_core[1:]


def _einsum(call: OpCall) -> Contraction | None:
    if not call.args or not isinstance(call.args[0], str):
        return None
    operands = call.args[1] if len(call.args) == 2 and isinstance(call.args[1], (tuple, list)) else call.args[1:]
    position = call.operand[-1] if len(call.operand) == 2 else call.operand[0]
    equation = call.args[0].replace(" ", "")
    if len(operands) != 2 or "->" not in equation or not isinstance(position, int):
        return None
    if len(call.operand) == 1:
        position -= 1  # the equation comes first
    terms, out = equation.split("->")
    left, _, right = terms.partition(",")
    w_axes, x_axes = (left, right) if position == 0 else (right, left)
    x = operands[1 - position]
    if "." in w_axes or not is_dense(x):
        return None
    if "." in x_axes:
        free = "".join(a for a in "ABCDEFGHJKMNPQSTUVWXYZ" if a not in equation)[
            : x.dim() - len(x_axes.replace(".", ""))
        ]
        x_axes, out = x_axes.replace("...", free), out.replace("...", free)
    return Contraction(x, x_axes, w_axes, out)


def _letters(count: int) -> str:
    return "abcdefghijklmnop"[:count]


def _stretched(c: Contraction, weight: Tensor) -> bool:
    """Whether an axis of the weight of size one is broadcast to the data's: left to the local way."""
    size = dict(zip(c.w_axes, weight.shape, strict=True))
    return any(size.get(a, length) == 1 != length for a, length in zip(c.x_axes, c.x.shape, strict=True))


def _arranged(tensor: Tensor, have: str, want: str, shape: tuple[int, int, int]) -> Tensor:
    return torch.permute(tensor, [have.index(a) for a in want]).reshape(shape)
