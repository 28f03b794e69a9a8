"""One traced step: listens to the capture, has owners found before each backward pass, and gathers during it."""

from __future__ import annotations

import sys
import time
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

from gradtrace.adapters import Registry
from gradtrace.audit import Audit
from gradtrace.calls import Adjoint
from gradtrace.capture import Capture
from gradtrace.contributions import contributions, storages
from gradtrace.errors import CaptureError
from gradtrace.gather import Gathered
from gradtrace.groups import Cells, Labels, check_types
from gradtrace.kinds import Shared
from gradtrace.modules import ModuleStack
from gradtrace.ops import Op, OpKey
from gradtrace.prepare import by_layout, prepare
from gradtrace.settings import Batch, Settings
from gradtrace.survey import Memory, Slot
from gradtrace.values import FIXED, Origin, Provenance, Value, tensors_in


@dataclass
class Waiting:
    """The adjoints of one op that have arrived; a `joint` op waits for all of its outputs."""

    op: Op
    adjoints: dict[int, Adjoint] = field(default_factory=dict)
    owned: bool = True

    def complete(self, memory: Memory) -> bool:
        """Whether every output that leads to the loss, as far as is known, has delivered."""
        places = range(len(self.op.outputs))
        return all(i in self.adjoints or (self.op.key, i) in memory.unreached for i in places)


class Session:
    """Everything that one recorded step, or one batch, brings together. Use it once.

    `owners`: the owner of every element of an op's output, by op number and output, and by key for ops that only a
    recompute brings to light.
    """

    def __init__(
        self,
        model: nn.Module,
        parameters: Mapping[str, Tensor],
        constants: Sequence[Tensor],
        settings: Settings,
        memory: Memory,
        adapters: Registry,
    ) -> None:
        self.model, self.adapters = model, adapters
        self.settings, self.memory = settings, memory
        self.parameters = dict(parameters)
        self.edges = {name: get_gradient_edge(p) for name, p in parameters.items()}
        self.cells, self.context = Cells(), Batch(None, None)
        self.gathered = Gathered(self.parameters, self.edges, settings.kinds, memory, self.is_global, self.is_known)
        self.audit = Audit(self.parameters, self.edges)
        self.owner_residuals: dict[str, float] = {}
        self.seen: list[Op] = []  # every op of the step
        self.live: list[Op] = []  # those whose graph a backward pass can still use
        self.audited = False
        self.owners: dict[Slot, Tensor] = {}
        self.owners_by_key: dict[tuple[OpKey, int], Tensor] = {}
        self.roots: list[GradientEdge] = []  # what backward was called on: the first and the last
        self.loss: Tensor | None = None
        self.cost: dict[str, float] = {"survey": 0.0, "reduce": 0.0}
        self.retrace = False  # a constant was taken for data; running the forward pass again will do better
        self._announced = False  # a backward pass is under way that was prepared
        self._last_use = False  # its graph is not used again: what was kept of an op can go with its adjoint
        self._waiting: dict[int, Waiting] = {}
        self._delivered: set[Slot] = set()  # outputs whose adjoints have come
        self._accumulated = False
        self._accepts: dict[int, bool] = {}
        self._uses: Counter[str] = Counter()  # by the ops that the pass under way goes through
        self.modules = ModuleStack(model)
        self.capture = Capture(self.modules, _provenance(parameters, constants), adapters, self)
        self.capture.leaf_hooks = [p._backward_hooks for p in parameters.values() if p._backward_hooks]

    def twin(self, parameters: Mapping[str, Tensor]) -> Session:
        """A session for a shadow pass on other parameters; it shares what is known about the model."""
        constants = constants_of(self.model)
        twin = Session(self.model, parameters, constants, self.settings, self.memory, self.adapters)
        twin.context = Batch(self.context.labels, self.context.n_samples)
        return twin

    # ------------------------------------------------------------------ the forward pass

    @contextmanager
    def watching(self) -> Iterator[Session]:
        """Forward and backward passes inside are traced."""
        with _uncompiled(), self.modules.watching(), self.capture:
            yield self

    def begin_batch(self, groups: Any) -> None:
        """Labels of the forward passes that follow."""
        labels = Labels.read(groups)
        check_types(labels, self.memory.label_types)
        self.context = Batch(labels, None if labels is None else labels.n_samples)
        self.capture.restart_count()

    def transparent(self, key: OpKey) -> bool:
        return key in self.memory.transparent

    def captured(self, op: Op) -> None:
        self.dtypes.update(_autocast_dtypes())  # an op may compute in it and return another
        self.seen.append(op)
        self.live.append(op)

    @property
    def dtypes(self) -> set[torch.dtype]:
        """In which values were computed: the coarsest says what rounding can do to a gradient."""
        return self.capture.flow.dtypes

    def is_global(self, name: str) -> bool:
        """Whether a parameter is measured by one pass over the whole graph per cell."""
        return name in self.memory.opaque or (self.settings.coupling == "loss" and name in self.memory.coupled)

    # ------------------------------------------------------------------ the backward pass

    def before_backward(self, root: Tensor, gradient: Tensor | None, retained: bool) -> None:
        """Finds owners, settles rungs, and runs the passes of the global rung, on the live graph."""
        if not root.requires_grad:
            raise CaptureError(
                "The loss does not depend on the model: it does not require a gradient. Compute it from the model's "
                "output, outside torch.no_grad(), and without detach() in between."
            )
        began = time.perf_counter()
        cotangent = torch.ones_like(root) if gradient is None else gradient
        self._add_loss(root)
        self.roots[1:] = [get_gradient_edge(root)]
        with torch.no_grad(), self.capture.silence():
            prepare(self, self.roots[-1:], [cotangent])
        self._begin_pass()
        self._announced, self._last_use = True, not retained
        self.cost["survey"] += time.perf_counter() - began

    def _prepare_late(self) -> None:
        """At the first adjoint of a pass that nobody announced (`torch.autograd.backward`): the part of the graph that
        belongs to the loss has run, that of the model is still whole."""
        roots = list(self.capture.flow.loose_ends.values())
        if not roots:
            raise CaptureError("A backward pass began, and no scalar loss was seen. Call backward on a scalar loss.")
        for root in roots:
            self._add_loss(root)
        self._announced = True
        prepare(self, [get_gradient_edge(root) for root in roots], None)
        self._begin_pass()

    def _begin_pass(self) -> None:
        self.audit.begin_pass()
        self._uses = Counter(name for op in self.live for o in op.operands for name in o.value.parameters)

    def is_known(self, name: str) -> bool:
        """Whether `p.grad` will be the gradient of the one use of this parameter that the pass goes through."""
        if torch._C._current_graph_task_id() == -1 or self._uses[name] != 1 or not self.audit.will_know(name):
            return False
        return bool(torch._C._will_engine_execute_node(self.edges[name].node))

    def _add_loss(self, root: Tensor) -> None:
        loss = root.detach().sum()
        self.loss = loss if self.loss is None else self.loss + loss

    def adjoint(self, op: Op, output: int, grad: Tensor) -> None:
        """Takes the adjoint of an op's output as the real backward pass delivers it."""
        if not self._in_training_pass():
            return
        if not self._announced:
            self._prepare_late()
        began = time.perf_counter()
        waiting = self._waiting.setdefault(op.number, Waiting(op))
        waiting.adjoints[output] = self._owned(op, output, grad, waiting)
        if not op.joint or waiting.complete(self.memory):
            self._take(self._waiting.pop(op.number))
        self.cost["reduce"] += time.perf_counter() - began

    def _owned(self, op: Op, output: int, grad: Tensor, waiting: Waiting) -> Adjoint:
        """An adjoint with the owners of its elements."""
        owners = self._owners_of(op, output, op.context)
        if owners is None or op.context.of_sample is None:
            waiting.owned = False
            owners = torch.full((1,) * grad.dim(), -1, dtype=torch.int64)
        return Adjoint(grad, owners)

    def _take(self, waiting: Waiting) -> None:
        op, batch = waiting.op, waiting.op.context
        cells = batch.of_sample if batch.of_sample is not None else torch.tensor([Cells.OWNERLESS])
        parts = contributions(op, waiting.adjoints)
        shared = Shared(storages(parts))
        for part in parts:
            self.gathered.take(op, part, cells, shared, owned=waiting.owned)
        self._delivered |= {(op.number, output) for output in waiting.adjoints}
        if self._last_use and len(waiting.adjoints) == len(op.outputs):
            op.release()

    def _take_waiting(self, edge: GradientEdge | None = None) -> None:
        """What still waits for other outputs of its op; with `edge`, of ops that use this effective weight alone."""
        for number, waiting in list(self._waiting.items()):
            if edge is None or any(o.edge == edge for o in waiting.op.operands):
                self._take(self._waiting.pop(number))

    def _owners_of(self, op: Op, output: int, batch: Batch) -> Tensor | None:
        """As surveyed; for an op that only a recompute brought to light, as its layout or the shadow pass says."""
        found = self.owners.get((op.number, output))
        if found is None:
            found = self.owners_by_key.get((op.key, output))
        if found is None and batch.n_samples is not None:
            found = by_layout(self, op, output, batch.n_samples)
        return found

    def _in_training_pass(self) -> bool:
        """Whether the running pass accumulates gradients: not one that merely asks `torch.autograd.grad` something."""
        task = torch._C._current_graph_task_id()
        if task not in self._accepts:
            try:
                self._accepts[task] = any(torch._C._will_engine_execute_node(e.node) for e in self.edges.values())
            except RuntimeError:  # torch.autograd.grad with respect to a parameter
                self._accepts[task] = False
        return self._accepts[task]

    def effective(self, edge: GradientEdge, grad: Tensor) -> None:
        """All uses of an effective weight have delivered."""
        if self._in_training_pass():
            self._take_waiting(edge)
            self.gathered.carry_on(edge)

    def after_backward(self, retained: bool) -> None:
        """Takes the gradients that autograd accumulated; `retained`: the graph may be used again."""
        with torch.no_grad(), self.capture.silence():
            self._take_waiting()
        self.audit.end_pass()
        self.gathered.settle(self.audit.reference)
        self._announced, self._accumulated, self._last_use = False, True, False
        if not retained:  # ops of another graph that has not been run yet (split learning) stay
            done = {number for number, _ in self._delivered}
            for op in self.live:
                if op.number in done:
                    op.release()
            self.live = [op for op in self.live if op.number not in done]

    def finish(self) -> None:
        """After the last backward pass; raises when there was none."""
        if self._announced:
            self.after_backward(False)  # somebody called torch.autograd.backward
        if not self._accumulated:
            raise CaptureError(
                "The step ended without a backward pass. Call loss.backward() inside `with recorder.step(...)`, and "
                "run the forward pass there too."
            )
        if not self.audit.reference and not self.gathered.sums:
            raise CaptureError(
                "The backward pass brought no gradient to any traced parameter. Run the forward pass inside "
                "`with recorder.step(...)` too, on the model that is recorded."
            )
        self.audit.compare(self.gathered)
        slots = {(op.number, place): (op.key, place) for op in self.seen for place in range(len(op.outputs))}
        self.memory.unreached |= {key for slot, key in slots.items() if slot not in self._delivered}
        self.memory.unreached -= {key for slot, key in slots.items() if slot in self._delivered}

    def close(self) -> None:
        """Lets go of the graph."""
        self.capture.forget()
        self.live.clear()
        self.gathered.release()
        for op in self.seen:
            op.release()

    def discard(self) -> None:
        """Lets go of what was measured: session, capture and gathered hold each other, and are collected late."""
        self.gathered.sums.clear()
        self.audit.reference.clear()
        self.seen.clear()
        self.roots.clear()


@contextmanager
def _uncompiled() -> Iterator[None]:
    """Compiled models run as written meanwhile: the compiler would trace what watches the calls."""
    if "torch._dynamo" not in sys.modules:
        yield
        return
    with torch.compiler.set_stance("force_eager"), warnings.catch_warnings():
        # a compiled wrapper warns of our hooks, which look at the modules inside it alone
        warnings.filterwarnings("ignore", message="Using `torch.compile.module.` when there are global hooks")
        yield


def _autocast_dtypes() -> list[torch.dtype]:
    """What autocast casts to now, where it is on."""
    kinds = ("cpu", "cuda")
    return [torch.get_autocast_dtype(kind) for kind in kinds if torch.is_autocast_enabled(kind)]


def _provenance(parameters: Mapping[str, Tensor], constants: Sequence[Tensor]) -> Provenance:
    provenance = Provenance()
    for name, parameter in parameters.items():
        provenance[parameter] = Value(Origin.PARAMETER, frozenset((name,)), ())
    for tensor in constants:
        if provenance[tensor].origin is Origin.UNKNOWN:
            provenance[tensor] = FIXED
    return provenance


def constants_of(model: nn.Module) -> list[Tensor]:
    """Buffers, and tensors that modules hold as plain attributes: not sample data."""
    found = list(model.buffers())
    for module in model.modules():
        found += [t for key, v in vars(module).items() if not key.startswith("_") for t in tensors_in(v, 2)]
    return [t for t in found if not t.requires_grad or t.is_leaf]
