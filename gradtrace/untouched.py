"""Leaving a model as it was found: random state, attributes and buffers around a forward pass of ours."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import nn


@contextmanager
def random_state_kept() -> Iterator[None]:
    """The random states of Python, numpy and torch (every device in use) after the block are those before it."""
    python, arrays = random.getstate(), np.random.get_state()
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []
    with torch.random.fork_rng(devices=devices):
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(arrays)


@contextmanager
def attributes_kept(model: nn.Module) -> Iterator[None]:
    """Attributes that a forward pass sets, adds or deletes on the model's modules are put back."""
    before: list[tuple[nn.Module, dict[str, Any]]] = [(m, dict(vars(m))) for m in model.modules()]
    try:
        yield
    finally:
        for module, attributes in before:
            now = vars(module)
            for name in [n for n in now if n not in attributes]:
                del now[name]
            now.update(attributes)


_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


@contextmanager
def hooks_quiet(model: nn.Module) -> Iterator[None]:
    """The user's module hooks do not fire in the block; those of torch itself (weight norm, pruning) do."""
    before = [(m, name, vars(m)[name]) for m in model.modules() for name in _HOOKS if vars(m).get(name)]
    try:
        for module, name, hooks in before:
            ours = ((key, hook) for key, hook in hooks.items() if _is_torchs(hook))
            vars(module)[name] = type(hooks)(ours)
        yield
    finally:
        for module, name, hooks in before:
            vars(module)[name] = hooks


def _is_torchs(hook: Any) -> bool:
    return str(getattr(hook, "__module__", None) or type(hook).__module__).startswith("torch.")
