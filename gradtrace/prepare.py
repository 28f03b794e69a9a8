"""Before a backward pass: finds the owners of every op's rows, audits them, and runs the passes of the global rung."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from gradtrace.audit import suspicion, tolerance
from gradtrace.axes import AxisJudge
from gradtrace.bypass import has_region
from gradtrace.errors import CaptureError, GradtraceError
from gradtrace.ops import Op
from gradtrace.outlets import Chooser, Outlet, outlets_of
from gradtrace.owner_audit import OwnerAudit
from gradtrace.pull import local, nodes_behind, through_graph
from gradtrace.settings import Batch
from gradtrace.shadow import shadow_pass
from gradtrace.survey import Probe, Slot, batches, find_coupled, find_owners, settle

if TYPE_CHECKING:
    from gradtrace.session import Session

AUDIT_EVERY = 200  # recorded steps between two checks of who owns which row


def prepare(session: Session, roots: Sequence[GradientEdge], cotangents: Sequence[Tensor] | None) -> None:
    """Makes a session ready for a backward pass from `roots`.

    cotangents: what the pass starts with; None where it has begun already, and no pass through the loss is possible.
    """
    contexts = {id(op.context): op.context for op in session.live}
    contexts |= {id(made.context): made.context for made in session.capture.flow.produced.values()}
    counts = {key: batch.n_samples for key, batch in contexts.items()}
    sample_dim, memory = session.settings.sample_dim, session.memory
    judge = AxisJudge(session.capture, session.live, memory, session.edges, asked=sample_dim is not None)
    chooser = Chooser(counts, sample_dim, memory.sample_axes, judge)
    outlets = outlets_of(roots, session.capture.flow.produced, chooser)
    if not outlets:
        raise CaptureError(
            "The loss does not depend on the model: no value that the model computed with a sample axis reaches it. "
            "Compute the loss from the output of the model that is traced."
        )
    for key, batch in contexts.items():
        own = [o for o in outlets if id(o.context) == key]
        if own:
            _prepare_batch(session, batch, own, [op for op in session.live if op.context is batch])
    session.audited = True
    if cotangents is not None:
        session.audit.reference_pass(roots, cotangents)
        _global_passes(session, roots, cotangents, outlets)


def by_layout(session: Session, op: Op, output: int, n_samples: int) -> Tensor | None:
    """The owners of an op's output as far as they are known without a probe."""
    meta = op.outputs[output].meta
    if n_samples == 1:
        return torch.zeros((1,) * meta.dim(), dtype=torch.int64)
    layout = None if op.routed else session.memory.trusted(op.key, output, meta.shape, n_samples)
    return layout.owners(meta.shape, n_samples) if layout else None


def _prepare_batch(session: Session, batch: Batch, outlets: list[Outlet], ops: list[Op]) -> None:
    if batch.n_samples is None:
        batch.n_samples = outlets[0].meta.shape[outlets[0].axis]
    n_samples = batch.n_samples
    if batch.of_sample is None:
        batch.of_sample = session.cells.assign(batch.labels, n_samples)
    audit = _audit_is_due(session, ops)
    unsettled = _reached(session, [op for op in ops if not _settled(session, op, n_samples)], outlets)
    if audit:
        unsettled = ops
    if (unsettled or audit) and any(has_region(o.edge.node) for o in outlets):
        with shadow_pass(session) as (shadow, root):
            prepare(shadow, [root], None)
    elif unsettled or audit:
        probe = Probe.draw(session.capture, outlets, n_samples, session.memory.generator)
        _survey(session, probe, unsettled, audit=audit)


def _settled(session: Session, op: Op, n_samples: int) -> bool:
    """Whether the owners of all the op's outputs are known; takes them from layouts where these fit."""
    for i in range(len(op.outputs)):
        if (op.number, i) not in session.owners:
            found = by_layout(session, op, i, n_samples)
            if found is not None:
                session.owners[op.number, i] = found
    return all((op.number, i) in session.owners for i in range(len(op.outputs)))


def _reached(session: Session, ops: list[Op], outlets: Sequence[Outlet]) -> list[Op]:
    """Those of the ops with an output of unknown owners that an outlet leads to: a state nobody uses has no adjoint."""
    if not ops:
        return []
    nodes = nodes_behind(o.edge.node for o in outlets)
    unknown = lambda op, i: (op.number, i) not in session.owners and op.outputs[i].edge.node in nodes  # noqa: E731
    return [op for op in ops if any(unknown(op, i) for i in range(len(op.outputs)))]


def _audit_is_due(session: Session, ops: Sequence[Op]) -> bool:
    """At the start, for a parameter not met before, and every AUDIT_EVERY steps."""
    audited = session.memory.audited
    fresh = any(name not in audited for op in ops for o in op.operands for name in o.value.parameters)
    return fresh or not audited or (not session.audited and session.memory.steps % AUDIT_EVERY == 0)


def _survey(session: Session, probe: Probe, ops: list[Op], *, audit: bool) -> None:
    try:
        owner_audit = OwnerAudit(probe, session.edges, session.memory.generator) if audit else None
        for some in batches(ops):
            adjoints, owners = _find_owners(session, probe, some)
            session.owners.update(owners)
            if owner_audit is not None:
                session.memory.coupled |= find_coupled(probe, some, owners, session.memory)
                for op in some:
                    owner_audit.add(op, adjoints, owners)
        if owner_audit is not None:
            _judge(session, ops, owner_audit.residuals())
    except GradtraceError:
        raise
    except Exception as error:  # the backward of somebody's own function: training has to go on
        for name in frozenset().union(*(o.value.parameters for op in ops for o in op.operands)):
            why = f"probing the backward pass failed ({type(error).__name__}: {error})"
            session.memory.opaque.setdefault(name, why)


def _find_owners(session: Session, probe: Probe, ops: list[Op]) -> tuple[dict[Slot, Tensor], dict[Slot, Tensor]]:
    """The probe's adjoints of the ops' outputs, and the owners of their elements; mixed ones are told apart."""
    memory, by_number = session.memory, {op.number: op for op in ops}
    adjoints: dict[Slot, Tensor] = {}
    owners: dict[Slot, Tensor] = {}
    for slot, adjoint, decoded in find_owners(probe, ops, memory):
        settled = settle(decoded, by_number[slot[0]], slot[1], probe.n_samples, memory)
        if settled is None:
            _mixed(session, by_number[slot[0]])
        else:
            adjoints[slot], owners[slot] = adjoint, settled
    return adjoints, owners


def _mixed(session: Session, op: Op) -> None:
    """Rows fed by several samples: a value that all share, or samples that are coupled downstream.

    The former counts as a constant from then on. That is never wrong: its parameters are measured where what was made
    of them meets the samples.
    """
    memory = session.memory
    if op.key not in memory.transparent and (op.unseen_input or _is_shared(op)):
        memory.transparent.add(op.key)
        session.retrace = True
    for name in frozenset().union(*(o.value.parameters for o in op.operands)):
        memory.opaque.setdefault(name, f"rows of `{op.key.function}` are fed by several samples")
        memory.coupled.add(name)


def _is_shared(op: Op) -> bool:
    """Whether an op's data came straight from the model's inputs, and cannot hold a part for every sample.

    A first axis of length one, as a mask may have; or whole numbers, position numbers say, with no axis as long as a
    multiple of the batch. (Other numbers without such an axis may well be data: the nodes of all graphs of a batch.)
    """
    n_samples, shapes = op.context.n_samples, [[int(n) for n in s.split("x") if n] for s in op.input_shapes]
    if op.sources or n_samples is None or n_samples == 1:
        return False
    return all((len(s) > 1 and s[0] == 1) or (op.integers and all(size % n_samples for size in s)) for s in shapes)


def _judge(session: Session, ops: Sequence[Op], residuals: Mapping[str, float]) -> None:
    adapters = {
        name: dict.fromkeys(
            o.adapter.name for op in ops for o in op.operands if o.adapter and name in o.value.parameters
        )
        for name in residuals
    }
    for name, residual in residuals.items():
        session.memory.audited.add(name)
        if session.is_global(name):
            continue  # what was compared is a way that is not taken
        if residual <= tolerance(session.parameters[name].dtype, session.dtypes):
            session.owner_residuals[name] = residual
        else:  # NaN is no pass
            session.memory.opaque[name] = suspicion(adapters[name], f"owner residual {residual:.1e}")


def _global_passes(
    session: Session, roots: Sequence[GradientEdge], cotangents: Sequence[Tensor], outlets: list[Outlet]
) -> None:
    names = [name for name in session.parameters if session.is_global(name)]
    memory = session.memory
    if not names:
        return
    if any(has_region(o.edge.node) for o in outlets):
        why = "reentrant checkpointing allows no pass per group; checkpoint with use_reentrant=False"
        memory.ungrouped.update({name: f"{memory.opaque.get(name, 'coupled')}; {why}" for name in names})
        return
    live = [
        (outlet, cotangent)
        for root, given in zip(roots, cotangents, strict=True)
        for outlet, cotangent in zip(outlets, _through_loss(root, given, outlets), strict=True)
        if cotangent is not None
    ]
    for cell in sorted({int(c) for o, _ in live for c in o.context.of_sample[:-1].tolist()}):
        masked = [o.spread((o.context.of_sample[:-1] == cell).double(), c) for o, c in live]
        try:
            gradients = through_graph([o.edge for o, _ in live], masked, [session.edges[n] for n in names])
        except Exception as error:  # the backward of somebody's own function: training has to go on
            why = f"a pass per group failed ({type(error).__name__}: {error})"
            memory.ungrouped.update({name: f"{memory.opaque.get(name, 'coupled')}; {why}" for name in names})
            return
        for name, gradient in zip(names, gradients, strict=True):
            if gradient is not None:
                session.gathered.add(name, cell, gradient)
                rung = session.gathered.rung_of(name)
                rung.names.add("global")
                rung.reason = memory.opaque.get(name, "samples are coupled, and coupling='loss'")


def _through_loss(root: GradientEdge, given: Tensor, outlets: Sequence[Outlet]) -> list[Tensor | None]:
    """The cotangents at the outlets, of paths that meet no other outlet on the way.

    Nodes of custom autograd functions cannot be run one by one. Where the loss has one the engine makes the pass, which
    counts a path through two outlets twice; the residual tells if there is one.
    """
    edges = [o.edge for o in outlets]
    try:
        return local(root, given, edges)
    except TypeError:
        return through_graph([root], [given], edges)
