"""The flow of values through one traced step: where every tensor comes from, and what came out at every edge."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge

from gradtrace.bypass import NODE
from gradtrace.calls import meta_like
from gradtrace.values import CONSTANT, DATA, Origin, Provenance, Value, merged, move_of, routes, tensors_in

_IN_PLACE_OPERATORS = frozenset(
    {
        *("__setitem__", "__iadd__", "__isub__", "__imul__", "__itruediv__", "__ifloordiv__", "__ipow__", "__iand__"),
        *("__ior__", "__ixor__"),
    }
)


@dataclass(frozen=True)
class Produced:
    """A tensor that a call made: its edge then, its shape, and whether the model was running.

    border: outside any module, what an op of a function's own made: the last value before the loss, perhaps.
    """

    edge: GradientEdge
    meta: Tensor
    inside: bool
    sources: frozenset[int]
    context: Any
    parameter_only: bool
    border: bool = False


class Flow:
    """What calls made of what.

    produced: what came out at an edge (node, number). loose_ends: scalars nothing differentiable was computed from:
    losses, most likely. `on_region` is told of every reentrant checkpoint's node.
    """

    def __init__(
        self,
        provenance: Provenance,
        inside: Callable[[], bool],
        context: Callable[[], Any],
        on_region: Callable[[Any], None],
    ) -> None:
        self.provenance = provenance
        self._inside, self._context, self._on_region = inside, context, on_region
        self.produced: dict[tuple[Any, int], Produced] = {}
        self.loose_ends: dict[tuple[Any, int], Tensor] = {}
        self.dtypes: set[torch.dtype] = set()
        # Set where a function is traced: it tells sample data, and ops outside modules are no part of the loss.
        self.whole: Callable[[Tensor], bool] | None = None

    def forget(self) -> None:
        """Lets go of the graph."""
        self.loose_ends.clear()
        self.produced.clear()

    def value(self, tensor: Tensor) -> Value:
        """The origin of a tensor; for one that an unseen call made, the ops behind it."""
        value = self.provenance[tensor]
        if tensor.grad_fn is not None and tensor.grad_fn.name() == NODE:
            self._on_region(tensor.grad_fn)
        if value.origin is not Origin.UNKNOWN:
            return value
        if self.whole is not None and tensor.grad_fn is None and self.whole(tensor):
            value = self.provenance[tensor] = DATA
        elif tensor.grad_fn is not None and not value.sources:
            value = Value(Origin.UNKNOWN, sources=self._sources_behind(tensor.grad_fn))
            self.provenance[tensor] = value
            if self.whole is not None:
                self.produce(tensor, value, border=True)
        return value

    def _sources_behind(self, node: Any, most: int = 500) -> frozenset[int]:
        """The ops behind a tensor that an unseen call (a custom autograd function) made, by walking the graph."""
        found: set[int] = set()
        seen: set[Any] = set()
        queue = [node]
        by_node = {edge[0]: made for edge, made in self.produced.items()}
        while queue and len(seen) < most:
            here = queue.pop()
            if here in seen or here is None:
                continue
            seen.add(here)
            if here in by_node:
                found |= by_node[here].sources
            else:
                queue.extend(parent for parent, _ in here.next_functions)
        return frozenset(found)

    def moved(self, name: str, source: Tensor, result: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Value:
        """The origin of what a call made of one tensor alone."""
        value = self.value(source)
        if value.origin is not Origin.PARAMETER or not isinstance(result, Tensor):
            return replace(value, moves=None)
        move = move_of(name, source, result, args, kwargs) if value.moves is not None else None
        moves = None if move is None or value.moves is None else (*value.moves, move)
        return Value(Origin.PARAMETER, value.parameters, moves, value.sources)

    def note(self, result: Any, value: Value, *, border: bool = False) -> None:
        """Remembers the origin of a call's results; `border`: the call is an op."""
        for tensor in tensors_in(result):
            if value.origin is Origin.PARAMETER and not tensor.requires_grad:
                self.provenance[tensor] = CONSTANT
                continue
            known = self.provenance[tensor]
            if known.origin is Origin.PARAMETER and value.origin is Origin.PARAMETER and known.moves == ():
                continue  # the call handed a parameter through
            self.provenance[tensor] = value
            if tensor.requires_grad and tensor.grad_fn is not None:
                self.produce(tensor, value, border=border and self.whole is not None)

    def produce(self, tensor: Tensor, value: Value, *, border: bool = False) -> None:
        """Remembers what came out at a tensor's edge."""
        edge = get_gradient_edge(tensor)
        self.dtypes.add(tensor.dtype)
        if tensor.dim() == 0 and tensor.is_floating_point():
            self.loose_ends[edge.node, edge.output_nr] = tensor
        made = Produced(
            edge,
            meta_like(tensor),
            self._inside(),
            value.sources,
            self._context(),
            value.origin is Origin.PARAMETER,
            border and not self._inside(),
        )
        self.produced.setdefault((edge.node, edge.output_nr), made)  # `out.float()` may hand `out` through

    def used(self, tensors: Iterable[Tensor], result: Any) -> None:
        """Scalars that something differentiable was computed from are no loose ends any more."""
        if self.loose_ends and any(t.requires_grad for t in tensors_in(result)):
            for tensor in tensors:
                if tensor.dim() == 0 and tensor.grad_fn is not None:
                    edge = get_gradient_edge(tensor)
                    self.loose_ends.pop((edge.node, edge.output_nr), None)

    def mutated(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any], values: list[Value]) -> None:
        """Remembers what a call wrote on in place."""
        in_place = name in _IN_PLACE_OPERATORS or (name.endswith("_") and not name.endswith("__"))
        target = args[0] if in_place and args else kwargs.get("out")
        if not isinstance(target, Tensor):
            return
        value = merged(values)
        value = replace(value, routed=value.routed or routes(name, values))
        if self.provenance[target].moves == () and value.origin is Origin.PARAMETER:
            return  # a parameter renormalised or initialised in place stays itself
        for tensor in (target, target._base):
            if tensor is not None:
                self.note(tensor, merged([self.value(tensor), value]))
