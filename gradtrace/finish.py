"""Closing a traced step: judging the audits, naming the rungs, and turning what was gathered into a row."""

from __future__ import annotations

import time
from typing import Any

import numpy as np

from gradtrace.metrics import RANK_RULE
from gradtrace.session import Rung, Session, tolerance
from gradtrace.store.rows import ParameterInfo, ParameterRow, StepRow
from gradtrace.summarise import GroupsOfStep, summarise


def judge(session: Session) -> None:
    """Takes every parameter whose audit failed one rung further down; this step's own where it can still be told."""
    memory = session.memory
    for name in session.reference:
        residual = session.residuals.get(name, float("nan"))
        if residual <= tolerance_of(session, name) or not session.rungs.get(name, Rung()).names:
            continue
        if "global" in session.rungs[name].names:
            why = f"groups do not add up to the gradient even over the whole graph (residual {residual:.1e})"
            memory.ungrouped.setdefault(name, why)
        elif name not in memory.opaque:
            memory.opaque[name] = f"a use that cannot be seen (residual {residual:.1e})"
            session.retrace = True


def step_row(session: Session, *, step: int, keep: int | None, loss_scale: float = 1.0, **about: Any) -> StepRow:
    """The row of a step that had its backward pass; every parameter with a gradient is in it."""
    began = time.perf_counter()
    cells = session.cells.groups()
    counts = np.array([session.cells.n_samples(c) for c in cells.values()], dtype=np.int64)
    groups = GroupsOfStep(cells, counts, session.cells.n_cells)
    parameters = {
        name: _row(session, name, groups, keep, loss_scale)
        for name in session.parameters
        if name in session.reference or name in session.sums
    }
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


def _row(session: Session, name: str, groups: GroupsOfStep, keep: int | None, loss_scale: float) -> ParameterRow:
    ungrouped = is_ungrouped(session, name)
    total = session._sum(name)
    if ungrouped and name in session.reference:
        session.sums.pop(name)
        total = session._sum(name)
        total.gradient.add_dense({session.cells.OWNERLESS: session.reference[name]})
        total.scale = float("nan")
    return summarise(
        total,
        groups,
        kinds=session.settings.kinds,
        keep=keep,
        ungrouped=ungrouped,
        residual=session.residuals.get(name, float("nan")),
        owner_residual=session.owner_residuals.get(name, float("nan")),
        loss_scale=loss_scale,
    )


def is_ungrouped(session: Session, name: str) -> bool:
    """Whether no group's share of this parameter's gradient is known."""
    rung = session.rungs.get(name)
    return rung is None or not rung.names or name in session.memory.ungrouped


def tolerance_of(session: Session, name: str) -> float:
    """The largest residual that rounding explains: more where the gradient goes on through arithmetic of the weight's."""
    total = session.sums.get(name)
    dtype = session.parameters[name].dtype
    base = tolerance(dtype, session.dtypes)
    rung = session.rungs.get(name, Rung())
    if (total is not None and total.scale != total.scale) or "pulled back" in rung.names or "global" in rung.names:
        return 16 * base
    return base


def infos(session: Session) -> list[ParameterInfo]:
    """How every parameter with a gradient was measured."""
    found = []
    for name, parameter in session.parameters.items():
        if name not in session.reference and name not in session.sums:
            continue
        found.append(ParameterInfo(name, tuple(parameter.shape), _attributes(session, name)))
    return found


def _attributes(session: Session, name: str) -> dict[str, Any]:
    memory, rung = session.memory, session.rungs.get(name, Rung())
    ungrouped = is_ungrouped(session, name)
    total = session._sum(name)
    kinds = [k for k in session.settings.kinds if k == "gradient" or getattr(total, k) is not None]
    reason = rung.reason
    if ungrouped:
        reason = memory.ungrouped.get(name, "no use of it was seen that leads to samples")
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
