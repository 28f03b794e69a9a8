"""The flow of values through one traced step: where every tensor comes from, and what came out at every edge."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge

from gradtrace.bypass import NODE
from gradtrace.calls import meta_like
from gradtrace.moves import is_selection, move_of
from gradtrace.values import CONSTANT, DATA, Origin, Provenance, Value, merged, routes, tensors_in

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
    place: tuple[str, str, int, int] = ("", "", 0, 0)  # the same in every step: module, kind of node, rank, which one


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
        where: Callable[[], str] = str,
    ) -> None:
        self.provenance = provenance
        self._where = where
        self._counted: Counter[tuple[str, str, int]] = Counter()
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
        self.restart_count()

    def restart_count(self) -> None:
        """Count values from one again: another micro-batch begins."""
        self._counted.clear()

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
        """The origin of what a getter made of a tensor."""
        return self._moved(getattr(torch, name, None), name, source, result, args, kwargs, 0)

    def made(
        self, func: Callable[..., Any], name: str, args: tuple[Any, ...], kwargs: dict[str, Any], lent: list[Tensor],
        result: Any, *, shared: bool = False,
    ) -> None:  # fmt: skip
        """Remembers what a call that is no op made of the values that it was lent.

        shared: those that are no parameters count as constants.
        """
        values = [self.value(t) for t in lent]
        movable = {id(t): t for t, v in zip(lent, values, strict=True) if v.origin is Origin.PARAMETER}
        chosen = shared or is_chosen(name, args, lent, values)
        if len(movable) == 1 and (chosen or all(v.origin in (Origin.PARAMETER, Origin.CONSTANT) for v in values)):
            (source,) = movable.values()
            for place, tensor in enumerate(tensors_in(result)):
                self.note(tensor, self._moved(func, name, source, tensor, args, kwargs, place))
            return
        value = merged(v for v in values if v.origin is Origin.PARAMETER or not shared)
        value = replace(value, routed=value.routed or routes(name, values))
        self.note(result, value, border=func is torch.autograd.grad)  # a graph of its own leads to parameters

    def _moved(
        self, func: Any, name: str, source: Tensor, result: Any, args: tuple[Any, ...], kwargs: dict[str, Any],
        place: int,
    ) -> Value:  # fmt: skip
        value = self.value(source)
        if value.origin is not Origin.PARAMETER or not isinstance(result, Tensor):
            return replace(value, moves=None)
        move = move_of(func, name, source, result, args, kwargs, place) if value.moves is not None else None
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
        if (edge.node, edge.output_nr) in self.produced:
            return  # `out.float()` may hand `out` through
        kind = (self._where(), edge.node.name(), tensor.dim())
        self._counted[kind] += 1
        made = Produced(
            edge,
            meta_like(tensor),
            self._inside(),
            value.sources,
            self._context(),
            value.origin is Origin.PARAMETER,
            border and not self._inside(),
            (*kind, self._counted[kind]),
        )
        self.produced[edge.node, edge.output_nr] = made

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


def is_chosen(name: str, args: tuple[Any, ...], tensors: Sequence[Tensor], values: Sequence[Value]) -> bool:
    """Whether a call takes one part of a parameter, named by what the model computed: an expert, say.

    That makes it no op: the part is used by all samples that chose it, in whatever comes next.
    """
    return picks(name, args, tensors, values) and all(t.dim() == 0 for t in tensors[1:])


def picks(name: str, args: tuple[Any, ...], tensors: Sequence[Tensor], values: Sequence[Value]) -> bool:
    """Whether a call takes parts of a parameter by indices that the model computed."""
    if not is_selection(name) or not args or not tensors or args[0] is not tensors[0]:
        return False
    index = list(zip(tensors, values, strict=True))[1:]
    return values[0].origin is Origin.PARAMETER and all(_is_integer(t) and v.sources for t, v in index)


def _is_integer(tensor: Tensor) -> bool:
    return not (tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool)
