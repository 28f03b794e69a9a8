"""Where a tensor of the forward pass comes from: parameters only, constants, or sample data.

The distinction decides what an *op* is: the call in which a value derived from parameters alone first meets data.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

import torch
from torch import Tensor


class Origin(Enum):
    """What a value was computed from."""

    CONSTANT = 0
    PARAMETER = 1  # parameters and constants only
    DATA = 2  # sample data, possibly with parameters
    UNKNOWN = 3  # never seen before: came from outside the traced code; treated as data, but it may be a constant


@dataclass(frozen=True)
class Move:
    """An index move (view, transpose, cast): no arithmetic, so its inverse carries a gradient back exactly."""

    inverse: Callable[[Tensor], Tensor]
    transposes: bool
    of_matrix: bool = True  # what moved was a matrix, or no axis changed places


@dataclass(frozen=True)
class Value:
    """One tensor's origin.

    parameters: names it was derived from, when the origin is PARAMETER.
    moves: the index moves from that one parameter, outermost last; None when arithmetic came in between.
    sources: ids of the ops whose results flow into it.
    fixed: it is the same in every step (a buffer, say), as far as is known.
    routed: an index that may differ from step to step chose where its rows stand.
    """

    origin: Origin
    parameters: frozenset[str] = frozenset()
    moves: tuple[Move, ...] | None = None
    sources: frozenset[int] = frozenset()
    fixed: bool = False
    routed: bool = False


UNKNOWN = Value(Origin.UNKNOWN)
CONSTANT = Value(Origin.CONSTANT)
FIXED = Value(Origin.CONSTANT, fixed=True)
DATA = Value(Origin.DATA)


class Provenance:
    """The origin of every tensor seen so far; holds no tensor alive."""

    def __init__(self) -> None:
        self._values: dict[int, tuple[weakref.ref[Tensor], Value]] = {}

    def __getitem__(self, tensor: Tensor) -> Value:
        entry = self._values.get(id(tensor))
        return UNKNOWN if entry is None or entry[0]() is not tensor else entry[1]

    def __setitem__(self, tensor: Tensor, value: Value) -> None:
        self._values[id(tensor)] = (weakref.ref(tensor), value)

    def clear(self) -> None:
        self._values.clear()


def tensors_in(value: Any, depth: int = 6) -> Iterator[Tensor]:
    """Every tensor in nested tuples, lists, mappings, dataclasses and packed sequences, in order."""
    if isinstance(value, Tensor):
        yield value
    elif depth == 0 or value is None or isinstance(value, (str, bytes, int, float, bool, complex)):
        return
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from tensors_in(item, depth - 1)
    elif isinstance(value, dict) or hasattr(value, "keys"):
        for key in value.keys():  # noqa: SIM118  (mapping-likes need not iterate over keys)
            yield from tensors_in(value[key], depth - 1)
    elif hasattr(value, "__dataclass_fields__"):
        for name in value.__dataclass_fields__:
            yield from tensors_in(getattr(value, name, None), depth - 1)


def merged(values: Iterable[Value]) -> Value:
    """The origin of a result computed from `values`: data wins over parameters, parameters over constants."""
    found = list(values)
    sources = frozenset().union(*(v.sources for v in found)) if found else frozenset()
    routed = any(v.routed for v in found)
    if any(v.origin is Origin.DATA for v in found):
        return Value(Origin.DATA, sources=sources, routed=routed)
    if any(v.origin is Origin.UNKNOWN for v in found):
        return Value(Origin.UNKNOWN, sources=sources, routed=routed)
    if any(v.origin is Origin.PARAMETER for v in found):
        names = frozenset().union(*(v.parameters for v in found))
        return Value(Origin.PARAMETER, parameters=names, sources=sources)
    return Value(Origin.CONSTANT, sources=sources, fixed=bool(found) and all(v.fixed for v in found))


_ROUTES = frozenset(
    {
        *("__getitem__", "__setitem__", "gather", "take", "take_along_dim", "index_select", "index_add", "index_add_"),
        *("index_copy", "index_copy_", "index_put", "index_put_", "masked_select", "masked_scatter", "_grouped_mm"),
        *("scatter", "scatter_", "scatter_add", "scatter_add_", "scatter_reduce", "scatter_reduce_"),
    }
)


def routes(name: str, values: Sequence[Value]) -> bool:
    """Whether a call on `values` places rows by an index that may differ from step to step."""
    if name in ("sort", "topk"):
        return True
    return name in _ROUTES and any(not v.fixed for v in values[1:])


_SHAPE_ONLY = frozenset(
    [
        "view",
        "reshape",
        "unsqueeze",
        "squeeze",
        "flatten",
        "unflatten",
        "view_as",
        "reshape_as",
        "contiguous",
        "clone",
        "to",
        "type",
        "float",
        "double",
        "half",
        "bfloat16",
        "cuda",
        "cpu",
        "type_as",
        "alias",
        "__get__data",
        "positive",
        "requires_grad_",
        "_to_copy",
        "as_subclass",
    ]
)
_TRANSPOSES = frozenset(["t", "T", "mT", "transpose", "swapaxes", "swapdims", "permute", "movedim", "moveaxis"])


def move_of(name: str, source: Tensor, result: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Move | None:
    """The index move that made `result` from `source`, or None when the call did anything else."""
    if source.numel() != result.numel() or source.is_complex() != result.is_complex():
        return None
    if name in _SHAPE_ONLY:
        shape = source.shape
        return Move(lambda g: g.reshape(shape), transposes=False)
    if name not in _TRANSPOSES:
        return None
    order = _axis_order(name, source, args, kwargs)
    if order is None:
        return None
    inverse = [order.index(axis) for axis in range(len(order))]
    return Move(lambda g: g.permute(inverse), transposes=order != sorted(order), of_matrix=len(order) == 2)


def _axis_order(name: str, source: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[int] | None:
    """result.shape[i] == source.shape[order[i]], found by moving a labelled tensor of the same rank."""
    rank = source.dim()
    if rank == 0:
        return []
    probe = torch.empty(tuple(range(2, 2 + rank)), device="meta")
    try:
        moved = probe.mT if name in ("T", "mT") else getattr(torch, name)(probe, *args[1:], **kwargs)
    except (TypeError, RuntimeError, AttributeError, IndexError):
        return None
    return [size - 2 for size in moved.shape]
