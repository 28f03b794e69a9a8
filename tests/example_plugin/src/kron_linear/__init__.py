"""A linear layer whose weight is a Kronecker product, and its adapter for gradtrace."""

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function

from gradtrace.calls import OpCall, cast_as_used, is_dense
from gradtrace.factors import Factors, OuterFactors


def kron_linear(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """x times the transpose of kron(a, b), which is never formed."""
    if has_torch_function((x, a, b)):
        return handle_torch_function(kron_linear, (x, a, b), x, a, b)
    grid = x.unflatten(-1, (a.shape[1], b.shape[1]))
    return (a @ grid @ b.mT).flatten(-2)


class KronLinear(torch.nn.Module):
    """Takes the product of `ins` features to the product of `outs`, by kron(a, b)."""

    def __init__(self, ins: tuple[int, int], outs: tuple[int, int]) -> None:
        super().__init__()
        self.a = torch.nn.Parameter(torch.randn(outs[0], ins[0]) / ins[0] ** 0.5)
        self.b = torch.nn.Parameter(torch.randn(outs[1], ins[1]) / ins[1] ** 0.5)

    def forward(self, x: Tensor) -> Tensor:
        return kron_linear(x, self.a, self.b)


class KronLinearAdapter:
    """Factors of both weights of `kron_linear(x, a, b)`: a multiplies columns, b multiplies rows."""

    name = "kron-linear"
    ops = ("kron_linear",)

    def claims(self, call: OpCall) -> bool:
        is_weight = call.is_operand(1, "a") or call.is_operand(2, "b")
        return call.name == "kron_linear" and is_weight and is_dense(call.argument(0, "x"))

    def factors(self, call: OpCall, adjoint: Tensor) -> Factors:
        x, a, b = (cast_as_used(call.argument(i, name), adjoint) for i, name in enumerate("xab"))
        owners = call.owner_rows(tuple(range(adjoint.dim() - 1)), tuple(adjoint.shape[:-1]))
        grid = x.unflatten(-1, (a.shape[1], b.shape[1]))
        rows = adjoint.unflatten(-1, (a.shape[0], b.shape[0]))
        if call.is_operand(1, "a"):  # columns are rows of the transpose
            activation, rows = (grid @ b.mT).mT, rows.mT
        else:
            activation = a @ grid
        each = rows.shape[-2]  # so many rows of one sample and position lie one after another
        shape = (activation.shape[-1], rows.shape[-1])
        activation, rows = activation.flatten(0, -2), rows.flatten(0, -2)
        return OuterFactors(activation, rows, owners.repeat_interleave(each), shape, order=(1, 0))
