"""Where a tensor of the forward pass comes from: parameters only, constants, or sample data.

The distinction decides what an *op* is: the call in which a value derived from parameters alone first meets data.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

from torch import Tensor

from gradtrace.moves import Move


class Origin(Enum):
    """What a value was computed from."""

    CONSTANT = 0
    PARAMETER = 1  # parameters and constants only
    DATA = 2  # sample data, possibly with parameters
    UNKNOWN = 3  # never seen before: came from outside the traced code; treated as data, but it may be a constant


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
