"""One traced step: listens to the capture, decides the rung of every parameter, and gathers the gradients per cell."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.func import functional_call

from gradtrace.accumulate import ParameterSum, matrix_shape, outer_in_place
from gradtrace.adapters import Registry
from gradtrace.bypass import Bypass, has_region
from gradtrace.capture import Capture
from gradtrace.contributions import Factored, Local, contributions, to_parameters
from gradtrace.errors import CaptureError, GroupError
from gradtrace.factors import LookupFactors, OuterFactors
from gradtrace.groups import Cells, Labels
from gradtrace.modules import ModuleStack
from gradtrace.ops import Op, Operand, OpKey
from gradtrace.outlets import Outlet, outlets_of
from gradtrace.pull import local, through_graph
from gradtrace.survey import Memory, Probe, Slot, audit_owners, find_coupled, find_owners, settle
from gradtrace.untouched import attributes_kept, hooks_quiet, random_state_kept
from gradtrace.values import CONSTANT, Origin, Provenance, Value, tensors_in

AUDIT_EVERY = 200  # recorded steps between two checks of who owns which row


@dataclass(frozen=True)
class Settings:
    """What to measure."""

    kinds: tuple[str, ...]
    sample_dim: int | None = None
    coupling: str = "rows"


@dataclass(eq=False)
class Batch:
    """The samples of one forward pass: their labels, and the cell of each once their number is known."""

    labels: Labels | None
    n_samples: int | None
    of_sample: Tensor | None = None  # (samples + 1,)


@dataclass
class Rung:
    """How one parameter was measured in this step."""

    names: set[str] = field(default_factory=set)
    ops: dict[str, None] = field(default_factory=dict)
    adapters: dict[str, None] = field(default_factory=dict)
    layouts: dict[str, None] = field(default_factory=dict)
    reason: str = ""

    ORDER = ("factored", "local", "pulled back", "global", "ungrouped")

    @property
    def worst(self) -> str:
        return max(self.names, key=self.ORDER.index) if self.names else "ungrouped"


class Session:
    """Everything that one recorded step, or one batch, brings together. Use it once."""

    def __init__(
        self, model: nn.Module, parameters: Mapping[str, Tensor], constants: Sequence[Tensor], settings: Settings,
        memory: Memory, adapters: Registry,
    ) -> None:  # fmt: skip
        self.settings, self.memory = settings, memory
        self.parameters = dict(parameters)
        self.edges = {name: get_gradient_edge(p) for name, p in parameters.items()}
        self.cells = Cells()
        self.context = Batch(None, None)
        self.sums: dict[str, ParameterSum] = {}
        self.rungs: dict[str, Rung] = {}
        self.ops: list[Op] = []
        self.seen: list[Op] = []  # every op of the step, its tensors released; for the graph
        self.dtypes: set[torch.dtype] = set()
        self.loss: Tensor | None = None
        self.cost: dict[str, float] = {"survey": 0.0, "reduce": 0.0}
        self.retrace = False  # a constant was taken for data; running the forward pass again will do better
        self.reference: dict[str, Tensor] = {}
        self.residuals: dict[str, float] = {}
        self.owner_residuals: dict[str, float] = {}
        self._announced = False  # a backward pass is under way whose loss is known
        self._accumulated = False
        self._owners: dict[Slot, Tensor] = {}
        self._by_key: dict[tuple[OpKey, int], Tensor] = {}
        self._pending: list[Op] = []
        self._accepts: dict[int, bool] = {}
        self._effective: dict[tuple[Any, int], dict[int, Tensor]] = {}
        self._values: dict[tuple[Any, int], Operand] = {}
        self._before = {n: None if p.grad is None else p.grad.detach().clone() for n, p in parameters.items()}
        self._model, self._adapters = model, adapters
        self._hooked = {n for n, p in parameters.items() if p._backward_hooks or _post_hooks(p)}
        self._modules = ModuleStack(model)
        provenance = Provenance()
        for name, parameter in parameters.items():
            provenance[parameter] = Value(Origin.PARAMETER, frozenset((name,)), ())
        for tensor in constants:
            if provenance[tensor].origin is Origin.UNKNOWN:
                provenance[tensor] = CONSTANT
        self.capture = Capture(self._modules, provenance, adapters, self)
        self.capture.leaf_hooks = [p._backward_hooks for p in parameters.values() if p._backward_hooks]

    # ------------------------------------------------------------------ watching

    @contextmanager
    def watching(self) -> Iterator[Session]:
        """Forward and backward passes inside are traced."""
        with self._modules.watching(), self.capture:
            yield self

    def begin_batch(self, groups: Any) -> None:
        """Labels of the forward passes that follow."""
        labels = Labels.read(groups)
        self.context = Batch(labels, None if labels is None else labels.n_samples)
        self.capture.restart_count()

    def transparent(self, key: OpKey) -> bool:
        return key in self.memory.transparent

    def captured(self, op: Op) -> None:
        self.dtypes.update(o.meta.dtype for o in op.outputs)
        self.seen.append(op)
        self.ops.append(op)
        self._pending.append(op)

    # ------------------------------------------------------------------ before the backward pass

    def before_backward(self, root: Tensor, gradient: Tensor | None) -> None:
        """Finds owners, settles rungs, and runs the passes of the global rung, on the live graph."""
        if not root.requires_grad:
            raise CaptureError(
                "The loss does not depend on the model: it does not require a gradient. Compute it from the model's output, "
                "outside torch.no_grad(), and without detach() in between."
            )
        began = time.perf_counter()
        cotangent = torch.ones_like(root) if gradient is None else gradient
        loss = root.detach().sum()
        self.loss = loss if self.loss is None else self.loss + loss
        with torch.no_grad(), self.capture.silence():
            self._prepare(get_gradient_edge(root), cotangent)
        self._announced = True
        self.cost["survey"] += time.perf_counter() - began

    def _prepare_late(self) -> None:
        """The first adjoint of a pass nobody announced (`torch.autograd.backward`): the part of the graph that belongs
        to the loss has run, that of the model is still whole."""
        root = self.capture.last_scalar
        if root is None:
            raise CaptureError("A backward pass began, and no scalar loss was seen. Call backward on a scalar loss.")
        self.loss = root.detach() if self.loss is None else self.loss + root.detach()
        self._prepare(get_gradient_edge(root), None)

    def _prepare(self, root: GradientEdge, cotangent: Tensor | None) -> None:
        pending, self._pending = self._pending, []
        contexts = {id(op.context): op.context for op in pending}
        contexts |= {id(made.context): made.context for made in self.capture.produced.values()}
        counts = {key: batch.n_samples for key, batch in contexts.items()}
        outlets = outlets_of(root, self.capture.produced, counts, self.settings.sample_dim)
        if not outlets:
            raise CaptureError(
                "The loss does not depend on the model: no value that the model computed with a sample axis reaches it. "
                "Compute the loss from the output of the model that is traced."
            )
        for key, batch in contexts.items():
            own = [o for o in outlets if id(o.context) == key]
            if own:
                self._prepare_batch(batch, own, [op for op in pending if id(op.context) == key])
        if cotangent is None:
            return
        self._reference_passes(root, cotangent)
        self._global_passes(root, cotangent, outlets)

    def _prepare_batch(self, batch: Batch, outlets: list[Outlet], ops: list[Op]) -> None:
        if batch.n_samples is None:
            batch.n_samples = outlets[0].meta.shape[outlets[0].axis]
        n_samples = batch.n_samples
        if batch.of_sample is None:
            batch.of_sample = self.cells.assign(batch.labels, n_samples)
        known = {(op.number, i): self._by_layout(op, i, n_samples) for op in ops for i in range(len(op.outputs))}
        self._owners.update({slot: owners for slot, owners in known.items() if owners is not None})
        unsettled = [op for op in ops if any(known[op.number, i] is None for i in range(len(op.outputs)))]
        fresh = not self.memory.audited or any(
            name not in self.memory.audited for op in ops for o in op.operands for name in o.value.parameters
        )
        audit = self._needs_audit(fresh)
        if audit:
            unsettled = ops
        if (unsettled or audit) and any(has_region(o.edge.node) for o in outlets):
            self._survey_shadow(batch)
        elif unsettled:
            probe = Probe.draw(self.capture, outlets, n_samples, self.memory.generator)
            self._survey(probe, unsettled, audit=audit)

    def _needs_audit(self, fresh: bool) -> bool:
        return fresh or self.memory.steps % AUDIT_EVERY == 0

    def _by_layout(self, op: Op, output: int, n_samples: int) -> Tensor | None:
        meta = op.outputs[output].meta
        if n_samples == 1:
            return torch.zeros((1,) * meta.dim(), dtype=torch.int64)
        layout = self.memory.layout(op.key, output)
        return layout.owners(meta.shape, n_samples) if layout else None

    def _survey(self, probe: Probe, ops: list[Op], *, audit: bool) -> None:
        adjoints: dict[Slot, Tensor] = {}
        owners: dict[Slot, Tensor] = {}
        for slot, (adjoint, decoded) in find_owners(probe, ops, self.memory).items():
            op = next(op for op in ops if op.number == slot[0])
            settled = settle(decoded, op.key, slot[1], probe.n_samples, self.memory)
            if settled is None:
                self._mixed(op)
            else:
                adjoints[slot], owners[slot] = adjoint, settled
        self._owners.update(owners)
        if audit:
            self.memory.coupled |= find_coupled(probe, ops, owners, self.memory)
            found = audit_owners(probe, ops, adjoints, owners, self.edges, self.memory)
            self._judge(found, ops)

    def _survey_shadow(self, batch: Batch) -> None:
        """The same survey on a second forward pass that passes reentrant checkpoints by; it touches nothing."""
        shadow = Session(
            self._model, self._stand_ins(), constants_of(self._model), self.settings, self.memory, self._adapters
        )
        shadow.context = Batch(batch.labels, batch.n_samples)
        shadow.capture.bypass = Bypass()
        entries = list(self._modules.entries)
        buffers = {name: b.detach().clone() for name, b in self._model.named_buffers()}
        state = {**{n: p.detach() for n, p in self._model.named_parameters()}, **shadow.parameters, **buffers}
        with random_state_kept(), attributes_kept(self._model), hooks_quiet(self._model), torch.enable_grad():
            with shadow.watching():
                outputs = [_rerun(state, *entry) for entry in entries]
                root = any_loss(outputs)
            with torch.no_grad(), shadow.capture.silence():
                shadow._prepare(get_gradient_edge(root), None)
        for op in shadow.seen:
            for i in range(len(op.outputs)):
                if (op.number, i) in shadow._owners:
                    self._by_key[op.key, i] = shadow._owners[op.number, i]
        self.owner_residuals |= shadow.owner_residuals
        shadow.close()

    def _stand_ins(self) -> dict[str, Tensor]:
        return {name: p.detach().requires_grad_() for name, p in self.parameters.items()}

    def _mixed(self, op: Op) -> None:
        """Rows fed by several samples: a value that all share, or samples that are coupled downstream."""
        names = frozenset().union(*(o.value.parameters for o in op.operands))
        if op.unseen_input and op.key not in self.memory.transparent:
            self.memory.transparent.add(op.key)
            self.retrace = True
        for name in names:
            self.memory.opaque.setdefault(name, f"rows of `{op.key.function}` are fed by several samples")
            self.memory.coupled.add(name)

    def _judge(self, residuals: Mapping[str, float], ops: list[Op]) -> None:
        for name, residual in residuals.items():
            self.owner_residuals[name] = residual
            self.memory.audited.add(name)
            if residual > tolerance(self.parameters[name].dtype, self.dtypes):
                self.memory.opaque.setdefault(name, f"a use that cannot be seen (owner residual {residual:.1e})")

    def _is_global(self, name: str) -> bool:
        return name in self.memory.opaque or (self.settings.coupling == "loss" and name in self.memory.coupled)

    def _reference_passes(self, root: GradientEdge, cotangent: Tensor) -> None:
        """Where hooks of the user's change a parameter's gradient, autograd's own is taken by a pass that fires none."""
        names = sorted(self._hooked)
        if names:
            for name, g in zip(names, through_graph([root], [cotangent], [self.edges[n] for n in names]), strict=True):
                if g is not None:
                    self.reference[name] = self.reference[name] + g if name in self.reference else g

    def _global_passes(self, root: GradientEdge, cotangent: Tensor, outlets: list[Outlet]) -> None:
        names = [name for name in self.parameters if self._is_global(name)]
        if not names:
            return
        if any(has_region(o.edge.node) for o in outlets):
            why = "reentrant checkpointing allows no pass per group; checkpoint with use_reentrant=False"
            self.memory.ungrouped.update({name: f"{self.memory.opaque.get(name, 'coupled')}; {why}" for name in names})
            return
        at_outlets = local(root, cotangent, [o.edge for o in outlets])
        live = [(o, c) for o, c in zip(outlets, at_outlets, strict=True) if c is not None]
        cells = sorted({int(c) for o, _ in live for c in o.context.of_sample[:-1].tolist()})
        for cell in cells:
            masked = [o.spread((o.context.of_sample[:-1] == cell).double(), c) for o, c in live]
            grads = through_graph([o.edge for o, _ in live], masked, [self.edges[n] for n in names])
            for name, gradient in zip(names, grads, strict=True):
                if gradient is not None:
                    self._sum(name).gradient.add_dense({cell: gradient})
                    self._rung(name).names.add("global")
                    self._rung(name).reason = self.memory.opaque.get(name, "samples are coupled, and coupling='loss'")

    # ------------------------------------------------------------------ during the backward pass

    def adjoint(self, op: Op, output: int, grad: Tensor) -> None:
        """Takes the adjoint of an op's output as the real backward pass delivers it."""
        if not self._in_training_pass():
            return
        if not self._announced and self._pending:
            self._prepare_late()
        began = time.perf_counter()
        batch: Batch = op.context
        owners = self._owners_of(op, output, batch)
        if owners is None or batch.of_sample is None:
            owners = torch.full((1,) * grad.dim(), -1, dtype=torch.int64)
        cells = batch.of_sample if batch.of_sample is not None else torch.tensor([0])
        for part in contributions(op, output, grad, owners.to(grad.device)):
            wanted = [n for n in part.operand.value.parameters if n in self.parameters and not self._is_global(n)]
            if wanted:
                self._take(op, output, part, cells.to(grad.device), wanted)
        self.cost["reduce"] += time.perf_counter() - began

    def _owners_of(self, op: Op, output: int, batch: Batch) -> Tensor | None:
        """As surveyed; for an op that only a recompute brought to light, as its layout or the shadow pass says."""
        found = self._owners.get((op.number, output))
        if found is None and batch.n_samples is not None:
            found = self._by_layout(op, output, batch.n_samples)
        return found if found is not None else self._by_key.get((op.key, output))

    def _in_training_pass(self) -> bool:
        """Whether the running pass accumulates gradients: not one that merely asks `torch.autograd.grad` something."""
        task = torch._C._current_graph_task_id()
        if task not in self._accepts:
            try:
                self._accepts[task] = any(torch._C._will_engine_execute_node(e.node) for e in self.edges.values())
            except RuntimeError:  # torch.autograd.grad with respect to a parameter
                self._accepts[task] = False
        return self._accepts[task]

    def _take(self, op: Op, output: int, part: Factored | Local, cells: Tensor, names: list[str]) -> None:
        value = part.operand.value
        for name in names:
            rung = self._rung(name)
            direct = "factored" if isinstance(part, Factored) else "local"
            rung.names.add(direct if value.moves is not None else "pulled back")
            rung.ops[op.key.function] = None
            if isinstance(part, Factored) and part.operand.adapter is not None:
                rung.adapters[part.operand.adapter.name] = None
            layout = self.memory.layout(op.key, output)
            rung.layouts[str(layout) if layout else "found in each step"] = None
            self._take_kinds(self._sum(name), part, cells)
        if isinstance(part, Factored) and isinstance(part.factors, OuterFactors) and self._stays_outer(part):
            (name,) = names
            left, right = outer_in_place(part.factors, sum(m.transposes for m in value.moves or ()) % 2 == 1)
            self._sum(name).gradient.add_outer(left, right, cells[part.factors.owners])
            return
        found = part.factors.by_cell(cells) if isinstance(part, Factored) else part.by_cell(cells)
        self._deliver(part.operand, found)

    def _stays_outer(self, part: Factored) -> bool:
        """Whether the parameter is the weight's matrix or its transpose, so that the rows can be kept as factors."""
        value, factors = part.operand.value, part.factors
        if value.moves is None or not isinstance(factors, OuterFactors) or not factors.is_matrix:
            return False
        if not all(m.of_matrix for m in value.moves):
            return False
        (name,) = value.parameters
        sides = matrix_shape(tuple(self.parameters[name].shape))
        turned = sum(m.transposes for m in value.moves) % 2 == 1
        return part.operand.shape == (sides[::-1] if turned else sides)

    def _take_kinds(self, total: ParameterSum, part: Factored | Local, cells: Tensor) -> None:
        total.eps = max(total.eps, torch.finfo(_adjoint_of(part).dtype).eps)
        if isinstance(part, Local):
            total.scale = float("nan")
            total.drop("activation", "no adapter factors this op")
            self._local_adjoint(total, part, cells)
            return
        total.scale += part.factors.scale()
        rows = part.factors.rows()
        if rows is None:
            total.drop("activation", "its rows belong to several samples each")
            total.drop("adjoint", "its rows belong to several samples each")
            return
        of_row = cells[rows.owners]
        if "adjoint" in self.settings.kinds:
            total.add_adjoint(rows.adjoint, of_row)
        if isinstance(part.factors, LookupFactors):
            total.add_lookups(part.factors, of_row)
        elif rows.activation is None:
            total.drop("activation", "a shift multiplies no activation")
        else:
            if "activation" in self.settings.kinds:
                total.add_activation(rows.activation, of_row)
            total.add_power(rows.activation, rows.adjoint, of_row)

    def _local_adjoint(self, total: ParameterSum, part: Local, cells: Tensor) -> None:
        """One row per sample, positions side by side: all that is known of an op nobody factors."""
        owners = part.owners
        axes = [a for a in range(owners.dim()) if owners.shape[a] != 1]
        if len(axes) != 1 or "adjoint" not in self.settings.kinds:
            total.drop("adjoint", "no adapter factors this op, and its output has no sample axis")
            return
        rows = part.adjoint.movedim(axes[0], 0).flatten(1) if part.adjoint.dim() > 1 else part.adjoint[:, None]
        total.add_adjoint(rows, cells[owners.flatten()])

    def _deliver(self, operand: Operand, found: dict[int, Tensor]) -> None:
        if operand.value.moves is None:
            key = (operand.edge.node, operand.edge.output_nr)
            self._values[key] = operand
            held = self._effective.setdefault(key, {})
            for cell, gradient in found.items():
                held[cell] = held[cell] + gradient if cell in held else gradient
            return
        for cell, gradient in found.items():
            for name, g in to_parameters(gradient, operand.edge, operand.value, self.edges).items():
                self._sum(name).gradient.add_dense({cell: g})

    def effective(self, edge: GradientEdge, grad: Tensor) -> None:
        """All uses of an effective weight have been seen: carries what each cell gathered on to the parameters."""
        held = self._effective.pop((edge.node, edge.output_nr), None)
        if not held or not self._in_training_pass():
            return
        operand = self._values[edge.node, edge.output_nr]
        for cell, gradient in held.items():
            reached = to_parameters(gradient.to(operand.dtype), operand.edge, operand.value, self.edges)
            for name, g in reached.items():
                if not self._is_global(name):
                    self._sum(name).gradient.add_dense({cell: g})

    # ------------------------------------------------------------------ after the backward pass

    def after_backward(self) -> None:
        """Compares what was gathered with the gradients that autograd accumulated."""
        self._announced, self._accumulated = False, True
        for name, parameter in self.parameters.items():
            if name not in self._hooked and parameter.grad is not None:
                before, now = self._before[name], parameter.grad.detach()
                now = now.to_dense() if now.is_sparse else now
                self.reference[name] = now - before if before is not None else now
        for name, reference in self.reference.items():
            self._compare(name, reference)
        for op in self.ops:
            op.release()
        self.ops.clear()

    def finish(self) -> None:
        """After the last backward pass; raises when there was none."""
        if not self._accumulated and self.sums:
            self.after_backward()  # somebody called torch.autograd.backward
        if not self._accumulated:
            raise CaptureError(
                "The step ended without a backward pass. Call loss.backward() inside `with recorder.step(...)`, and run the "
                "forward pass there too."
            )
        if not self.reference and not self.sums:
            raise CaptureError(
                "The backward pass brought no gradient to any traced parameter. Run the forward pass inside "
                "`with recorder.step(...)` too, on the model that is recorded."
            )

    def _compare(self, name: str, reference: Tensor) -> None:
        total = self._sum(name)
        if not self._rung(name).names:
            return  # nothing grouped was gathered: ungrouped
        sides = total.gradient.sides
        columns = min(4, sides[1])
        generator = torch.Generator().manual_seed(sides[1])
        probes = torch.randn(sides[1], columns, generator=generator, dtype=torch.float64)
        probes = torch.linalg.qr(probes).Q.to(device=reference.device, dtype=_wide(reference.dtype))
        expected = reference.reshape(sides).to(probes.dtype) @ probes
        got = total.gradient.times(probes).to(probes.dtype)
        size = float(torch.linalg.vector_norm(got - expected)) * (sides[1] / columns) ** 0.5
        floor = total.scale if total.scale == total.scale and total.scale > 0 else self._mass(total)
        self.residuals[name] = size / floor if floor > 0 else (0.0 if size == 0 else float("inf"))

    def _mass(self, total: ParameterSum) -> float:
        return sum(float(torch.linalg.vector_norm(g)) for g in total.gradient.dense.values())

    def close(self) -> None:
        """Let go of the graph."""
        self.capture.forget()
        self.ops.clear()
        self._pending.clear()
        self._effective.clear()
        self._values.clear()

    # ------------------------------------------------------------------ small

    def _sum(self, name: str) -> ParameterSum:
        if name not in self.sums:
            p = self.parameters[name]
            self.sums[name] = ParameterSum(name, tuple(p.shape), p.dtype)
        return self.sums[name]

    def _rung(self, name: str) -> Rung:
        return self.rungs.setdefault(name, Rung())


def tolerance(parameter: torch.dtype, used: Iterable[torch.dtype]) -> float:
    """What rounding alone can make of an owner residual.

    Sums over m rows in another order differ by about sqrt(m) eps; 256 eps covers 65,000 rows. Half precisions round
    the gradient itself once more, which costs a few eps whatever the number of rows.
    """
    kinds = [d for d in (parameter, *used) if d.is_floating_point or d.is_complex]
    coarsest = max(torch.finfo(d).eps for d in kinds)
    return (8 if coarsest > 1e-5 else 256) * coarsest


def any_loss(outputs: Any) -> Tensor:
    """A scalar that every output reaches, with a gradient that is not constant."""
    parts = [torch.view_as_real(t) if t.is_complex() else t for t in tensors_in(outputs) if t.requires_grad]
    if not parts:
        raise CaptureError("No output of the model requires a gradient: is it run under torch.no_grad(), or detached?")
    return torch.stack([t.double().square().sum() + t.double().sum() for t in parts]).sum()


def _rerun(state: dict[str, Tensor], module: nn.Module, name: str, args: Any, kwargs: Any) -> Any:
    prefix = f"{name}." if name else ""
    own = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
    return functional_call(module, own, args, dict(kwargs))


def constants_of(model: nn.Module) -> list[Tensor]:
    """Buffers, and tensors that modules hold as plain attributes: not sample data."""
    found = [b for b in model.buffers()]
    for module in model.modules():
        found += [t for key, v in vars(module).items() if not key.startswith("_") for t in tensors_in(v, 2)]
    return [t for t in found if not t.requires_grad or t.is_leaf]


def _adjoint_of(part: Factored | Local) -> Tensor:
    if isinstance(part, Local):
        return part.adjoint
    adjoint: Tensor = part.factors.adjoint  # type: ignore[attr-defined]
    return adjoint


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.complex128 if dtype.is_complex else torch.float64


def _post_hooks(parameter: Tensor) -> bool:
    return bool(getattr(parameter, "_post_accumulate_grad_hooks", None))


__all__ = ["Batch", "GroupError", "Rung", "Session", "Settings", "constants_of", "tolerance"]
