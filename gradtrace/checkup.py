"""What tracing will make of a study, found out before training: how each parameter is measured, and what is wrong."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from gradtrace.adapters import Adapter, registry
from gradtrace.advice import Case, advice_on, advice_on_untrained, notes_on_batches, notes_on_ranks
from gradtrace.bounds import rank_bounds
from gradtrace.errors import AdapterError
from gradtrace.evidence import GraphFacts, Use, is_zero, mixed_rows, uses_in
from gradtrace.finish import infos
from gradtrace.graphing import graph_of
from gradtrace.groups import ALL
from gradtrace.measure import checked_coupling, traced
from gradtrace.planning.plan import plan
from gradtrace.planning.planned import Plan, costs_of
from gradtrace.planning.rates import Rates
from gradtrace.rehearsal import Subject, plain_step
from gradtrace.selection import select
from gradtrace.session import Session
from gradtrace.settings import Settings
from gradtrace.store.rows import KINDS
from gradtrace.study import Study
from gradtrace.training import chosen_device
from gradtrace.untouched import attributes_kept, random_state_kept

EXCLUDED, NO_GRADIENT = "excluded", "no gradient"  # in the place of a rung
Adapters = Mapping[str, str] | Sequence[Adapter] | None


@dataclass(frozen=True)
class ParameterCheck:
    """How one parameter will be measured. Plain data.

    rung: as recorded, or `excluded` or `no gradient`. owner_residual: NaN on the rung global, which has no rows.
    failed: ungrouped, or an audit did not pass. advice: what is wrong, or what would improve it. rank_bound: the most
    that the rank of its gradient can be with batches like the first, for the rank_reason; 0 without a gradient.
    """

    parameter: str
    shape: tuple[int, ...]
    elements: int
    dtype: str
    rung: str
    reason: str = ""
    ops: tuple[str, ...] = ()
    adapters: tuple[str, ...] = ()
    ownership: str = "-"
    coupled: bool = False
    coupling: str = "-"
    kinds: tuple[str, ...] = ()
    kinds_absent: tuple[str, ...] = ()
    residual: float = math.nan
    owner_residual: float = math.nan
    tolerance: float = math.nan
    rank_bound: int = 0
    rank_reason: str = ""
    failed: bool = False
    advice: tuple[str, ...] = ()

    @property
    def is_measured(self) -> bool:
        """Whether it got a gradient that is traced."""
        return self.rung not in (EXCLUDED, NO_GRADIENT)

    @property
    def verdict(self) -> str:
        """`fails`, `improvable` (there is advice), `good`, or `-` for what is not traced."""
        if self.failed:
            return "fails"
        return "improvable" if self.advice else "good" if self.is_measured else "-"


@dataclass(frozen=True)
class Checkup:
    """What was found in a study. Plain data.

    groups: the groups of the first batch and their numbers of samples. notes: on the batches and the adapters. ranks:
    on gradients that cannot have full rank. plan: of a step like the first. step_seconds: what the first batch took
    untraced, forward and backward.
    """

    study: str
    loss: float
    coupling: str
    groups: Mapping[str, int]
    parameters: tuple[ParameterCheck, ...]
    notes: tuple[str, ...]
    ranks: tuple[str, ...]
    plan: Plan
    step_seconds: float

    @property
    def ok(self) -> bool:
        """Whether every parameter with a gradient is split by group and passed its audits."""
        return not any(row.failed for row in self.parameters)

    @property
    def problems(self) -> tuple[ParameterCheck, ...]:
        """The parameters that fail or on which there is advice."""
        return tuple(row for row in self.parameters if row.failed or row.advice)

    @property
    def advice(self) -> dict[str, list[str]]:
        """Every piece of advice once, and the parameters it is about; in the order of the parameters."""
        found: dict[str, list[str]] = {}
        for row in self.parameters:
            for text in row.advice:
                found.setdefault(text, []).append(row.parameter)
        return found

    @property
    def factored_share(self) -> float:
        """The share of factored elements among those with a gradient; NaN where there is none."""
        measured = [row for row in self.parameters if row.is_measured]
        every = sum(row.elements for row in measured)
        return sum(row.elements for row in measured if row.rung == "factored") / every if every else math.nan

    @property
    def batch(self) -> str:
        """One line: the loss of the first batch, and how many samples of each group are in it."""
        groups = ", ".join(f"{name} {count}" for name, count in self.groups.items() if name != ALL)
        number = self.groups[ALL]
        samples = f"{number} sample{'s' if number != 1 else ''}"
        return f"The first batch, in training mode: {samples}{f' ({groups})' if groups else ''}, loss {self.loss:.4g}."

    @property
    def costs(self) -> tuple[str, ...]:
        """What recording all kinds will cost, one line each: time, the dearest decompositions, memory and store."""
        return costs_of(self.plan, self.step_seconds)

    @property
    def summary(self) -> str:
        """One line: how many parameters, the share of factored elements, the verdict."""
        failed = [row for row in self.parameters if row.failed]
        ungrouped = sum(row.rung == "ungrouped" for row in failed)
        better = len(self.problems) - len(failed)
        verdict = "nothing is ungrouped and every audit passed"
        if failed:
            verdict = f"{ungrouped} ungrouped, {len(failed) - ungrouped} not through an audit"
        more = f"; advice on {better} more" if failed and better else f"; advice on {better}" if better else ""
        measured = sum(row.is_measured for row in self.parameters)
        return (
            f"{len(self.parameters)} parameters, {measured} of them measured, {100 * self.factored_share:.4g} % of "
            f"their elements factored; {verdict}{more}."
        )


def examine(
    study: Study, *, parameters: str | Sequence[str] | None = None, coupling: str = "rows",
    sample_dim: int | None = None, adapters: Adapters = None, device: str = "auto", rates: Rates | None = None,
) -> Checkup:  # fmt: skip
    """How every parameter of the study's model will be measured, from one step on its first batch, in training mode.

    Runs one plain step and one or more traced ones, on substitutes for parameters and buffers: nothing is trained, and
    the random state is left as it was. The options are those of `gradtrace.record` and `gradtrace train`; `rates`, of
    `gradtrace.planning.rates.measured_rates`, let the plan tell seconds.
    Raises StudyError where the study's own code fails, naming the function and the line.
    """
    settings = Settings(KINDS, sample_dim, checked_coupling(coupling))
    with random_state_kept():
        subject = Subject.of(study, chosen_device(device))
        with attributes_kept(subject.model):
            subject.model.train()
            facts, loss, seconds = plain_step(subject, parameters)
            session = _traced_step(subject, parameters, settings, adapters, sized=True)
            suspects = _suspects(subject, parameters, settings, adapters, session)
    cells, graph = session.cells, graph_of(session, {})
    bounds = rank_bounds(graph)
    rows = {row.parameter: row for row in _rows(subject.model, parameters, session, facts, suspects)}
    rows |= {n: replace(rows[n], rank_bound=b.rank, rank_reason=b.reason) for n, b in bounds.items() if n in rows}
    return Checkup(
        study=study.target,
        loss=loss,
        coupling=coupling,
        groups={name: cells.n_samples(of) for name, of in cells.groups().items()},
        parameters=tuple(rows.values()),
        notes=tuple(_notes(subject, loss, session, adapters)),
        ranks=tuple(notes_on_ranks(bounds.values())),
        plan=plan(graph, subject.groups, rates=rates),
        step_seconds=seconds,
    )


def _traced_step(
    subject: Subject,
    patterns: str | Sequence[str] | None,
    settings: Settings,
    adapters: Adapters,
    *,
    sized: bool = False,
) -> Session:
    given, loss = (subject.inputs, subject.groups), subject.loss
    return traced(subject.model, *given, patterns, settings, adapters, loss, sized=sized)


def _suspects(
    subject: Subject, patterns: str | Sequence[str] | None, settings: Settings, adapters: Adapters, session: Session
) -> dict[str, tuple[str, ...]]:
    """Parameter -> the adapters that are wrong on it: those without which an audit that it failed is passed."""
    memory, uses = session.memory, uses_in(session)
    claimed = {
        name: tuple(dict.fromkeys(use.adapter for use in uses.get(name, ()) if use.adapter))
        for name in memory.opaque | memory.ungrouped
        if not mixed_rows(session, name)
    }
    accused = {adapter for of_name in claimed.values() for adapter in of_name}
    if not accused:
        return {}
    rest = [entry.adapter for entry in registry(adapters).entries if entry.adapter.name not in accused]
    try:
        again = _traced_step(subject, patterns, settings, rest).memory
    except AdapterError:  # without them others claim the same call, or fail on it
        return {}
    return {n: of_name for n, of_name in claimed.items() if of_name and n not in again.opaque | again.ungrouped}


def _rows(
    model: nn.Module,
    patterns: str | Sequence[str] | None,
    session: Session,
    facts: GraphFacts,
    suspects: Mapping[str, tuple[str, ...]],
) -> Iterator[ParameterCheck]:
    """One row per parameter, in the model's order."""
    _, excluded = select(model, patterns)
    measured, uses = {info.name: info.attrs for info in infos(session)}, uses_in(session)
    for name, parameter in model.named_parameters():
        dtype = str(parameter.dtype).removeprefix("torch.")
        row = ParameterCheck(name, tuple(parameter.shape), parameter.numel(), dtype, EXCLUDED)
        if name in excluded:
            yield replace(row, reason=excluded[name])
        elif name not in measured:
            why = advice_on_untrained(uses.get(name, ()))
            yield replace(row, rung=NO_GRADIENT, reason="no gradient reaches it", advice=(why,))
        else:
            yield _row(row, session, measured[name], _case(name, session, measured[name], uses, facts, suspects))


def _case(
    name: str,
    session: Session,
    measured: Mapping[str, Any],
    uses: Mapping[str, Sequence[Use]],
    facts: GraphFacts,
    suspects: Mapping[str, tuple[str, ...]],
) -> Case:
    gradient = session.audit.reference.get(name)
    return Case(
        measured=measured,
        uses=uses.get(name, ()),
        hidden=facts.hidden.get(name, ()),
        suspects=suspects.get(name, ()),
        reentrant=facts.reentrant,
        finite=gradient is None or bool(torch.isfinite(gradient).all()),
        zero=gradient is not None and is_zero(gradient),
        mixed=mixed_rows(session, name),
        is_opaque=name in session.memory.opaque,
        cells=session.cells.n_cells - 1,
    )


def _row(row: ParameterCheck, session: Session, measured: Mapping[str, Any], case: Case) -> ParameterCheck:
    rung, tolerance = case.rung, float(measured["tolerance"])
    residual = session.audit.residuals.get(row.parameter, math.nan)
    owners = session.owner_residuals.get(row.parameter, math.nan) if rung not in ("global", "ungrouped") else math.nan
    failed = rung == "ungrouped" or bool(case.suspects) or not case.finite
    return replace(
        row,
        rung=rung,
        reason=measured["reason"],
        ops=tuple(measured["ops"] or dict.fromkeys(use.function.rpartition(".")[2] for use in case.uses)),
        adapters=tuple(measured["adapters"]),
        ownership=measured["ownership"],
        coupled=measured["coupled"],
        coupling=measured["coupling"],
        kinds=tuple(measured["kinds"]),
        kinds_absent=tuple(f"{kind}: {why}" for kind, why in measured["kinds_absent"].items()),
        residual=residual,
        owner_residual=owners,
        tolerance=tolerance,
        failed=failed or not residual <= tolerance or owners > tolerance,
        advice=advice_on(case),
    )


def _notes(subject: Subject, loss: float, session: Session, adapters: Adapters) -> Iterator[str]:
    if not math.isfinite(loss):
        yield f"The loss of the first batch is {loss}: nothing that depends on it could be audited."
    yield from notes_on_batches(subject.labels, session.context.n_samples or 0)
    for plugin in registry(adapters).failed:
        yield f"An installed adapter cannot be used, and its ops are measured without it: {plugin}."
