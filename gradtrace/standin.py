"""Stand-ins: a model or a function runs on substituted parameters, so that the user's get no gradient and no hook."""

from __future__ import annotations

import functools
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call

from gradtrace.adapters import Registry
from gradtrace.errors import CaptureError, GroupError
from gradtrace.selection import select
from gradtrace.session import Session, constants_of
from gradtrace.settings import Settings
from gradtrace.survey import Memory
from gradtrace.values import FIXED, Origin, Provenance, tensors_in


class Standin:
    """Leaves that share the parameters' memory but have gradients of their own, and copies of the buffers."""

    def __init__(self, model: nn.Module, patterns: str | Sequence[str] | None) -> None:
        chosen, self.excluded = select(model, patterns)
        self._model = model
        written = _written_when_read(model)
        frozen = {
            name: nn.Parameter(p.detach().clone() if id(p) in written else p.detach(), requires_grad=name in chosen)
            for name, p in model.named_parameters()
        }
        self.leaves: dict[str, Tensor] = {name: frozen[name] for name in chosen}
        self._buffers = {name: b.detach().clone() for name, b in model.named_buffers()}
        self._state = {**frozen, **self._buffers}

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


class Function:
    """Leaves in place of a function's parameters, and what the function called and was given.

    given: the function's other arguments. n_samples: the number of labels; of the tensors that come from outside, those
    with an axis that long count as sample data, others as unknown. A probe that finds an unknown value shared by all
    samples takes it for a constant; one that finds a sample's data mixed takes the samples for coupled.
    """

    def __init__(
        self, leaves: Mapping[str, Tensor], patterns: str | Sequence[str] | None, given: Any, n_samples: int | None
    ) -> None:
        named = _Named(leaves)
        self._named, (self._chosen, _) = named, select(named, patterns)
        self._rest = [leaf for name, leaf in leaves.items() if name not in self._chosen]
        self._given, self._n_samples = list(tensors_in(given)), n_samples
        self._parameters: dict[nn.Module, dict[str, Tensor]] = {}  # of the outermost modules that ran, as they ran
        self._varied: list[nn.Module] = []
        self._before = _Rewind(self._given)

    def session(self, settings: Settings, memory: Memory, adapters: Registry) -> Session:
        """A session that traces this stand-in."""
        session = Session(self._named, self._chosen, self._rest, settings, memory, adapters)
        session.capture.flow.whole = self._is_sample_data
        session.modules.belongs = functools.partial(self._met, session.capture.flow.provenance)
        session.modules.on_enter = lambda args: None  # a module may well be called on constants
        return session

    def _is_sample_data(self, tensor: Tensor) -> bool:
        if self._n_samples is None:
            return any(tensor is given for given in self._given)
        return self._n_samples in tensor.shape

    def check_axes(self, found: Iterable[int]) -> None:
        """Raises where an axis found by its length is neither the first nor that of the samples in any argument."""
        size = self._n_samples
        known = {t.shape.index(size) for t in self._given if size in t.shape}
        wrong = set(found) - known - {0}
        if known and wrong:
            raise GroupError(
                f"There are {size} labels. What the function computed last from its parameters has that length along "
                f"axis {min(wrong)}, its arguments along {sorted(known)}: it may not count the samples. Say which axis "
                f"does with sample_dim=, be it {min(wrong)}."
            )

    def _met(self, provenance: Provenance, module: nn.Module) -> bool:
        """Whether a module that begins to run is part of what is traced, or, as a criterion is, of the loss."""
        own: dict[str, Tensor] = dict(module.named_parameters(remove_duplicate=False))
        known = self._parameters.setdefault(module, own)
        if any(known.get(name) is not tensor for name, tensor in own.items()):
            self._varied.append(module)
        self._before.remember(module.buffers())
        if not any(provenance[tensor].origin is Origin.PARAMETER for tensor in own.values()):
            return False
        for tensor in [*own.values(), *constants_of(module)]:
            if provenance[tensor].origin is not Origin.PARAMETER and tensor.grad_fn is None:
                provenance[tensor] = FIXED
        return True

    def recomputing(self, work: Callable[[], None]) -> None:
        """`work` with every module on the parameters it ran on: checkpoints run modules again in the backward pass.

        Buffers are copies then, so that none is updated twice.
        """
        if self._varied:
            raise CaptureError(
                f"{type(self._varied[0]).__name__} ran with several sets of parameters, and activation checkpointing "
                "runs it again in the backward pass, where none of them is in place any more. Do without the "
                "checkpoint, or call the function once per set."
            )
        frame = _Frame(nn.ModuleList(self._parameters))
        state = {f"model.{name}": buffer.clone() for name, buffer in frame.model.named_buffers()}
        for place, own in enumerate(self._parameters.values()):
            state |= {f"model.{place}.{name}": tensor for name, tensor in own.items()}
        functional_call(frame, state, (lambda _: work(),), tie_weights=False)

    def rewind(self) -> None:
        """Puts the random state, and what the function was given or met, back to what they were before it ran."""
        self._before.restore()


def _written_when_read(model: nn.Module) -> set[int]:
    """Parameters whose memory no stand-in may share: an embedding with `max_norm` scales the rows that it looks up."""
    readers = [module for module in model.modules() if getattr(module, "max_norm", None) is not None]
    return {id(p) for module in readers for p in module.parameters(recurse=False)}


class _Named(nn.Module):
    """Parameters by name, whatever the names are."""

    def __init__(self, leaves: Mapping[str, Tensor]) -> None:
        super().__init__()
        self._leaves = dict(leaves)

    def named_parameters(self, *_: Any, **__: Any) -> Iterator[tuple[str, Any]]:
        yield from self._leaves.items()


class _Rewind:
    """The random states of Python, numpy and torch, and the values of tensors, at one moment."""

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        self._python, self._arrays = random.getstate(), np.random.get_state()
        self._cpu = torch.get_rng_state()
        self._devices = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
        self._values: dict[int, tuple[Tensor, Tensor]] = {}
        self.remember(tensors)

    def remember(self, tensors: Iterable[Tensor]) -> None:
        for tensor in tensors:
            if id(tensor) not in self._values:
                self._values[id(tensor)] = (tensor, tensor.detach().clone())

    def restore(self) -> None:
        random.setstate(self._python)
        np.random.set_state(self._arrays)
        torch.set_rng_state(self._cpu)
        if self._devices:
            torch.cuda.set_rng_state_all(self._devices)
        for tensor, value in self._values.values():
            tensor.data.copy_(value)  # by `data`: to a graph that the tensor is saved in, nothing has changed


class _Frame(nn.Module):
    """Carries the model into `functional_call` together with what shall be done with it."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, work: Callable[[nn.Module], Any]) -> Any:
        return work(self.model)
