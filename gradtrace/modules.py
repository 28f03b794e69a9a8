"""Which module is running: names for ops, and the border between the model and the loss.

A function has no model. There the modules that it calls are met as they run; whoever traces it says which belong.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import contextmanager
from typing import Any

from torch import nn
from torch.nn.modules.module import (
    _global_forward_hooks_with_kwargs,
    register_module_forward_hook,
    register_module_forward_pre_hook,
)


class ModuleStack:
    """The modules of one model that are running now, innermost last. Uses torch's global hooks, none on the model.

    `belongs`, where it is set, is asked about every outermost module; what it answers yes to is followed from then on.
    """

    def __init__(self, model: nn.Module) -> None:
        self._names = {id(module): name for name, module in model.named_modules()}
        self._running: list[str] = []
        self.entries: list[tuple[nn.Module, str, Any, Any]] = []  # outermost calls: module, name, args, kwargs
        self.on_enter: Callable[[Any], None] = lambda args: None
        self.on_leave: Callable[[Any], None] = lambda output: None
        self.belongs: Callable[[nn.Module], bool] | None = None

    @property
    def name(self) -> str:
        """Qualified name of the innermost running module; empty for the model itself and outside it."""
        return self._running[-1] if self._running else ""

    @property
    def inside(self) -> bool:
        """Whether any module of the model is running."""
        return bool(self._running)

    @contextmanager
    def watching(self) -> Any:
        """Follow the model's modules while the context lasts."""
        handles = [
            register_module_forward_pre_hook(self._enter),
            register_module_forward_hook(self._leave, with_kwargs=True, always_call=True),
        ]
        try:
            yield self
        finally:
            for handle in handles:
                handle.remove()
                _global_forward_hooks_with_kwargs.pop(handle.id, None)  # `remove` forgets this entry
            self._running.clear()
            self.entries.clear()

    def _enter(self, module: nn.Module, args: Any) -> None:
        if self.belongs is not None and not self._running and self.belongs(module):
            for path, part in module.named_modules():
                self._names.setdefault(id(part), path)
        name = self._names.get(id(module))
        if name is not None:
            if not self._running:
                self.on_enter((args, _keywords_of(module)))
            self._running.append(name)

    def _leave(self, module: nn.Module, args: Any, *rest: Any) -> None:
        """Called with keyword arguments and output, or, when the forward pass raised, with the output alone."""
        if not self._running or id(module) not in self._names:
            return
        if len(self._running) == 1:
            self.on_leave(rest[-1])
        name = self._running.pop()
        if not self._running and len(rest) == 2:
            self.entries.append((module, name, args, rest[0]))


def _keywords_of(module: nn.Module, most: int = 4) -> Any:
    """The keyword arguments of the call of `module` that runs its pre-hooks now.

    Torch hands them to a pre-hook of the module's own only, and on the model nothing is ever set: so they are read
    where torch has them.
    """
    frame = sys._getframe(1)
    for _ in range(most):
        if frame is None:
            break
        if frame.f_globals.get("__name__") == nn.Module.__module__ and frame.f_locals.get("self") is module:
            return frame.f_locals.get("kwargs", {})
        frame = frame.f_back  # type: ignore[assignment]
    return {}
