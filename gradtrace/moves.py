"""Index moves: linear calls on one parameter whose inverse carries a gradient back exactly.

Views, transposes and casts are inverted directly. What selects, repeats or scales entries (a slice, a chunk, a look-up
of constant positions, a constant factor) is undone by its own vector-Jacobian product.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gradtrace.arguments import detached, put


@dataclass(frozen=True)
class Move:
    """One index move.

    of_matrix: what moved was a whole matrix, or no axis changed places. gain: what the entries were multiplied by.
    """

    inverse: Callable[[Tensor], Tensor]
    transposes: bool
    of_matrix: bool = True
    gain: float = 1.0


_SHAPE_ONLY = frozenset(
    {
        *("view", "reshape", "unsqueeze", "squeeze", "flatten", "unflatten", "view_as", "reshape_as", "contiguous"),
        *("clone", "to", "type", "float", "double", "half", "bfloat16", "cuda", "cpu", "type_as", "alias"),
        *("__get__data", "positive", "requires_grad_", "_to_copy", "as_subclass"),
    }
)
_TRANSPOSES = frozenset({"t", "T", "mT", "transpose", "swapaxes", "swapdims", "permute", "movedim", "moveaxis"})
_EXPANDS = frozenset({"expand", "expand_as", "broadcast_to"})
_SELECTS = frozenset(
    {
        *("select", "narrow", "__getitem__", "chunk", "unsafe_chunk", "split", "unsafe_split", "split_with_sizes"),
        *("tensor_split", "hsplit", "vsplit", "dsplit", "unbind", "repeat", "tile", "repeat_interleave"),
        *("index_select", "gather", "take", "take_along_dim", "embedding", "diagonal", "roll", "flip", "rot90"),
        *("tril", "triu", "unfold", "slice", "select_copy"),
    }
)
_SCALES = frozenset({"mul", "multiply", "__mul__", "__rmul__", "div", "divide", "true_divide", "__truediv__"})
_NEGATES = frozenset({"neg", "negative", "__neg__"})
# What a call takes from its first tensor is only where it shall be, how large, or of what kind.
_OF_FIRST = frozenset({"to", "type_as", "expand_as", "view_as", "reshape_as"})
_LIKE = frozenset(
    {
        *("zeros_like", "ones_like", "full_like", "empty_like", "rand_like", "randn_like", "randint_like"),
        *("new_zeros", "new_ones", "new_full", "new_empty", "new_tensor", "new_empty_strided"),
    }
)


def lends_values(name: str, tensors: list[Tensor]) -> list[Tensor]:
    """Those of a call's tensors whose values can reach its result: of a template only shape, dtype and device do."""
    if name in _OF_FIRST:
        return tensors[:1]
    return tensors[1:] if name in _LIKE else tensors


def is_selection(name: str) -> bool:
    """Whether a call may select whole parts of its first argument by an index."""
    return name in ("__getitem__", "index_select", "select", "narrow")


def move_of(
    func: Callable[..., Any], name: str, source: Tensor, result: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any],
    place: int = 0,
) -> Move | None:  # fmt: skip
    """The index move that made `result`, the call's result number `place`, from `source`; None for anything else."""
    if source.is_complex() != result.is_complex():
        return None
    shape = source.shape
    if name in _SHAPE_ONLY and source.numel() == result.numel():
        return Move(lambda g: g.reshape(shape), transposes=False)
    if name in _TRANSPOSES and source.numel() == result.numel():
        order = _axis_order(name, source, args, kwargs)
        if order is None:
            return None
        inverse = [order.index(axis) for axis in range(len(order))]
        return Move(lambda g: g.permute(inverse), transposes=order != sorted(order), of_matrix=len(order) == 2)
    if name in _EXPANDS:
        return Move(lambda g: g.sum_to_size(shape), transposes=False, of_matrix=False)
    if name in _NEGATES:
        return Move(lambda g: -g, transposes=False, of_matrix=False)
    if name in _SCALES:
        return _scale(func, source, args, kwargs)
    if name in _SELECTS:
        undo = _vjp(func, source, args, kwargs, place)
        return Move(undo, transposes=False, of_matrix=False)
    return None


def _scale(func: Callable[..., Any], source: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Move | None:
    """A product with, or a quotient by, a constant number."""
    others = [v for v in (*args, *kwargs.values()) if v is not source]
    if len(others) != 1 or (args and args[0] is not source and "div" in getattr(func, "__name__", "")):
        return None
    (other,) = others
    on_cpu = (
        isinstance(other, Tensor) and other.dim() == 0 and other.device.type == "cpu"
    )  # no other device is waited for
    if not isinstance(other, (int, float, complex)) and not on_cpu:
        return None
    one = torch.ones((), dtype=source.dtype)
    with torch.no_grad():
        scaled = func(*put(args, source, one), **put(kwargs, source, one))
    factor = scaled.conj().item()
    return Move(lambda g: g * factor, transposes=False, of_matrix=False, gain=abs(factor))


def _vjp(
    func: Callable[..., Any], source: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any], place: int
) -> Callable[[Tensor], Tensor]:
    """The vector-Jacobian product of one linear call: run on zeros of the source's shape."""
    shape, device = tuple(source.shape), source.device
    hole = object()
    kept_args, kept_kwargs = (detached(put(given, source, hole)) for given in (args, kwargs))

    def undo(gradient: Tensor) -> Tensor:
        with torch.enable_grad():
            zeros = torch.zeros(shape, dtype=gradient.dtype, device=device, requires_grad=True)
            result = func(*put(kept_args, hole, zeros), **put(kept_kwargs, hole, zeros))
        part = result if isinstance(result, Tensor) else tuple(result)[place]
        found = torch.autograd.grad(part, zeros, gradient)[0]
        return found.to_dense() if found.is_sparse else found

    return undo


def _axis_order(name: str, source: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[int] | None:
    """result.shape[i] == source.shape[order[i]], found by moving a labelled tensor of the same rank."""
    rank = source.dim()
    if rank == 0:
        return []
    probe = torch.empty(tuple(range(2, 2 + rank)), device="meta")
    try:
        moved = probe.mT if name in ("T", "mT") else getattr(Tensor, name)(probe, *args[1:], **kwargs)
    except (TypeError, RuntimeError, AttributeError, IndexError):
        return None
    return [size - 2 for size in moved.shape]
