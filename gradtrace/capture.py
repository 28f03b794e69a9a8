"""Sees the calls of a forward pass and brings back the ops, with a hook on each output that delivers its adjoint.

The live step is ordinary autograd: calls run as they would, on the same tensors, in the same order.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.overrides import TorchFunctionMode, _pop_mode, _push_mode

from gradtrace.adapters import Registry, is_noting
from gradtrace.arguments import detached, paths
from gradtrace.bypass import Bypass, in_checkpoint, in_recompute
from gradtrace.calls import OpCall, meta_like, name_of
from gradtrace.composite import enterable, entered
from gradtrace.flow import Flow, is_chosen, picks
from gradtrace.modules import ModuleStack
from gradtrace.moves import lends_values
from gradtrace.ops import Op, Operand, OpKey, Output
from gradtrace.values import DATA, Origin, Provenance, Value, routes, tensors_in

_PLAIN = frozenset(
    {
        *("size", "dim", "ndimension", "stride", "numel", "nelement", "is_floating_point", "is_complex"),
        *("is_contiguous", "storage_offset", "data_ptr", "element_size", "item", "tolist", "numpy", "get_device"),
        *("_set_grad_enabled", "is_nonzero", "is_signed", "is_same_size", "untyped_storage", "has_names"),
        *("__int__", "__float__", "__bool__", "__hash__", "__index__", "__len__", "__format__", "__repr__"),
        "retain_grad",
    }
)
_GETTERS_OF_TENSORS = frozenset(("T", "mT", "H", "mH", "data", "real", "imag"))


class Listener(Protocol):
    """Who is told what the capture sees."""

    context: Any

    def captured(self, op: Op) -> None: ...

    def adjoint(self, op: Op, output: int, grad: Tensor) -> None: ...

    def effective(self, edge: GradientEdge, grad: Tensor) -> None: ...

    def before_backward(self, root: Tensor, gradient: Tensor | None, retained: bool) -> None: ...

    def after_backward(self, retained: bool) -> None: ...

    def transparent(self, key: OpKey) -> bool: ...


class Capture(TorchFunctionMode):
    """The torch-function mode of one traced step; `flow` knows where its values come from."""

    def __init__(self, modules: ModuleStack, provenance: Provenance, adapters: Registry, listener: Listener) -> None:
        super().__init__()
        self.bypass: Bypass | None = None
        self.hooked = False  # whether the user's hooks may change the adjoint of a value
        self.leaf_hooks: list[Any] = []  # the user's hooks on parameters: they fire in any pass that ends there
        self._modules = modules
        self.flow = Flow(
            provenance, lambda: modules.inside, lambda: listener.context, self._watch_recompute, lambda: modules.name
        )
        self._adapters, self._listener = adapters, listener
        self._silent = False
        self._calls: Counter[tuple[str, str, tuple[str, ...]]] = Counter()
        self._numbers = 0
        self._effective: set[tuple[Any, int]] = set()
        self._recomputed: set[Any] = set()
        self._hooks: list[Any] = []
        self.batch_norms: list[Any] = []
        modules.on_enter, modules.on_leave = self._entered_model, self._left_model

    @contextmanager
    def silence(self) -> Iterator[None]:
        """Passes over the graph that are ours: nothing is captured and no hook of the user's fires."""
        if self._silent:
            yield
            return
        self._silent = True
        held = [(hooks, dict(hooks)) for hooks in self.leaf_hooks]
        for hooks, _ in held:
            hooks.clear()
        try:
            yield
        finally:
            for hooks, saved in held:
                hooks.update(saved)
            self._silent = False

    @property
    def silent(self) -> bool:
        return self._silent

    def forget(self) -> None:
        """Drop everything that refers to the graph of the steps seen so far.

        Hooks too: node, hook and op would hold each other, through C++, where no garbage collector looks.
        """
        for handle in self._hooks:
            handle.remove()
        self._hooks.clear()
        self.flow.forget()
        self._effective.clear()
        self._recomputed.clear()
        self.batch_norms.clear()
        self._calls.clear()

    def restart_count(self) -> None:
        """Count calls from one again: another micro-batch begins."""
        self._calls.clear()
        self.flow.restart_count()

    # ------------------------------------------------------------------ dispatch

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        name = name_of(func)
        if self._silent or name in _PLAIN or torch._C._functorch.peek_interpreter_stack() is not None:
            return func(*args, **kwargs)
        if name == "__get__":
            return self._getter(func, args)
        if name == "backward" and func is Tensor.backward:
            asked = dict(zip(("root", "gradient", "retain_graph", "create_graph"), args, strict=False)) | kwargs
            retained = bool(asked.get("retain_graph") or asked.get("create_graph"))
            self._listener.before_backward(args[0], asked.get("gradient"), retained)
            result = func(*args, **kwargs)
            self._listener.after_backward(retained)
            return result
        if name == "register_hook" and func is Tensor.register_hook:
            self.hooked = True
            return func(args[0], self._quiet(args[1] if len(args) > 1 else kwargs["hook"]))
        if torch._C._current_graph_task_id() != -1 and not in_recompute():
            return func(*args, **kwargs)
        if self.bypass is not None:
            return self.bypass.call(self._call, func, name, args, kwargs, self.flow.provenance)
        return self._call(func, name, args, kwargs)

    def _getter(self, func: Callable[..., Any], args: tuple[Any, ...]) -> Any:
        result = func(*args)
        attribute = getattr(getattr(func, "__self__", None), "__name__", "")
        if attribute == "grad_fn" and result is not None and result.name() == "BackwardHookFunctionBackward":
            return _QuietNode(result, self._quiet)
        if isinstance(result, Tensor) and attribute in _GETTERS_OF_TENSORS:
            self.flow.note(result, self.flow.moved(attribute, args[0], result, args, {}))
        return result

    def _quiet(self, hook: Callable[..., Any]) -> Callable[..., Any]:
        """The user's hook, not firing in passes of ours."""

        @functools.wraps(hook)
        def fire(*args: Any) -> Any:
            return None if self._silent else hook(*args)

        return fire

    def _left_model(self, output: Any) -> None:
        """What the model returns is the model's, also where an unseen call (a custom autograd function) made it."""
        with self.silence():
            for tensor in tensors_in(output):
                if tensor.requires_grad and tensor.grad_fn is not None:
                    self.flow.produce(tensor, self.flow.value(tensor))

    def _entered_model(self, args: Any) -> None:
        for tensor in tensors_in(args):
            if self.flow.provenance[tensor].origin in (Origin.UNKNOWN, Origin.CONSTANT):
                self.flow.provenance[tensor] = DATA

    # ------------------------------------------------------------------ calls

    def _call(self, func: Callable[..., Any], name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        tensors = list(tensors_in((args, kwargs)))
        lent = lends_values(name, tensors)
        values = [self.flow.value(t) for t in lent]
        weights = any(v.origin is Origin.PARAMETER and t.requires_grad for t, v in zip(lent, values, strict=True))
        meets = any(v.origin in (Origin.DATA, Origin.UNKNOWN) for v in values)
        if weights and meets and torch.is_grad_enabled() and not is_chosen(name, args, lent, values):
            return self._op(func, name, args, kwargs, values)
        result = func(*args, **kwargs)
        self.flow.used(tensors, result)
        if not lent and not self._modules.inside:
            return result  # data may be made within the step; only what the model makes by itself is a constant
        self.flow.made(func, name, args, kwargs, lent, result)
        self.flow.mutated(name, args, kwargs, values)
        if name == "batch_norm":
            self._note_batch_norm(args, kwargs, result)
        return result

    def _op(
        self,
        func: Callable[..., Any],
        name: str,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        values: list[Value],
    ) -> Any:
        operands = list(self._operands(func, args, kwargs))
        if not any(o.adapter for o in operands) and enterable(func):
            with self:
                return entered(func)(*args, **kwargs)
        op = self._begin(func, name, args, kwargs, operands, values)
        result = func(*args, **kwargs)
        made = _written(args[0]) if name == "__setitem__" else result
        self.flow.used(tensors_in((args, kwargs)), made)
        if self._listener.transparent(op.key):
            self.flow.made(func, name, args, kwargs, list(tensors_in((args, kwargs))), made, shared=True)
            return result
        outputs = [(i, t) for i, t in enumerate(tensors_in(made)) if t.requires_grad]
        if name == "batch_norm":
            self._note_batch_norm(args, kwargs, result)
        self.flow.mutated(name, args, kwargs, values)
        sources = frozenset((op.number,)) if outputs else op.sources
        value = Value(Origin.DATA, sources=sources, routed=op.routed)
        self.flow.note((made, args[0]) if name == "__setitem__" else made, value, border=True)
        if outputs:
            self._follow(op, outputs)
        return result

    def _operands(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[Operand]:
        plain_args, plain_kwargs = detached(args), detached(kwargs)
        for path, tensor in paths(args, kwargs):
            value = self.flow.provenance[tensor]
            if value.origin is Origin.PARAMETER and tensor.requires_grad:
                adapter = self._adapters.claimant(OpCall(func, plain_args, plain_kwargs, path))
                edge = get_gradient_edge(tensor)
                if value.moves is None and (edge.node, edge.output_nr) not in self._effective:
                    self._effective.add((edge.node, edge.output_nr))
                    self._hooks.append(tensor.register_hook(functools.partial(self._effective_ready, edge)))
                yield Operand(path, edge, value, tuple(tensor.shape), tensor.dtype, adapter)

    def _begin(
        self,
        func: Callable[..., Any],
        name: str,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        operands: list[Operand],
        values: list[Value],
    ) -> Op:
        names = tuple(sorted(frozenset().union(*(o.value.parameters for o in operands))))
        family = (self._modules.name, name, names)
        key = OpKey(*family, nth=self._calls[family])
        self._calls[family] += 1
        self._numbers += 1
        keep = any(o.adapter for o in operands)
        plain_args, plain_kwargs = (detached(args), detached(kwargs)) if keep else ((), {})
        data = [v for v in values if v.origin in (Origin.DATA, Origin.UNKNOWN)]
        given = [t for t in tensors_in((args, kwargs)) if self.flow.value(t).origin is not Origin.PARAMETER]
        return Op(
            number=self._numbers,
            key=key,
            function=func,
            args=plain_args,
            kwargs=plain_kwargs,
            operands=operands,
            outputs=[],
            born=torch._C._autograd._get_sequence_nr(),
            sources=frozenset().union(*(v.sources for v in values)),
            context=self._listener.context,
            checkpointed=in_checkpoint(),
            unseen_input=all(v.origin is Origin.UNKNOWN for v in data)
            or picks(name, args, list(tensors_in((args, kwargs))), values),
            integers=all(not (t.is_floating_point() or t.is_complex()) for t in given),
            routed=any(v.routed for v in values) or routes(name, values),
            input_shapes=tuple("x".join(map(str, t.shape)) for t in given),
            versions=[(t, t._version) for t in tensors_in((plain_args, plain_kwargs)) if not t.is_inference()],
            notes=_notes(func, plain_args, plain_kwargs, operands),
        )

    def _follow(self, op: Op, outputs: list[tuple[int, Tensor]]) -> None:
        for place, (position, tensor) in enumerate(outputs):
            source = _base_of(tensor, op.born)
            op.outputs.append(Output(get_gradient_edge(source), meta_like(tensor), tuple(source.shape), position))
            self._hooks.append(source.register_hook(functools.partial(self._adjoint, op, place)))
        op.versions = [(t, t._version) for t, _ in op.versions]  # as the call left them
        self._listener.captured(op)

    def _adjoint(self, op: Op, position: int, grad: Tensor) -> None:
        if not self._silent:
            with torch.no_grad(), self.silence():
                self._listener.adjoint(op, position, op.outputs[position].adjoint(grad.detach()))  # create_graph=True

    def _effective_ready(self, edge: GradientEdge, grad: Tensor) -> None:
        if not self._silent:
            with torch.no_grad(), self.silence():
                self._listener.effective(edge, grad)

    def _watch_recompute(self, node: Any) -> None:
        """A reentrant checkpoint runs its part of the forward pass again, in the backward pass, where no mode is on."""
        if node not in self._recomputed:
            self._recomputed.add(node)
            self._hooks += [
                node.register_prehook(lambda grads: None if self._silent else _push_mode(self)),
                node.register_hook(lambda *_: None if self._silent else _pop_mode() and None),
            ]

    def _note_batch_norm(self, args: tuple[Any, ...], kwargs: dict[str, Any], result: Tensor) -> None:
        training = args[5] if len(args) > 5 else kwargs.get("training", False)
        if training and isinstance(result, Tensor) and result.grad_fn is not None:
            self.batch_norms.append(result.grad_fn)
            self._hooks.append(result.grad_fn.register_hook(self._frozen_batch_norm))

    frozen = False

    def _frozen_batch_norm(self, grad_inputs: tuple[Any, ...], grad_outputs: tuple[Any, ...]) -> Any:
        """In passes that ask for ownership, batch statistics count as constants: no sample reaches another."""
        if not (self._silent and self.frozen) or grad_inputs[0] is None or grad_outputs[0] is None:
            return None
        return (grad_outputs[0].to(grad_inputs[0].dtype), *grad_inputs[1:])


class _QuietNode:
    """The node of a module's full backward hook; hooks put on it stay quiet in passes of ours."""

    def __init__(self, node: Any, quiet: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
        self._node, self._quiet = node, quiet

    def name(self) -> str:
        return str(self._node.name())

    def register_hook(self, hook: Callable[..., Any]) -> Any:
        return self._node.register_hook(self._quiet(hook))

    def register_prehook(self, hook: Callable[..., Any]) -> Any:
        return self._node.register_prehook(self._quiet(hook))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._node, name)


def _written(tensor: Tensor) -> Tensor:
    """What an assignment to entries of `tensor` makes: writing on a view makes its base anew, and every other view."""
    base = tensor._base if tensor._is_view() else None
    return tensor if base is None or base.grad_fn is None else base


def _base_of(tensor: Tensor, born: int) -> Tensor:
    """What the op made before it reshaped it into `tensor`; `tensor` itself where it is no such view."""
    base = tensor._base if tensor._is_view() else None
    if base is None or base.grad_fn is None or base.grad_fn._sequence_nr() < born:
        return tensor
    plain = base.numel() == tensor.numel() and base.is_contiguous() and tensor.is_contiguous()
    return base if plain else tensor


def _notes(func: Callable[..., Any], args: Any, kwargs: Any, operands: list[Operand]) -> dict[str, Any]:
    """What adapters note just before the call, by their names."""
    first = {o.adapter.name: o for o in reversed(operands) if o.adapter}
    return {
        name: o.adapter.note(OpCall(func, args, kwargs, o.path)) for name, o in first.items() if is_noting(o.adapter)
    }
