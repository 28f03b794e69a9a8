"""Carrying adjoints back: through one op alone, through the parameter-only part of a graph, or through all of it."""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from gradtrace.ops import Op, Operand


def through_graph(
    outputs: Sequence[GradientEdge], cotangents: Sequence[Tensor], inputs: Sequence[GradientEdge]
) -> list[Tensor | None]:
    """The adjoints at `inputs` of a pass from `outputs`; the graph stays. No hook of a leaf fires."""
    if not outputs or not inputs:
        return [None] * len(inputs)
    found = torch.autograd.grad(  # type: ignore[call-overload]
        list(outputs), list(inputs), grad_outputs=list(cotangents), retain_graph=True, allow_unused=True
    )
    return list(found)


def through_op(op: Op, output: int, adjoint: Tensor, operands: Sequence[Operand]) -> list[Tensor | None]:
    """The gradients at the op's effective weights of one of its outputs' adjoint, through this call alone.

    Nodes born before the call are not entered, so a path through the op's input to an earlier use of the same
    parameter does not count. Inside a checkpoint the saved tensors can be read only once per pass: there a pass of
    its own is made, which recomputes the region.
    """
    edges = [operand.edge for operand in operands]
    if op.checkpointed:
        return through_graph([op.outputs[output].edge], [adjoint], edges)
    return _local(op.outputs[output].edge, adjoint, edges, op.born)


def _local(start: GradientEdge, adjoint: Tensor, targets: list[GradientEdge], born: int) -> list[Tensor | None]:
    """Runs the nodes between `start` and `targets` one by one, newest first."""
    wanted = {(t.node, t.output_nr): i for i, t in enumerate(targets)}
    found: list[Tensor | None] = [None] * len(targets)
    waiting: dict[Any, dict[int, Tensor]] = {start.node: {start.output_nr: adjoint}}
    heap = [(-start.node._sequence_nr(), 0, start.node)]
    pushed = 1
    while heap:
        _, _, node = heapq.heappop(heap)
        grads = waiting.pop(node)
        for (parent, number), grad in zip(node.next_functions, _run(node, grads), strict=False):
            if parent is None or grad is None:
                continue
            if (parent, number) in wanted:
                _add(found, wanted[parent, number], grad)
            elif not _older(parent, born) or _is_cast(parent, wanted):
                if parent not in waiting:
                    heapq.heappush(heap, (-parent._sequence_nr(), pushed, parent))
                    pushed += 1
                here = waiting.setdefault(parent, {})
                here[number] = here[number] + grad if number in here else grad
    return found


def _older(node: Any, born: int) -> bool:
    return node.name() == "torch::autograd::AccumulateGrad" or node._sequence_nr() < born


def _is_cast(node: Any, wanted: dict[Any, int]) -> bool:
    """Autocast keeps the cast copy of a parameter for later calls: made before this call, and yet part of it."""
    return node.name() == "ToCopyBackward0" and node.next_functions[0] in wanted


def _run(node: Any, grads: dict[int, Tensor]) -> tuple[Tensor | None, ...]:
    count = len(node._input_metadata)
    result = node(*(grads.get(i) for i in range(count)))
    return result if isinstance(result, tuple) else (result,)


def _add(found: list[Tensor | None], index: int, grad: Tensor) -> None:
    present = found[index]
    found[index] = grad if present is None else present + grad
