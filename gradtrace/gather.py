"""What the adjoints of one step add up to: per parameter the gradient of every cell, and the rows of its kinds."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from gradtrace.accumulate import ParameterSum, matrix_shape, probes_of
from gradtrace.contributions import Factored, Local, to_parameters
from gradtrace.factors import Factors, LookupFactors, OuterFactors, trusted_scale
from gradtrace.hosted import is_here
from gradtrace.kinds import Shared
from gradtrace.ops import Op, Operand
from gradtrace.survey import Memory

LEFT_OUT = -1  # in place of the cell that is left to subtraction
SHARE = 0.25  # of the bound |A| |D| of the whole that this cell must have
RUNGS = ("factored", "local", "pulled back", "global", "ungrouped")


@dataclass
class Rung:
    """How one parameter was measured in one step; used in several ways, it has the last of `RUNGS` among them."""

    names: set[str] = field(default_factory=set)
    ops: dict[str, None] = field(default_factory=dict)
    adapters: dict[str, None] = field(default_factory=dict)
    layouts: dict[str, None] = field(default_factory=dict)
    reason: str = ""

    UNKNOWN_OWNERS: ClassVar[str] = "no sample owns some of its rows: they count in `all` only"
    OUTSIDE: ClassVar[str] = (
        "it meets samples only in the loss, or where no way from the model's output leads: use it inside the model, "
        "before the output, to see its groups"
    )
    UNSEEN: ClassVar[str] = "no use of it was seen that leads to samples"

    @property
    def worst(self) -> str:
        return max(self.names, key=RUNGS.index) if self.names else RUNGS[-1]

    def why(self, op: Op, part: Factored | Local) -> None:
        """Notes why a use is not factored, where it is not."""
        if isinstance(part, Local):
            known = part.operand.adapter is not None
            cause = "has rows of several samples, or an input changed in place" if known else "is claimed by no adapter"
            self.reason = f"`{op.key.function}` {cause}"
        elif part.operand.value.moves is None and not self.reason:
            self.reason = f"the weight of `{op.key.function}` is made by arithmetic"

    @property
    def why_ungrouped(self) -> str:
        """What left it without a rung."""
        return self.OUTSIDE if self.ops else self.UNSEEN


class Gathered:
    """The sums of one step.

    is_global tells which parameters another way takes care of; is_known, whose `p.grad` will be the gradient of the one
    use that is being taken, so that one cell's gradient can be had by subtraction.
    """

    def __init__(
        self,
        parameters: Mapping[str, Tensor],
        edges: Mapping[str, GradientEdge],
        kinds: Sequence[str],
        memory: Memory,
        is_global: Callable[[str], bool],
        is_known: Callable[[str], bool] = lambda name: False,
    ) -> None:
        self._parameters, self._edges, self._kinds = parameters, edges, kinds
        self._memory, self._is_global, self._is_known = memory, is_global, is_known
        self.sums: dict[str, ParameterSum] = {}
        self.rungs: dict[str, Rung] = {}
        self._effective: dict[tuple[Any, int], tuple[Operand, dict[int, Tensor]]] = {}

    def sum_of(self, name: str) -> ParameterSum:
        """What was gathered of a parameter, nothing yet included."""
        if name not in self.sums:
            parameter = self._parameters[name]
            self.sums[name] = ParameterSum(name, tuple(parameter.shape), parameter.dtype)
        return self.sums[name]

    def rung_of(self, name: str) -> Rung:
        return self.rungs.setdefault(name, Rung())

    def take(self, op: Op, part: Factored | Local, cells: Tensor, shared: Shared, *, owned: bool) -> None:
        """Adds one operand's contribution; `cells` (samples + 1,) gives the cell of every sample."""
        value = part.operand.value
        names = [n for n in sorted(value.parameters) if n in self._parameters and not self._is_global(n)]
        if not names:
            return
        for name in names:
            self._label(name, op, part, owned=owned)
            self._take_kinds(self.sum_of(name), part, cells, shared)
        outer = self._outer(part)
        leave = self._left_over(part, names)
        if outer is not None:
            of_row = cells[part.factors.owners]  # type: ignore[union-attr]
            self.sum_of(names[0]).gradient.add_outer(*outer, of_row, leave=leave)
            return
        if leave is not None and isinstance(part, Factored) and type(part.factors).times is not Factors.times:
            products = _products(part.factors, cells == leave, self.sum_of(names[0]).gradient.sides[1])
            if products is not None:
                self.sum_of(names[0]).gradient.leave(leave, products)
                cells = torch.where(cells == leave, LEFT_OUT, cells)
        found = part.factors.by_cell(cells) if isinstance(part, Factored) else part.by_cell(cells)
        found.pop(LEFT_OUT, None)
        self._deliver(part.operand, found)

    def _left_over(self, part: Factored | Local, names: Sequence[str]) -> int | None:
        """The cell whose gradient will be what all others leave of the whole, as autograd sums it, if one may.

        The one with the longest rows: what rounding left in the whole must be small beside its own.
        """
        (name, *others), moves = names, part.operand.value.moves
        if others or moves is None or not isinstance(part, Factored) or not self._is_known(name):
            return None
        if not is_here(part.factors.adjoint):  # to know which one, it would have to be waited for
            return None
        power = [(a * d, cell) for cell, (a, d) in self.sum_of(name).power.items()]
        dtypes = {self._parameters[name].dtype, part.operand.dtype, part.factors.adjoint.dtype}
        if dtypes != {torch.float32} or sum(p > 0 for p, _ in power) < 2 or not all(math.isfinite(p) for p, _ in power):
            return None
        largest, cell = max(power)
        activations, adjoints = (sum(each) for each in zip(*self.sum_of(name).power.values(), strict=True))
        return cell if largest >= SHARE**2 * activations * adjoints else None

    def _label(self, name: str, op: Op, part: Factored | Local, *, owned: bool) -> None:
        rung = self.rung_of(name)
        direct = "factored" if isinstance(part, Factored) else "local"
        if owned:
            rung.names.add(direct if part.operand.value.moves is not None else "pulled back")
            rung.why(op, part)
        rung.ops[op.key.function] = None
        if isinstance(part, Factored) and part.operand.adapter is not None:
            rung.adapters[part.operand.adapter.name] = None
        layout = self._memory.layout(op.key, part.output)
        rung.layouts[str(layout) if layout else "found in each step" if owned else "none"] = None
        if not owned:
            rung.reason = Rung.UNKNOWN_OWNERS

    def _outer(self, part: Factored | Local) -> tuple[Tensor, Tensor] | None:
        """L and R with G = L^T R, where the parameter's matrix is the weight's or its transpose; None elsewhere."""
        value = part.operand.value
        if not (isinstance(part, Factored) and isinstance(part.factors, OuterFactors)) or value.moves is None:
            return None
        found = part.factors.as_matrix()
        turned = sum(m.transposes for m in value.moves) % 2 == 1
        if found is None or not all(m.of_matrix for m in value.moves) or (turned and len(part.operand.shape) != 2):
            return None
        left, right = found[::-1] if turned else found
        (name,) = value.parameters
        sides = matrix_shape(tuple(self._parameters[name].shape))
        return (left, right) if sides == (left.shape[1], right.shape[1]) else None

    # ------------------------------------------------------------------ kinds

    def _take_kinds(self, total: ParameterSum, part: Factored | Local, cells: Tensor, shared: Shared) -> None:
        adjoint = part.adjoint if isinstance(part, Local) else part.factors.adjoint
        total.eps = max(total.eps, torch.finfo(adjoint.dtype).eps)
        if isinstance(part, Local):
            total.add_scale(float("nan"))
            total.drop("activation", "no adapter factors this op")
            self._local_adjoint(total, part, cells, shared)
            return
        norms = part.factors.norms()
        gain = math.prod(move.gain for move in part.operand.value.moves or ())
        total.add_scale(gain * trusted_scale(part.factors, norms))
        if norms is not None:
            total.add_power(norms, cells[norms.owners])
        del norms  # of a convolution on volumes they are as large as a channel
        wanted = [kind for kind in ("activation", "adjoint") if kind in self._kinds]
        waiting = [kind for kind in wanted if not self._folded(total, kind, part.factors, cells, shared)]
        if waiting:
            self._take_blocks(total, waiting, part.factors, cells, shared)

    def _folded(self, total: ParameterSum, kind: str, factors: Factors, cells: Tensor, shared: Shared) -> bool:
        """Whether a kind's rows were folded as they were formed."""
        source = factors.source(kind)
        if source is None or not total.takes(kind, source):
            return False
        total.add_source(kind, source, cells[source.owners], shared)
        return True

    def _take_blocks(
        self, total: ParameterSum, kinds: Sequence[str], factors: Factors, cells: Tensor, shared: Shared
    ) -> None:
        found = False
        for rows in factors.blocks():
            found = True
            of_row = cells[rows.owners]
            if "adjoint" in kinds:
                total.add_rows("adjoint", rows.adjoint, of_row, shared)
            if "activation" not in kinds:
                continue
            if isinstance(factors, LookupFactors):
                total.add_lookups(factors, of_row)
            elif rows.activation is None:
                total.drop("activation", "a shift multiplies no activation")
                if "adjoint" not in kinds:
                    break
            else:
                total.add_rows("activation", rows.activation, of_row, shared)
        if not found:
            total.drop("activation", "its rows belong to several samples each")
            total.drop("adjoint", "its rows belong to several samples each")

    def _local_adjoint(self, total: ParameterSum, part: Local, cells: Tensor, shared: Shared) -> None:
        """One row per sample, positions side by side: all that is known of an op nobody factors."""
        owners = part.owners
        axes = [a for a in range(owners.dim()) if owners.shape[a] != 1]
        if len(axes) != 1 or "adjoint" not in self._kinds:
            total.drop("adjoint", "no adapter factors this op, and its output has no single sample axis")
            return
        rows = part.adjoint.movedim(axes[0], 0).flatten(1) if part.adjoint.dim() > 1 else part.adjoint[:, None]
        total.add_rows("adjoint", rows, cells[owners.flatten()], shared)

    # ------------------------------------------------------------------ gradients

    def add(self, name: str, cell: int, gradient: Tensor) -> None:
        """Adds a cell's gradient of a parameter, in its shape."""
        self.sum_of(name).gradient.add_dense({cell: gradient})

    def _deliver(self, operand: Operand, found: dict[int, Tensor]) -> None:
        if operand.value.moves is None:
            key = (operand.edge.node, operand.edge.output_nr)
            _, held = self._effective.setdefault(key, (operand, {}))
            for cell, gradient in found.items():
                held[cell] = held[cell] + gradient if cell in held else gradient
            return
        for cell, gradient in found.items():
            for name, g in to_parameters(gradient, operand.edge, operand.value, self._edges).items():
                self.add(name, cell, g)

    def carry_on(self, edge: GradientEdge) -> None:
        """All uses of an effective weight have been seen: what each cell gathered goes on to the parameters."""
        operand, held = self._effective.pop((edge.node, edge.output_nr), (None, {}))
        for cell, gradient in held.items():
            assert operand is not None
            for name, g in to_parameters(gradient.to(operand.dtype), operand.edge, operand.value, self._edges).items():
                if not self._is_global(name):
                    self.add(name, cell, g)

    def settle(self, whole: Mapping[str, Tensor]) -> None:
        """The pass is over: cells that were left to subtraction get what the others leave of `whole`."""
        for name, total in self.sums.items():
            total.gradient.settle(whole.get(name))

    def release(self) -> None:
        self._effective.clear()


def _products(factors: Factors, keep: Tensor, columns: int) -> Tensor | None:
    """The gradient of the rows where `keep` holds, times the audit's probes."""
    adjoint = factors.adjoint
    return factors.restrict(keep).times(probes_of(columns, adjoint.dtype, adjoint.device))
