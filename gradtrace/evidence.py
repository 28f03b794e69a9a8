"""What the calls and the graph of one step tell about every parameter: the facts that advice is made of."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import BackwardCFunction
from torch.overrides import resolve_name

from gradtrace.bypass import NODE
from gradtrace.ops import Op
from gradtrace.session import Session

ACCUMULATE = "torch::autograd::AccumulateGrad"
MOVES = ("T", "Transpose", "Permute", "View", "UnsafeView", "ReshapeAlias", "Unsqueeze", "Squeeze", "ToCopy", "Clone")


@dataclass(frozen=True)
class Use:
    """One op that a parameter, or something made of it, went into.

    function: as users write it, such as `torch.cdist`; module: the module that called it, empty for the model itself.
    adapter: who claims it. arithmetic: what was done to the parameter before, index moves left out.
    """

    function: str
    module: str
    adapter: str | None
    direct: bool
    arithmetic: tuple[str, ...] = ()


@dataclass(frozen=True)
class GraphFacts:
    """What the graph behind a loss tells without tracing.

    hidden: parameter -> the custom autograd functions that take it. reentrant: whether a reentrant checkpoint is in it.
    """

    hidden: Mapping[str, tuple[str, ...]]
    reentrant: bool


def uses_in(session: Session) -> dict[str, list[Use]]:
    """Parameter -> the ops that the session saw it go into, in the order of the forward pass, no two alike."""
    found: dict[str, dict[Use, None]] = {}
    for op in session.seen:
        for operand in op.operands:
            direct = operand.value.moves is not None
            made_by = () if direct else tuple(_arithmetic(operand.edge.node))
            adapter = operand.adapter.name if operand.adapter else None
            use = Use(function_name(op), op.key.module, adapter, direct, made_by)
            for name in operand.value.parameters:
                found.setdefault(name, {})[use] = None
    return {name: list(uses) for name, uses in found.items()}


def function_name(op: Op) -> str:
    """The called function as users write it."""
    known, name = resolve_name(op.function), op.key.function
    if known is None and hasattr(torch, name):
        known = f"torch.{name}"  # called below the function that users call
    known = known or getattr(op.function, "_qualified_op_name", None) or name
    return str(known).replace("torch.Tensor.", "Tensor.").replace("torch.functional.", "torch.")


def facts_of(loss: Tensor, parameters: Mapping[str, Tensor]) -> GraphFacts:
    """The facts of the graph behind `loss`."""
    names = {id(p): name for name, p in parameters.items()}
    hidden: dict[str, dict[str, None]] = {}
    reentrant = False
    for node in _nodes(loss.grad_fn):
        if node.name() == NODE:
            reentrant = True
        elif isinstance(node, BackwardCFunction):
            for parent, _ in node.next_functions:
                leaf = _leaf(parent)
                if id(leaf) in names:
                    hidden.setdefault(names[id(leaf)], {})[_word(node)] = None
    return GraphFacts({name: tuple(functions) for name, functions in hidden.items()}, reentrant)


def _nodes(start: Any) -> Iterator[Any]:
    seen, queue = {start}, [start]
    while queue:
        node = queue.pop()
        if node is None:
            continue
        yield node
        for parent, _ in node.next_functions:
            if parent not in seen:
                seen.add(parent)
                queue.append(parent)


def _leaf(node: Any) -> Tensor | None:
    """The leaf that a node hands through, index moves aside."""
    while node is not None and node.name() != ACCUMULATE:
        moves = re.fullmatch(rf"({'|'.join(MOVES)})Backward\d*", node.name())
        node = node.next_functions[0][0] if moves and node.next_functions else None
    return None if node is None else node.variable


def _arithmetic(start: Any) -> Iterator[str]:
    """The calls between parameters and an effective weight, in the order of the forward pass, each named once."""
    found: dict[str, None] = {}
    for node in sorted(_nodes(start), key=lambda n: int(n._sequence_nr())):
        if node.name() != ACCUMULATE and not re.fullmatch(rf"({'|'.join(MOVES)})Backward\d*", node.name()):
            found[_word(node)] = None
    yield from found


def _word(node: Any) -> str:
    """A node's name as users write it: `MulBackward0` is `mul`, a custom function keeps its class' name."""
    name = str(node.name())
    if isinstance(node, BackwardCFunction):
        return name.removesuffix("Backward")
    plain = re.sub(r"Backward\d*$", "", name.rpartition("::")[2])
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", plain).lower()


def mixed_rows(session: Session, name: str) -> bool:
    """Whether rows of a parameter's op are fed by several samples each, so that none of them has an owner."""
    return "fed by several samples" in session.memory.opaque.get(name, "")


def is_zero(gradient: Tensor) -> bool:
    """Whether a gradient is zero in every entry, so that no audit has anything to see."""
    return not bool(torch.count_nonzero(gradient))
