"""Passing reentrant activation checkpoints by, in a shadow forward pass.

`torch.utils.checkpoint` with `use_reentrant=True` runs its region without gradients, inside a custom autograd function
that refuses `torch.autograd.grad`. In a shadow pass the region's calls run with gradients instead, and whoever reads
the region's result is handed the value that still remembers how it was computed.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import CheckpointFunction

from gradtrace.arguments import changed
from gradtrace.values import Provenance, tensors_in

NODE = "CheckpointFunctionBackward"
_REGION = CheckpointFunction.forward.__code__


class Bypass:
    """The results of checkpointed regions, each with an alias made inside the region."""

    def __init__(self) -> None:
        self._aliases: dict[int, tuple[Tensor, Tensor]] = {}

    def call(
        self, run: Callable[..., Any], func: Any, name: str, args: Any, kwargs: Any, provenance: Provenance
    ) -> Any:
        """The call on values that remember their history, with gradients on inside a region."""
        args, kwargs = self._linked(args), self._linked(kwargs)
        if torch.is_grad_enabled() or not _in_region():
            return run(func, name, args, kwargs)
        with torch.enable_grad():
            result = run(func, name, args, kwargs)
            for tensor in tensors_in(result):
                if tensor.requires_grad and tensor.grad_fn is not None:
                    alias = tensor.view_as(tensor)
                    provenance[alias] = provenance[tensor]
                    self._aliases[id(tensor)] = (tensor, alias)
        return result

    def _linked(self, value: Any) -> Any:
        return changed(value, self._alias_of)

    def _alias_of(self, value: Any) -> Any:
        if not isinstance(value, Tensor) or value.grad_fn is None or value.grad_fn.name() != NODE:
            return value
        return self._aliases.get(id(value), (value, value))[1]


def _in_region() -> bool:
    frame = sys._getframe()
    while frame is not None:
        if frame.f_code is _REGION:
            return True
        frame = frame.f_back  # type: ignore[assignment]
    return False


def has_region(start: Any) -> bool:
    """Whether a reentrant checkpoint lies behind a node of the graph."""
    seen, queue = set(), [start]
    while queue:
        node = queue.pop()
        if node is None or node in seen:
            continue
        if node.name() == NODE:
            return True
        seen.add(node)
        queue.extend(parent for parent, _ in node.next_functions)
    return False


def in_recompute() -> bool:
    """Whether a backward pass runs a region again."""
    node = torch._C._current_autograd_node()
    return node is not None and node.name() == NODE


def in_checkpoint() -> bool:
    """Whether non-reentrant activation checkpointing holds back what autograd saves now."""
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)
    return hooks is not None and getattr(hooks[0], "__qualname__", "").startswith("_checkpoint_hook")
