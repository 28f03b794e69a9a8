"""A model's stand-in: it runs on substituted parameters and buffers, so that nothing of the user's changes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn
from torch.func import functional_call

from gradtrace.adapters import Registry
from gradtrace.selection import select
from gradtrace.session import Session, constants_of
from gradtrace.settings import Settings
from gradtrace.survey import Memory


class Standin:
    """Leaves that share the parameters' memory but have gradients of their own, and copies of the buffers."""

    def __init__(self, model: nn.Module, patterns: str | Sequence[str] | None) -> None:
        chosen, self.excluded = select(model, patterns)
        self._model = model
        self.leaves: dict[str, Tensor] = {name: p.detach().requires_grad_() for name, p in chosen.items()}
        self._buffers = {name: b.detach().clone() for name, b in model.named_buffers()}
        frozen = {name: p.detach() for name, p in model.named_parameters()}
        self._state = {**frozen, **self.leaves, **self._buffers}

    def session(self, settings: Settings, memory: Memory, adapters: Registry) -> Session:
        """A session that traces this stand-in."""
        constants = [*self._buffers.values(), *constants_of(self._model)]
        return Session(self._model, self.leaves, constants, settings, memory, adapters)

    def applied(self, work: Callable[[nn.Module], Any]) -> Any:
        """`work(model)` with the substitutes in place throughout: a backward pass may recompute the forward pass."""
        state = {f"model.{name}": value for name, value in self._state.items()}
        return functional_call(_Frame(self._model), state, (work,))

    def clear_gradients(self) -> None:
        for leaf in self.leaves.values():
            leaf.grad = None


class _Frame(nn.Module):
    """Carries the model into `functional_call` together with what shall be done with it."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, work: Callable[[nn.Module], Any]) -> Any:
        return work(self.model)
