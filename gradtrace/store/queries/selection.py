"""What a query asks for, checked against what a run holds: unknown names are errors, empty selections are not."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from gradtrace.errors import SelectionError, nearest
from gradtrace.metrics import METRICS, find
from gradtrace.store.patterns import matching, unknown
from gradtrace.store.reading.reader import Run
from gradtrace.store.reading.stream import Stream
from gradtrace.store.rows import KINDS

COSINE = "cosine"  # between the gradients of two groups
SHARE = "share"  # of a group's gradient in that of all: their inner product by the square of the norm of all
OF_PRODUCTS = (COSINE, SHARE)


@dataclass(frozen=True)
class Span:
    """From `first` to `last`, both included; None leaves an end open."""

    first: float | None = None
    last: float | None = None

    def holds(self, values: np.ndarray) -> np.ndarray:
        """Which of `values` lie in the span."""
        inside = np.ones(len(values), dtype=bool)
        if self.first is not None:
            inside &= values >= self.first
        if self.last is not None:
            inside &= values <= self.last
        return inside


@dataclass(frozen=True)
class Query:
    """What somebody wants to see. Empty sequences mean: everything.

    patterns, groups: exact names, globs, or regular expressions after `re:`.
    metrics: of METRICS, the run's own, or OF_PRODUCTS; when empty, singular values, `components` of them (None: all).
    """

    patterns: Sequence[str] = ()
    kinds: Sequence[str] = ()
    groups: Sequence[str] = ()
    steps: Span | None = None
    epochs: Span | None = None
    last_step_only: bool = False
    probe: str | None = None
    metrics: Sequence[str] = ()
    components: int | None = None


@dataclass(frozen=True)
class Selected:
    """A query's names as found in a run. `rows` are positions along the step axis, increasing."""

    stream: Stream
    parameters: tuple[str, ...]
    kinds: tuple[str, ...]
    groups: tuple[int, ...]
    rows: np.ndarray
    metrics: tuple[str, ...]
    components: int | None
    unmeasured: tuple[str, ...] = ()  # selected by name, but without any values in this stream
    unknown: Mapping[str, str] = field(default_factory=dict)  # name that is not there -> a sentence about it

    @property
    def group_names(self) -> tuple[str, ...]:
        """The names of the selected groups."""
        return tuple(self.stream.groups[group] for group in self.groups)

    @property
    def empty(self) -> str | None:
        """What the selection lacks, or None when there may be something in it."""
        found = {"parameter": self.parameters, "kind": self.kinds, "group": self.groups, "step": self.rows}
        return next((what for what, items in found.items() if len(items) == 0), None)


def select(run: Run, query: Query, *, patient: bool = False) -> Selected:
    """The query's names as found in the run, or a SelectionError naming the nearest ones.

    patient: parameters, groups and steps that are not there may come yet; the former are told in `unknown`.
    """
    stream = run.stream(query.probe)
    named = matching("parameter", query.patterns, run.parameters, patient=patient)
    groups = matching("group", query.groups, stream.groups, patient=patient)
    return Selected(
        stream=stream,
        parameters=tuple(name for name in named if name in stream.places),
        unmeasured=tuple(name for name in named if name not in stream.places),
        unknown=unknown("parameter", query.patterns, run.parameters) | unknown("group", query.groups, stream.groups),
        kinds=_kinds(run, query),
        groups=tuple(stream.groups.index(name) for name in groups),
        rows=_rows(stream, query, patient=patient),
        metrics=_metrics(stream, query.metrics, patient=patient),
        components=query.components,
    )


def _kinds(run: Run, query: Query) -> tuple[str, ...]:
    for kind in query.kinds:
        if kind not in KINDS:
            raise SelectionError(f"There is no kind {kind!r}. {nearest(kind, KINDS)}")
        if kind not in run.kinds:
            raise SelectionError(f"This run did not record the kind {kind!r}. It recorded: {', '.join(run.kinds)}.")
    wanted = tuple(query.kinds) or run.kinds
    if {*OF_PRODUCTS} & {*query.metrics} and "gradient" not in wanted:
        raise SelectionError("Cosine and share are of the groups' gradients. Add --kind gradient, or leave --kind out.")
    return tuple(kind for kind in run.kinds if kind in wanted)


def _metrics(stream: Stream, names: Sequence[str], *, patient: bool) -> tuple[str, ...]:
    unknown = [name for name in names if name not in OF_PRODUCTS and find(name) is None]
    there = recorded_metrics(stream) if unknown else ()
    for name in unknown:
        if name not in there and not (patient and not stream.places):
            known = (*METRICS, *OF_PRODUCTS, *there)
            raise SelectionError(f"There is no metric {name!r}. {nearest(name, known, most=len(known))}")
    return tuple(dict.fromkeys(names))


def recorded_metrics(stream: Stream) -> tuple[str, ...]:
    """The metrics that the run holds, also those that nothing is known about here."""
    found: dict[str, None] = {}
    for name in {place.member: name for name, place in stream.places.items()}.values():
        for variable, stands in stream.variables(name).items():
            if len(stands.at) == 2:  # by kind and metric
                found[re.sub("^(activation|adjoint)_", "", variable)] = None
    return tuple(found)


def _rows(stream: Stream, query: Query, *, patient: bool) -> np.ndarray:
    inside = np.ones(len(stream.steps), dtype=bool)
    if query.steps is not None:
        inside &= query.steps.holds(stream.steps)
        if not inside.any() and not patient:
            _check_single(stream, query.steps)
    if query.epochs is not None:
        inside &= query.epochs.holds(np.floor(stream.per_step("epoch")))
    found = np.flatnonzero(inside)
    return found[-1:] if query.last_step_only else found


def _check_single(stream: Stream, span: Span) -> None:
    """One step that was asked for alone and is not there is a mistake; an empty range is not."""
    if span.first is not None and span.first == span.last:
        close = sorted(stream.steps.tolist(), key=lambda step: abs(step - (span.first or 0)))[:5]
        steps = ", ".join(map(str, sorted(close))) or "none at all"
        raise SelectionError(f"Step {span.first} was not recorded. Nearest: {steps}. A range is written first:last.")
