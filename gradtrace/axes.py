"""Whether an axis counts samples or features: asked of the ops behind a value, on the live graph.

The value's cotangent is coded along the axis, as in a probe for owners. Behind a linear layer the samples' codes come
back row by row. Codes along a feature axis come back mixed, and at the layer itself each belongs to the very entries of
the weight that lie along that axis: no two samples ever share a weight's rows so, two features always do.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from gradtrace.bypass import has_region
from gradtrace.contributions import to_parameters
from gradtrace.errors import GradtraceError
from gradtrace.flow import Produced
from gradtrace.ops import Op, Operand
from gradtrace.outlets import Evidence, Outlet
from gradtrace.ownership import MIXED, UNKNOWN
from gradtrace.pull import through_op
from gradtrace.survey import Memory, Probe, batches, find_owners

if TYPE_CHECKING:
    from gradtrace.capture import Capture

# An index names the entry of the weight itself: who owns a row says nothing about the weight's axes.
_LOOKUPS = frozenset(("embedding", "embedding_bag", "__getitem__", "gather", "index_select", "take_along_dim", "take"))


class AxisJudge:
    """Says what speaks for an axis of a value.

    asked: the user named the sample axis of the outputs. Then a parameter may well have a row for every sample.
    """

    def __init__(
        self, capture: Capture, ops: Sequence[Op], memory: Memory, edges: Mapping[str, GradientEdge], *, asked: bool
    ) -> None:
        self._capture, self._ops, self._memory, self._edges, self._asked = capture, ops, memory, edges, asked

    def __call__(self, values: Sequence[tuple[Produced, int]]) -> Evidence:
        """What the ops behind these values of one batch say, each coded along its axis."""
        if any(has_region(made.edge.node) for made, _ in values):
            return Evidence.NOTHING  # no pass of ours can go through a reentrant checkpoint
        outlets = [Outlet(made.edge, made.meta, axis, made.context) for made, axis in values]
        probe = Probe.draw(self._capture, outlets, outlets[0].size, self._memory.generator)
        try:
            found = set(self._of_ops(probe, [op for op in self._ops if op.context is outlets[0].context]))
        except GradtraceError:
            raise
        except Exception:  # the backward of somebody's own function: the survey meets it too, and names it
            return Evidence.NOTHING
        if Evidence.FEATURES in found and not self._asked:
            return Evidence.FEATURES
        if not found:
            return Evidence.NOTHING
        if Evidence.SAMPLES not in found:
            return Evidence.MIXED
        return Evidence.SAMPLES if found == {Evidence.SAMPLES} else Evidence.PARTLY

    def _of_ops(self, probe: Probe, ops: Sequence[Op]) -> Iterator[Evidence]:
        for some in batches(ops):
            by_number = {op.number: op for op in some}
            for (number, output), adjoint, owners in find_owners(probe, some, self._memory):
                op = by_number[number]
                if bool((owners == UNKNOWN).all()) or op.unseen_input or op.key.function in _LOOKUPS:
                    continue
                if bool((owners == MIXED).any()):
                    yield Evidence.MIXED
                    continue
                operands = [o for o in op.operands if _numel(o) > 1]
                with probe.passing(frozen=True):
                    if any(self._lies_along(op, output, operand, adjoint, owners) for operand in operands):
                        yield Evidence.FEATURES
                    elif operands:
                        yield Evidence.SAMPLES

    def _lies_along(self, op: Op, output: int, operand: Operand, adjoint: Tensor, owners: Tensor) -> bool:
        """Whether every owner's part of the weight's gradient is at the entries that it names along an axis."""
        for axis, length in enumerate(owners.shape):
            places = [a for a, size in enumerate(operand.shape) if size == length]
            along = _along(owners, axis) if places else None
            if along is None or len(along.unique()) < 2:
                continue
            chosen = along[along >= 0].unique()[::2]
            halves = [_pulled(op, output, operand, adjoint, torch.isin(owners, chosen) == one) for one in (True, False)]
            first, second = halves
            if first is None or second is None or not bool(first.any()) or not bool(second.any()):
                continue
            mine = torch.isin(along, chosen).to(first.device)
            for place in places:
                apart = not bool((_used(first, place) & ~mine).any() | (_used(second, place) & mine).any())
                if apart and self._part(operand, first, second):
                    return True
        return False

    def _part(self, operand: Operand, first: Tensor, second: Tensor) -> bool:
        """Whether two gradients of an effective weight reach different entries of the parameters: none was expanded."""
        one, other = (to_parameters(g, operand.edge, operand.value, self._edges) for g in (first, second))
        live = [name for name in one.keys() & other.keys() if bool(one[name].any()) and bool(other[name].any())]
        return bool(live) and not any(bool(((one[name] != 0) & (other[name] != 0)).any()) for name in live)


def _pulled(op: Op, output: int, operand: Operand, adjoint: Tensor, wanted: Tensor) -> Tensor | None:
    masked = torch.where(wanted.to(adjoint.device), adjoint, torch.zeros_like(adjoint))
    return through_op(op, output, masked, [operand])[0]


def _used(gradient: Tensor, axis: int) -> Tensor:
    """Which indices of an axis the gradient has entries at."""
    return (gradient != 0).movedim(axis, 0).flatten(1).any(1) if gradient.dim() > 1 else gradient != 0


def _along(owners: Tensor, axis: int) -> Tensor | None:
    """The owner per index of an axis; None where owners differ across the other axes."""
    flat = owners.movedim(axis, 0).flatten(1) if owners.dim() > 1 else owners[:, None]
    along = flat.amax(1)
    return along if bool(((flat == along[:, None]) | (flat == UNKNOWN)).all()) else None


def _numel(operand: Operand) -> int:
    return int(torch.Size(operand.shape).numel())
