"""Carrying adjoints back: through one op alone, through the parameter-only part of a graph, or through all of it."""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import BackwardCFunction
from torch.autograd.graph import GradientEdge

from gradtrace.bypass import NODE
from gradtrace.ops import Op, Operand


def through_graph(
    outputs: Sequence[GradientEdge], cotangents: Sequence[Tensor], inputs: Sequence[GradientEdge]
) -> list[Tensor | None]:
    """The adjoints at `inputs` of a pass from `outputs`; the graph stays. No hook of a leaf fires."""
    if not outputs or not inputs:
        return [None] * len(inputs)
    found = torch.autograd.grad(
        list(outputs), list(inputs), grad_outputs=list(cotangents), retain_graph=True, allow_unused=True
    )
    return [g.to_dense() if g is not None and g.is_sparse else g for g in found]


def through_op(op: Op, output: int, adjoint: Tensor, operands: Sequence[Operand]) -> list[Tensor | None]:
    """The gradients at the op's effective weights of one of its outputs' adjoint, through this call alone.

    Nodes born before the call are not entered, so a path through the op's input to an earlier use of the same
    parameter does not count. Inside a checkpoint the saved tensors can be read only once per pass: there a pass of
    its own is made, which recomputes the region.
    """
    edges = [operand.edge for operand in operands]
    adjoint = adjoint.reshape(op.outputs[output].base)
    if op.checkpointed:
        return through_graph([op.outputs[output].edge], [adjoint], edges)
    others = [o.edge for place, o in enumerate(op.outputs) if place != output]
    return local(op.outputs[output].edge, adjoint, edges, born=op.born, stops=others)


def local(
    start: GradientEdge,
    adjoint: Tensor,
    targets: Sequence[GradientEdge],
    *,
    born: int = 0,
    stops: Sequence[GradientEdge] = (),
) -> list[Tensor | None]:
    """The adjoints at `targets` of `adjoint` at `start`, by running the nodes in between one by one, newest first.

    Nothing beyond `targets` and `stops` is entered (an LSTM cell's new state is an output of its own, and delivers
    what reaches it), nor nodes older than `born`, nor leaves. No hook fires.
    """
    wanted = {(t.node, t.output_nr): i for i, t in enumerate(targets)}
    closed = {(s.node, s.output_nr) for s in stops}
    found: list[Tensor | None] = [None] * len(targets)
    waiting: dict[Any, dict[int, Tensor]] = {start.node: {start.output_nr: adjoint}}
    heap = [(-start.node._sequence_nr(), 0, start.node)]
    while heap:
        _, _, node = heapq.heappop(heap)
        for (parent, number), grad in zip(node.next_functions, _run(node, waiting.pop(node)), strict=False):
            if parent is None or grad is None or (parent, number) in closed:
                continue
            grad = _fitted(grad, parent._input_metadata[number])
            if (parent, number) in wanted:
                _add(found, wanted[parent, number], grad)
            elif not _older(parent, born) or _is_cast(parent, wanted):
                if parent not in waiting:
                    waiting[parent] = {}
                    heapq.heappush(heap, (-parent._sequence_nr(), id(parent), parent))
                here = waiting[parent]
                here[number] = here[number] + grad if number in here else grad
    return found


def nodes_behind(start: Iterable[Any]) -> set[Any]:
    """Every node that a backward pass from `start` could come to."""
    seen: set[Any] = set()
    queue = [node for node in start if node is not None]
    while queue:
        node = queue.pop()
        if node not in seen:
            seen.add(node)
            queue += [parent for parent, _ in node.next_functions if parent is not None]
    return seen


def _fitted(grad: Tensor, meta: Any) -> Tensor:
    """As the engine does between nodes: summed over broadcast axes, and cast, to what the next node expects."""
    if grad.is_sparse:
        grad = grad.to_dense()
    if grad.shape != tuple(meta.shape):
        grad = grad.sum_to_size(tuple(meta.shape))
    if meta.dtype.is_complex or not grad.is_complex():
        return grad.to(meta.dtype)
    return grad.real.to(meta.dtype)


def _older(node: Any, born: int) -> bool:
    return node.name() == "torch::autograd::AccumulateGrad" or node._sequence_nr() < born


def _is_cast(node: Any, wanted: dict[Any, int]) -> bool:
    """Autocast keeps the cast copy of a parameter for later calls: made before this call, and yet part of it."""
    return node.name() == "ToCopyBackward0" and node.next_functions[0] in wanted


def _run(node: Any, grads: dict[int, Tensor]) -> tuple[Tensor | None, ...]:
    if node.name() != NODE and isinstance(node, BackwardCFunction):
        return _run_custom(node, grads)
    count = len(node._input_metadata)
    result = node(*(grads.get(i) for i in range(count)))
    return result if isinstance(result, tuple) else (result,)


def _run_custom(node: Any, grads: dict[int, Tensor]) -> tuple[Tensor | None, ...]:
    """The backward of a custom autograd function or of an op of `torch.library`: as the engine calls it.

    It returns one gradient per argument of forward; the node's parents are the arguments that are tensors.
    """
    given = [grads[i] if i in grads else _zeros(meta) for i, meta in enumerate(node._input_metadata)]
    result = node.apply(*given)
    result = result if isinstance(result, tuple) else (result,)
    needed = iter([r for r, asked in zip(result, node.needs_input_grad, strict=False) if asked])
    return tuple(None if parent is None else next(needed) for parent, _ in node.next_functions)


def _zeros(meta: Any) -> Tensor:
    return torch.zeros(tuple(meta.shape), dtype=meta.dtype, device=meta.device)


def _add(found: list[Tensor | None], index: int, grad: Tensor) -> None:
    present = found[index]
    found[index] = grad if present is None else present + grad
