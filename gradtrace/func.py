"""The functional face: gradients and group spectra of a pure function, in the manner of `torch.func.grad_and_value`."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.autograd.graph import get_gradient_edge
from torch.overrides import _get_current_function_mode_stack
from torch.utils import _pytree as pytree

from gradtrace.adapters import Adapter, Registry, registry
from gradtrace.bypass import NODE
from gradtrace.capture import Capture
from gradtrace.errors import CaptureError
from gradtrace.finish import infos, step_row
from gradtrace.groups import Labels
from gradtrace.measure import checked_coupling, checked_keep, passed, scalar, settled
from gradtrace.selection import checked_kinds
from gradtrace.session import Session
from gradtrace.settings import Settings
from gradtrace.standin import Function
from gradtrace.store.rows import KINDS
from gradtrace.survey import Memory
from gradtrace.variables import Argnums, Variables, name_of


def grad_and_spectra(
    f: Callable[..., Any],
    argnums: Argnums = 0,
    *,
    has_aux: bool = False,
    kinds: Sequence[str] = KINDS,
    keep: int | None = 64,
    parameters: str | Sequence[str] | None = None,
    sample_dim: int | None = None,
    coupling: str = "rows",
    adapters: Mapping[str, str] | Sequence[Adapter] | None = None,
) -> Callable[..., tuple[Any, Any]]:
    """A function of f's arguments and `groups=` that gives `(gradients, spectra)`; aux: `(gradients, (spectra, aux))`.

    f: returns a scalar loss, or `(loss, aux)` with `has_aux`; may call modules through `torch.func.functional_call`.
    argnums: which positional arguments hold the parameters: a tensor, or nested dicts, lists and tuples of tensors. A
        parameter is called by its path, keys joined by dots. Of several arguments, and of a bare tensor, the argument's
        name comes first.
    groups: labels, one per sample, given with each call; as in `spectra`. sample_dim: the sample axis of what f
        computes last with a parameter, or of the output of the last module that ran. Other arguments: as in `spectra`.

    Gradients have the structure of the parameters and are those of autograd, zero where the loss does not depend on a
    parameter; nothing is accumulated anywhere. The loss is `spectra.attrs["loss"]`. To an outer differentiation all
    this is constant. f may be called again, when a constant was taken for sample data; its arguments, the buffers of
    modules and the random state are put back before, so that everything is as after one call.
    """
    settings = Settings(checked_kinds(kinds), sample_dim, checked_coupling(coupling))
    plan = _Plan(f, argnums, has_aux, settings, checked_keep(keep), parameters, registry(adapters))

    @torch.compiler.disable  # a compiler would trace what watches the calls
    def run(args: tuple[Any, ...], kwargs: dict[str, Any], groups: Any) -> tuple[Any, Any]:
        from gradtrace.store.reading.tree import tree_of

        _check_surroundings(pytree.tree_leaves((args, kwargs)))
        call = _Call(plan, args, kwargs, groups)
        session = settled(call.attempt)
        row = step_row(session, step=0, keep=plan.keep)
        tree = tree_of(row, infos(session), attrs={"loss": row.loss, "coupling": coupling})
        return call.gradients(), ((tree, call.aux) if has_aux else tree)

    @functools.wraps(f)
    def measured(*args: Any, groups: Any = None, **kwargs: Any) -> tuple[Any, Any]:
        return run(args, kwargs, groups)

    return measured


@dataclass(frozen=True)
class _Plan:
    """What `grad_and_spectra` was asked for."""

    f: Callable[..., Any]
    argnums: Argnums
    has_aux: bool
    settings: Settings
    keep: int | None
    patterns: str | Sequence[str] | None
    adapters: Registry

    @property
    def name(self) -> str:
        return name_of(self.f)

    def loss_of(self, result: Any) -> tuple[Tensor, Any]:
        """The loss and aux in what f returned."""
        aux = None
        if self.has_aux:
            if not (isinstance(result, tuple) and len(result) == 2):
                raise CaptureError(
                    f"With has_aux=True {self.name} must return (loss, aux); it returned {type(result).__name__}."
                )
            result, aux = result
        return scalar(result, self.name), aux

    def check(self, loss: Tensor, leaves: Sequence[Tensor]) -> None:
        """Raises unless a backward pass from the loss to chosen tensors is possible and finds one of `leaves`."""
        nodes = _behind(loss)
        if any(node.name() == NODE for node in nodes):
            raise CaptureError(
                f"{self.name} uses reentrant activation checkpointing, which allows no gradient with respect to chosen "
                "tensors. Checkpoint with use_reentrant=False."
            )
        if not any(get_gradient_edge(leaf).node in nodes for leaf in leaves):
            raise CaptureError(
                f"The loss that {self.name} returned does not depend on its parameters (argnums={self.argnums}). "
                "Compute it from them, for a module with torch.func.functional_call, and without detach() or "
                "torch.no_grad() in between."
            )


class _Call:
    """One call: its arguments, and what the last pass over them left."""

    def __init__(self, plan: _Plan, args: tuple[Any, ...], kwargs: dict[str, Any], groups: Any) -> None:
        self._plan, self._kwargs = plan, kwargs
        self._variables = Variables.of(plan.f, plan.argnums, args)
        self._rest = self._variables.without(args)
        self._labels = Labels.read(groups)
        self._function: Function | None = None
        self._leaves: list[Tensor] = []
        self.aux: Any = None

    def attempt(self, memory: Memory) -> Session:
        """One traced forward and backward pass, from the state that the first one found."""
        if self._function is not None:
            self._function.rewind()
        rest, kwargs = pytree.tree_map(_own_leaf, (self._rest, self._kwargs))
        plan, labels, names = self._plan, self._labels, self._variables.names
        self._leaves = [tensor.detach().requires_grad_() for tensor in self._variables.tensors]
        named = dict(zip(names, self._leaves, strict=True))
        self._function = Function(named, plan.patterns, (rest, kwargs), labels.n_samples if labels else None)
        session = self._function.session(plan.settings, memory, plan.adapters)

        def work() -> None:
            result = plan.f(*self._variables.put(self._leaves, rest), **kwargs)
            loss, aux = plan.loss_of(result)
            self.aux = pytree.tree_map(_detached, aux)
            self._backward(session, loss)

        passed(session, labels.of if labels else None, work)
        if labels and plan.settings.sample_dim is None:
            self._function.check_axes(memory.sample_axes.values())
        return session

    def _backward(self, session: Session, loss: Tensor) -> None:
        self._plan.check(loss, self._leaves)
        assert self._function is not None
        run = functools.partial(loss.backward, inputs=self._leaves)
        with _without_autocast(self._leaves):
            if any(op.checkpointed for op in session.seen):
                self._function.recomputing(run)
            else:
                run()

    def gradients(self) -> Any:
        """What the last pass accumulated, in the structure of the parameters."""
        found = [torch.zeros_like(p) if p.grad is None else p.grad for p in self._leaves]
        return self._variables.structured([g.detach() for g in found])


def _behind(loss: Tensor) -> set[Any]:
    """Every node of the graph that the loss was computed by."""
    seen: set[Any] = set()
    queue: list[Any] = [get_gradient_edge(loss).node] if loss.requires_grad else []
    while queue:
        node = queue.pop()
        if node is not None and node not in seen:
            seen.add(node)
            queue.extend(parent for parent, _ in node.next_functions)
    return seen


def _without_autocast(tensors: Sequence[Tensor]) -> AbstractContextManager[Any]:
    """Backward passes, and what is computed in them, are not to be cast: they have the dtypes of the forward pass."""
    stack = ExitStack()
    for kind in {"cpu", *(t.device.type for t in tensors)}:
        if torch.is_autocast_enabled(kind):
            stack.enter_context(torch.autocast(kind, enabled=False))
    return stack


def _own_leaf(value: Any) -> Any:
    """A tensor that needs a gradient, cut off from where it comes from; anything else as it is."""
    if isinstance(value, Tensor) and value.requires_grad:
        return value.detach().requires_grad_()
    return value


def _detached(value: Any) -> Any:
    return value.detach() if isinstance(value, Tensor) else value


def _check_surroundings(values: Sequence[Any]) -> None:
    """Refuses what the capture cannot work under: function transforms, dual numbers, inference mode."""
    if torch._C._functorch.peek_interpreter_stack() is not None:
        kind = str(torch._C._functorch.peek_interpreter_stack().key()).rpartition(".")[2].lower()
        raise CaptureError(
            f"grad_and_spectra was called under torch.func.{kind}, and cannot be transformed: spectra are no tensors. "
            "For an ensemble call it in a loop, `[g({name: p[n] for name, p in stacked.items()}, ...) for n in "
            "range(models)]`. Transforms inside the function are allowed."
        )
    if any(isinstance(mode, Capture) for mode in _get_current_function_mode_stack()):
        raise CaptureError(
            "grad_and_spectra was called inside a recorded step, whose forward pass it would be taken for. Call it "
            "before the step or after."
        )
    if torch.is_inference_mode_enabled() or any(isinstance(v, Tensor) and v.is_inference() for v in values):
        raise CaptureError(
            "grad_and_spectra was called in inference mode, or on tensors made in it, where nothing can be "
            "differentiated. Use torch.no_grad() around it instead, and clone() such tensors."
        )
    if any(isinstance(v, Tensor) and forward_ad.unpack_dual(v).tangent is not None for v in values if _in_dual()):
        raise CaptureError(
            "An argument of grad_and_spectra carries a forward-mode tangent, which would be lost. Give its primal."
        )


def _in_dual() -> bool:
    return forward_ad._current_level >= 0
