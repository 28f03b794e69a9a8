"""Closing a traced step: judging the audits, naming the rungs, and turning what was gathered into a row."""

from __future__ import annotations

import time
from typing import Any

import numpy as np

from gradtrace.audit import suspicion, tolerance
from gradtrace.decompose.dense import all_finite
from gradtrace.gather import Rung
from gradtrace.metrics import RANK_RULE
from gradtrace.session import Session
from gradtrace.store.rows import ParameterInfo, StepRow
from gradtrace.summarise import GroupsOfStep, Summary, summarise


def judge(session: Session) -> None:
    """Closes the step's audits; a parameter that failed goes one rung further down, from the next pass on."""
    session.finish()
    memory = session.memory
    for name in session.audit.reference:
        residual = session.audit.residuals.get(name)
        overflown = not all_finite(session.audit.reference[name])
        if residual is None or overflown or residual <= tolerance_of(session, name):  # NaN is no pass
            continue
        if "global" in session.gathered.rungs[name].names:
            why = f"groups do not add up to the gradient even over the whole graph (residual {residual:.1e})"
            memory.ungrouped.setdefault(name, why)
        elif name not in memory.opaque:
            memory.opaque[name] = suspicion(session.gathered.rungs[name].adapters, f"residual {residual:.1e}")
            session.retrace = True


def step_row(session: Session, *, step: int, keep: int | None, loss_scale: float = 1.0, **about: Any) -> StepRow:
    """The row of a step that had its backward pass; every parameter with a gradient is in it."""
    began = time.perf_counter()
    cells = session.cells.groups()
    counts = np.array([session.cells.n_samples(c) for c in cells.values()], dtype=np.int64)
    groups = GroupsOfStep(cells, counts, session.cells.n_cells)
    measured = [n for n in session.parameters if n in session.audit.reference or n in session.gathered.sums]
    parameters = summarise({name: _summary(session, name, groups, keep, loss_scale) for name in measured})
    session.cost["decompose"] = time.perf_counter() - began
    loss = float("nan") if session.loss is None else float(session.loss) / loss_scale
    return StepRow(
        step=step,
        groups=tuple(cells),
        n_samples=counts,
        parameters=parameters,
        loss=loss,
        cost=dict(session.cost),
        **about,
    )


def _summary(session: Session, name: str, groups: GroupsOfStep, keep: int | None, loss_scale: float) -> Summary:
    ungrouped = is_ungrouped(session, name)
    total = session.gathered.sum_of(name)
    if ungrouped and name in session.audit.reference:
        session.gathered.sums.pop(name)
        total = session.gathered.sum_of(name)
        total.gradient.add_dense({session.cells.OWNERLESS: session.audit.reference[name]})
        total.scale = float("nan")
    return Summary(
        total,
        groups,
        kinds=session.settings.kinds,
        keep=keep,
        ungrouped=ungrouped,
        residual=session.audit.residuals.get(name, float("nan")),
        owner_residual=session.owner_residuals.get(name, float("nan")),
        loss_scale=loss_scale,
    )


def is_ungrouped(session: Session, name: str) -> bool:
    """Whether no group's share of this parameter's gradient is known."""
    rung = session.gathered.rungs.get(name)
    return rung is None or not rung.names or name in session.memory.ungrouped


def tolerance_of(session: Session, name: str) -> float:
    """The largest residual that rounding explains; more where the gradient goes on through arithmetic of weights."""
    total = session.gathered.sums.get(name)
    dtype = session.parameters[name].dtype
    base = tolerance(dtype, session.dtypes)
    rung = session.gathered.rungs.get(name, Rung())
    if (total is not None and total.scale != total.scale) or "pulled back" in rung.names or "global" in rung.names:
        return 16 * base
    return base


def infos(session: Session) -> list[ParameterInfo]:
    """How every parameter with a gradient was measured."""
    found = []
    for name, parameter in session.parameters.items():
        if name not in session.audit.reference and name not in session.gathered.sums:
            continue
        found.append(ParameterInfo(name, tuple(parameter.shape), _attributes(session, name)))
    return found


def _attributes(session: Session, name: str) -> dict[str, Any]:
    memory, rung = session.memory, session.gathered.rungs.get(name, Rung())
    ungrouped = is_ungrouped(session, name)
    total = session.gathered.sum_of(name)
    kinds = [k for k in session.settings.kinds if k == "gradient" or getattr(total, k) is not None]
    reason = rung.reason
    if ungrouped:
        reason = memory.ungrouped.get(name, rung.why_ungrouped)
    return {
        "rung": "ungrouped" if ungrouped else rung.worst,
        "reason": reason,
        "ops": list(rung.ops),
        "adapters": list(rung.adapters),
        "ownership": "; ".join(rung.layouts) or ("masked cotangents" if "global" in rung.names else "-"),
        "coupled": name in memory.coupled,
        "coupling": "loss" if "global" in rung.names and name in memory.coupled else "rows",
        "kinds": kinds,
        "kinds_absent": {
            k: total.absent.get(k, "not measured on this rung") for k in session.settings.kinds if k not in kinds
        },
        "dtype": str(session.parameters[name].dtype).removeprefix("torch."),
        "tolerance": tolerance_of(session, name),
        "rank_rule": RANK_RULE,
        "scale": "raw sums, as they enter p.grad",
    }
