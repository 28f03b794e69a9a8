"""Where the result of one linear op becomes the rows of the next, with nothing in between: the autograd graph tells."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch.autograd.graph import GradientEdge

from gradtrace.ops import Op
from gradtrace.session import Session

ACCUMULATE = "torch::autograd::AccumulateGrad"
# What keeps all entries, in their order: rows stay rows while the last axis is as long as before.
KEEPS = frozenset(
    {
        *("ViewBackward0", "UnsafeViewBackward0", "ReshapeAliasBackward0", "AliasBackward0", "CloneBackward0"),
        *("UnsqueezeBackward0", "SqueezeBackward0", "SqueezeBackward1", "SqueezeBackward2"),
    }
)
# What `linear` is made of; casts are not, as rounding is no linear map.
PRODUCT, SUM = KEEPS | {"MmBackward0", "TBackward0"}, frozenset(("AddmmBackward0", "AddBackward0"))
Slot = tuple[Any, int]  # a node of the autograd graph, and which of its results


@dataclass(frozen=True)
class Links:
    """maps: op number -> `linear`, or `affine` with a bias. feeds: (op, next op) -> whether nothing else reads it."""

    maps: Mapping[int, str]
    feeds: Mapping[tuple[int, int], bool]


@dataclass(frozen=True)
class _Line:
    """A call of `linear`: its nodes, where data that need a gradient come in, how long the rows are on both sides."""

    number: int
    nodes: frozenset[Any]
    data: Slot | None
    result: Slot
    inputs: int
    outputs: int
    has_bias: bool


def links_of(session: Session) -> Links:
    """The links between calls of `torch.nn.functional.linear`; every other op, or a value changed between, breaks them.

    The last part, that a result goes nowhere else, is told where one announced backward pass was made and no hook of
    the user's could have changed an adjoint.
    """
    lines = [line for op in session.seen if (line := _line(op)) is not None]
    by_result = {line.result: line for line in lines}
    sure = len(session.roots) == 1 and not session.capture.hooked
    readers = _readers(session.roots) if sure else {}
    feeds = {}
    for line in lines:
        source = None if line.data is None else _source(line.data, by_result)
        if source is not None and source.outputs == line.inputs:
            feeds[source.number, line.number] = _feeds_alone(source, line, readers)
    return Links({line.number: "affine" if line.has_bias else "linear" for line in lines}, feeds)


def _line(op: Op) -> _Line | None:
    """The op as a call of `linear` with a weight of parameters; None for anything else."""
    weights = [o for o in op.operands if o.path in ((1,), ("weight",)) and len(o.shape) == 2]
    biases = [o for o in op.operands if len(o.shape) == 1]
    if op.key.function != "linear" or len(op.outputs) != 1 or len(weights) != 1:
        return None
    nodes, entering = _inside(op)
    made_of = {node.name() for node in nodes}
    has_bias = bool(made_of & SUM)
    if len(entering) > 1 or not made_of <= PRODUCT | SUM:
        return None
    if len(weights) + len(biases) != len(op.operands) or has_bias != bool(biases):
        return None
    (weight,), result = weights, op.outputs[0]
    outputs, inputs = weight.shape
    slot = (result.edge.node, result.edge.output_nr)
    data = entering[0] if entering else None
    return _Line(op.number, frozenset(nodes), data, slot, inputs, outputs, has_bias)


def _inside(op: Op) -> tuple[set[Any], list[Slot]]:
    """The nodes that the call made, and where values other than its operands come in."""
    operands = {(o.edge.node, o.edge.output_nr) for o in op.operands}
    nodes, entering, queue = set[Any](), list[Slot](), [op.outputs[0].edge.node]
    while queue:
        node = queue.pop()
        nodes.add(node)
        for parent in node.next_functions:
            if parent[0] is None or parent in operands:
                continue
            if parent[0].name() == ACCUMULATE or parent[0]._sequence_nr() < op.born:
                entering.append(parent)
            elif parent[0] not in nodes:
                queue.append(parent[0])
    return nodes, entering


def _source(slot: Slot, by_result: Mapping[Slot, _Line]) -> _Line | None:
    """The call whose result this is, moves that keep the rows aside."""
    while slot not in by_result:
        node = slot[0]
        if node is None or node.name() not in KEEPS:
            return None
        (slot,) = node.next_functions
    return by_result[slot]


def _readers(roots: Sequence[GradientEdge]) -> Mapping[Slot, list[Any]]:
    """What reads each value on its way to the roots; None stands for whoever reads a root."""
    found: defaultdict[Slot, list[Any]] = defaultdict(list)
    for root in roots:
        found[root.node, root.output_nr].append(None)
    seen, queue = {root.node for root in roots}, [root.node for root in roots]
    while queue:
        node = queue.pop()
        for parent in node.next_functions:
            if parent[0] is not None:
                found[parent].append(node)
                if parent[0] not in seen:
                    seen.add(parent[0])
                    queue.append(parent[0])
    return found


def _feeds_alone(source: _Line, line: _Line, readers: Mapping[Slot, list[Any]]) -> bool:
    """Whether all that reads the result of `source` is `line`."""
    slot = source.result
    while len(reading := readers.get(slot, [])) == 1:
        if reading[0] in line.nodes:
            return True
        if reading[0] is None or reading[0].name() not in KEEPS:
            return False
        slot = (reading[0], 0)
    return False
