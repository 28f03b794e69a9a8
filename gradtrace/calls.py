"""One op call as an adapter sees it."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from gradtrace.errors import AdapterError

Path = tuple[int | str, ...]  # where a tensor stands among a call's arguments


@dataclass(frozen=True)
class OpCall:
    """A torch call in which a value made of parameters alone, its *effective weight*, met sample data.

    function, args, kwargs: the call, its tensors detached.
    operand: where the effective weight stands, as a path: `(1,)`, `("weight",)`, or `(0, 2)` inside a list.
    output: shape and dtype of the output, as a tensor on the meta device.
    owners: the sample that owns each element of the output, -1 for none: with as many axes as the output, each of the
    output's size or, where the owner does not vary along it, of size one. On the host, wherever the data is.
    position: which of the call's outputs that is.
    noted: what the adapter noted just before the call (see `gradtrace.adapters.NotingAdapter`).
    """

    function: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    operand: Path = (1,)
    output: Tensor | None = None
    owners: Tensor | None = None
    position: int = 0
    noted: Any = None

    @property
    def name(self) -> str:
        """The function's own name, such as `linear` or `__matmul__`; for an op of a library, as `library::linear`."""
        return name_of(self.function)

    @property
    def weight(self) -> Tensor:
        """The effective weight, detached."""
        return self.at(self.operand)

    def at(self, path: Path) -> Tensor:
        """The tensor at a path among the arguments."""
        value: Any = self.kwargs[path[0]] if isinstance(path[0], str) else self.args[path[0]]
        for key in path[1:]:
            value = value[key]
        return value

    def argument(self, position: int, name: str, default: Any = None) -> Any:
        """The argument at `position` or called `name`."""
        if position < len(self.args):
            return self.args[position]
        return self.kwargs.get(name, default)

    def is_operand(self, position: int, name: str) -> bool:
        """Whether the effective weight is the argument at `position` or called `name`."""
        return self.operand in ((position,), (name,))

    def owner_rows(self, axes: tuple[int, ...], shape: tuple[int, ...]) -> Tensor:
        """Owners of the rows spanned by the output's `axes` (of sizes `shape`); fails where an owner cuts a row."""
        if self.owners is None:
            raise AdapterError(
                f"The owners of `{self.name}` are not known yet; ask for them in `factors`, not `claims`."
            )
        return owner_rows(self.name, self.owners, axes, shape)


@dataclass(frozen=True)
class Adjoint:
    """The adjoint of one output of a call, and the owner of every element of it (as `OpCall.owners`)."""

    value: Tensor
    owners: Tensor


def owner_rows(name: str, owners: Tensor, axes: tuple[int, ...], shape: tuple[int, ...]) -> Tensor:
    """Owners of the rows spanned by `axes` (of sizes `shape`), flat; RowsCutError where an owner cuts a row."""
    if any(size != 1 for axis, size in enumerate(owners.shape) if axis not in axes):
        raise RowsCutError(name)
    order = [*axes, *(a for a in range(owners.dim()) if a not in axes)]
    kept = owners.permute(order).reshape([owners.shape[a] for a in axes])
    return kept.expand(shape).reshape(-1)


@functools.lru_cache(maxsize=4096)
def name_of(function: Callable[..., Any]) -> str:
    """A function's own name; for an op of a library, in whichever form it is called, `library::op`."""
    function = getattr(function, "_opoverload", function)  # what `torch.library.custom_op` returns holds an overload
    function = getattr(function, "_overloadpacket", function)  # and an overload belongs to the op
    return str(getattr(function, "_qualified_op_name", None) or getattr(function, "__name__", function))


class RowsCutError(AdapterError):
    """An owner changes within a row: the op's output has no rows that belong to one sample each."""

    def __init__(self, name: str) -> None:
        super().__init__(f"The rows of `{name}` belong to several samples each; it is measured locally instead.")


def cast_as_used(activation: Tensor, adjoint: Tensor) -> Tensor:
    """The activation in the dtype the op used: under autocast, or for a mask of booleans, that of its output."""
    if activation.dtype == adjoint.dtype or (activation.is_complex() and not adjoint.is_complex()):
        return activation
    return activation.to(adjoint.dtype)


def is_dense(value: Any) -> bool:
    """Whether `value` is an ordinary tensor: strided, and neither sparse nor nested."""
    return isinstance(value, Tensor) and value.layout == torch.strided and not value.is_nested


def meta_like(tensor: Tensor) -> Tensor:
    """Shape and dtype of `tensor`, holding no data."""
    return torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")
