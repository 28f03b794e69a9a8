"""Closing a traced step: judging the audits, naming the rungs, and turning what was gathered into a row."""

from __future__ import annotations

import time
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch

from gradtrace.audit import suspicion, tolerance
from gradtrace.decompose.dense import all_finite
from gradtrace.gather import Rung
from gradtrace.hiding import hidden_groups, without
from gradtrace.metrics import RANK_RULE
from gradtrace.schedule import on_one_thread
from gradtrace.session import Session
from gradtrace.store.rows import ParameterInfo, StepRow
from gradtrace.summarise import GroupsOfStep, Summary, reduce, summarise


def judge(session: Session) -> None:
    """Closes the step's audits; a parameter that failed goes one rung further down, from the next pass on."""
    session.finish()
    memory = session.memory
    for name in session.audit.reference:
        residual = session.audit.residuals.get(name)
        if residual is None or residual <= tolerance_of(session, name):  # NaN is no pass
            continue
        if not all_finite(session.audit.reference[name]):
            continue
        if "global" in session.gathered.rungs[name].names:
            why = f"groups do not add up to the gradient even over the whole graph (residual {residual:.1e})"
            memory.ungrouped.setdefault(name, why)
        elif name not in memory.opaque:
            memory.opaque[name] = suspicion(session.gathered.rungs[name].adapters, f"residual {residual:.1e}")
            session.retrace = True


class Pending:
    """The row of a step that had its backward pass, with nothing decomposed yet; every parameter with a gradient is in
    it."""

    def __init__(
        self,
        session: Session,
        *,
        step: int,
        keep: int | None,
        loss_scale: float = 1.0,
        min_samples: int = 1,
        **about: Any,
    ) -> None:
        cells = session.cells.groups()
        counts = np.array([session.cells.n_samples(c) for c in cells.values()], dtype=np.int64)
        self._groups = GroupsOfStep(cells, counts, session.cells.n_cells)
        measured = [n for n in session.parameters if n in session.audit.reference or n in session.gathered.sums]
        self._arguments = {name: _arguments(session, name) for name in measured}
        self._same: dict[str, Any] = {"kinds": session.settings.kinds, "keep": keep, "loss_scale": loss_scale}
        self._hidden = frozenset[str]()
        if min_samples > 1:
            self._hidden = hidden_groups(cells, session.cells.counts, min_samples)
        self._loss, self._cost = session.loss, dict(session.cost)
        self._about = {"step": step, **about}
        self._on_cpu = all(p.device.type == "cpu" for p in session.parameters.values())

    def part(self) -> None:
        """Copies what others may write over: afterwards `row` can be called while the training goes on."""
        for arguments in self._arguments.values():
            arguments["total"].part()

    def summaries(self, *, workers: int | None = None) -> dict[str, Summary]:
        """What every parameter's part of the row is made by."""
        reduce([own["total"] for own in self._arguments.values()], workers=workers)
        return {name: Summary(groups=self._groups, **self._same, **own) for name, own in self._arguments.items()}

    def row(self, *, workers: int | None = None) -> StepRow:
        """Decomposes everything, with so many threads: by default as many as torch computes with."""
        began = time.perf_counter()
        if not self._on_cpu:
            workers = 1  # the device shares its work out itself
        elif workers is None:
            workers = torch.get_num_threads()
        with on_one_thread() if self._on_cpu else nullcontext():
            parameters = summarise(self.summaries(workers=workers), workers=workers)
        loss = float("nan") if self._loss is None else float(self._loss) / self._same["loss_scale"]
        row = StepRow(
            groups=tuple(self._groups.cells),
            n_samples=self._groups.n_samples,
            parameters=parameters,
            loss=loss,
            cost={**self._cost, "decompose": time.perf_counter() - began},
            **self._about,
        )
        return without(row, self._hidden)


def step_row(session: Session, **about: Any) -> StepRow:
    """The row of a step that had its backward pass: that of `Pending`, at once."""
    return Pending(session, **about).row()


def _arguments(session: Session, name: str) -> dict[str, Any]:
    """What a parameter's `Summary` is made of."""
    ungrouped = is_ungrouped(session, name)
    total = session.gathered.sum_of(name)
    if ungrouped and name in session.audit.reference:
        session.gathered.sums.pop(name)
        total = session.gathered.sum_of(name)
        total.gradient.add_dense({session.cells.OWNERLESS: session.audit.reference[name]})
        total.add_scale(float("nan"))
    return {
        "total": total,
        "ungrouped": ungrouped,
        "residual": session.audit.residuals.get(name, float("nan")),
        "owner_residual": session.owner_residuals.get(name, float("nan")),
    }


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
