"""Grouped products, as in fused experts: rows sorted by expert, each expert's multiplied by its own weight."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from gradtrace_plugins.contraction import Contraction, factored
from torch import Tensor

from gradtrace.calls import OpCall, Path, cast_as_used, is_dense
from gradtrace.factors import Factors, Rows
from gradtrace.hosted import picked, places_of, sent

_NAMES = {
    "_grouped_mm": ("input", "mat2"),
    "transformers::grouped_mm_fallback": ("input", "weight"),  # where torch's own has no kernel
}


@dataclass(frozen=True)
class GroupedFactors(Factors):
    """G[e] = A_e^T D_e, of the rows from the end of the last expert's to the end of e's.

    activation: (rows, in), adjoint: (rows, out), owners: (rows,), ends: (experts,), on the host. `order`: the
    permutation that takes (experts, in, out) to the weight's own axes.
    """

    activation: Tensor
    adjoint: Tensor
    owners: Tensor
    ends: Tensor
    order: tuple[int, int, int]

    def densify(self) -> Tensor:
        parts = torch.diff(self.ends, prepend=self.ends.new_zeros(1)).tolist()
        found = self.activation.new_empty(len(parts), self.activation.shape[1], self.adjoint.shape[1])
        for own, a, d in zip(found, self.activation.split(parts), self.adjoint.split(parts), strict=True):
            torch.mm(a.mH, d, out=own)
        return found.permute(self.order)

    def restrict(self, keep: Tensor) -> GroupedFactors:
        kept = keep[self.owners]
        before = torch.cat([self.ends.new_zeros(1), kept.cumsum(0).to(self.ends)])
        index = places_of(kept)
        return replace(
            self,
            activation=picked(self.activation, index),
            adjoint=picked(self.adjoint, index),
            owners=picked(self.owners, index),
            ends=before[self.ends],
        )

    def weighted(self, weights: Tensor) -> GroupedFactors:
        weight = sent(weights[self.owners], self.adjoint.device).to(self.adjoint.real.dtype)
        return replace(self, adjoint=self.adjoint * weight[:, None])

    def rows(self) -> Rows:
        return Rows(self.activation, self.adjoint, self.owners)


class GroupedAdapter:
    """Factors of grouped products with a weight per expert."""

    name = "grouped"
    ops = "_grouped_mm, transformers::grouped_mm_fallback"

    def claims(self, call: OpCall) -> bool:
        if call.name not in _NAMES or call.operand not in _paths(call):
            return False
        data, weight = _data(call), call.weight
        if not (is_dense(data) and is_dense(weight)) or weight.dim() != 3:
            return False
        return data.dim() == (2 if isinstance(_offsets(call), Tensor) else 3)

    def factors(self, call: OpCall, adjoint: Tensor) -> Factors:
        """One row per row of the data that an expert takes; those behind the last offset are nobody's."""
        data, right = _data(call), call.operand == _paths(call)[1]
        if data.dim() == 3:
            axes = ("eLI", "eIR") if right else ("eIR", "eLI")
            return factored(Contraction(((data, axes[0]),), call.weight, axes[1], "eLR"), call, adjoint)
        if not right:
            data, adjoint = data.mT, adjoint.mT
        ends = _offsets(call).to("cpu", torch.int64)
        taken = int(ends[-1])
        owners = call.owner_rows((0 if right else 1,), (len(data),))
        activation = cast_as_used(data[:taken], adjoint)
        return GroupedFactors(activation, adjoint[:taken], owners[:taken], ends, (0, 1, 2) if right else (0, 2, 1))


def _paths(call: OpCall) -> tuple[Path, Path]:
    """Where the two operands stand."""
    first, second = ((i,) if i < len(call.args) else (word,) for i, word in enumerate(_NAMES[call.name]))
    return first, second


def _data(call: OpCall) -> Any:
    """The operand that is not the effective weight."""
    first, second = _paths(call)
    return call.at(second if call.operand == first else first)


def _offsets(call: OpCall) -> Any:
    """Where every expert's rows end; None where all have as many."""
    return call.argument(2, "offs")
