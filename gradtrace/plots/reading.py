"""From a store to the arrays of one picture: as many steps as a picture can show, read block by block."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from typing import Any

import numpy as np

from gradtrace.errors import SelectionError, nearest
from gradtrace.plots.measures import Measure
from gradtrace.plots.words import ALL, listed, ordinal
from gradtrace.scale import own_scale
from gradtrace.store.places.keys import Keys
from gradtrace.store.queries.selection import Query, Selected, select
from gradtrace.store.reading.opened import labels
from gradtrace.store.reading.reader import Run
from gradtrace.store.reading.snapshot import Snapshot, consistent
from gradtrace.store.reading.stream import Stream
from gradtrace.store.tables.blocks import parts

MOST_STEPS = 2000  # in a picture: more than it has dots across
MOST_VALUES = 1 << 25  # held at once, over all parameters, steps and groups
GroupChoice = Callable[[Sequence[str], Query], Sequence[str]]


class NothingToDraw(SelectionError):
    """A selection that is right, and holds nothing. The message says what it lacks."""


@dataclass(frozen=True)
class Series:
    """What a picture shows. values: (runs, parameters, steps, groups, ...), NaN where nothing was measured.

    every: of the steps that were asked for, each so-manieth is there. widths: singular values per parameter.
    remarks: sentences on what was left out.
    """

    runs: tuple[str | None, ...]
    parameters: tuple[str, ...]
    steps: np.ndarray
    groups: tuple[str, ...]
    values: np.ndarray
    every: int = 1
    recorded: int = 0
    remarks: tuple[str, ...] = ()

    @property
    def is_merged(self) -> bool:
        return len(self.runs) > 1


@dataclass(frozen=True)
class Want:
    """What a kind of picture takes of a run.

    groups: which, of those that the query selects. most: parameters at most, those with the most singular values.
    single: whether it shows one run, not several. matrices: without the vectors, where there is anything else.
    """

    measure: Measure
    groups: GroupChoice
    most: int | None = None
    single: bool = True
    matrices: bool = False


def read(keys: Keys, query: Query, want: Want, runs: Sequence[str] = ()) -> Series:
    """What the picture shows of the run, as of one commit; of merged runs, of those that match `runs`.

    Raises NothingToDraw where the selection holds nothing, or nothing of it was measured.
    """
    chosen = labels(keys, runs)
    if len(chosen) > 1 and want.single:
        raise SelectionError(
            f"{keys.name!r} holds several runs, and this picture shows one. Choose it by --run LABEL. "
            f"{nearest('', [str(label) for label in chosen])}"
        )
    if not chosen:
        raise NothingToDraw("no run is selected")
    if len(chosen) == 1:
        return consistent(keys, lambda snapshot: _read({chosen[0]: snapshot}, query, want), chosen[0])
    return _read({label: Snapshot(keys, label) for label in chosen}, query, want)


def _read(snapshots: dict[str | None, Snapshot], query: Query, want: Want) -> Series:
    """Of several runs, the parameters, groups and steps that all of them have."""
    found = {label: _select(label, snapshot, query) for label, snapshot in snapshots.items()}
    label, first = next(iter(found.items()))
    sizes = _components(snapshots[label].run, first.stream, query.kinds[0])
    names, remarks = _parameters(found, sizes, want)
    groups = tuple(want.groups(_common("group", [one.group_names for one in found.values()]), query))
    steps, every, recorded = _steps(
        found, values=len(found) * len(names) * len(groups) * want.measure.each(len(groups))
    )
    if every > 1:
        remarks.append(f"Every {ordinal(every)} of {recorded:,} recorded steps is shown.")
    values = [
        _values(_narrowed(one, names, groups, steps), snapshots[label], want.measure, steps)
        for label, one in found.items()
    ]
    series = Series(tuple(found), names, steps, groups, np.stack(values), every, recorded, tuple(remarks))
    return _measured(replace(series, groups=want.measure.called(groups)), query)


def _select(label: str | None, snapshot: Snapshot, query: Query) -> Selected:
    try:
        selected = select(snapshot.run, query)
    except SelectionError as error:
        if label is not None:
            error.add_note(f"That is of the run {label!r}. Leave it out by --run, or choose what all runs have.")
        raise
    if selected.empty is not None:
        never = [(name, snapshot.run.parameters[name].attrs.get("reason")) for name in selected.unmeasured]
        why = "; ".join(f"{name} was never measured{f' ({reason})' if reason else ''}" for name, reason in never[:3])
        raise NothingToDraw(why if never and not selected.parameters else f"no {selected.empty} is selected")
    return selected


def _common(what: str, names: Sequence[Sequence[str]]) -> tuple[str, ...]:
    shared = set(names[0]).intersection(*names[1:])
    if not shared:
        raise SelectionError(f"The runs have no {what} in common. Choose some of them by --run.")
    return tuple(name for name in names[0] if name in shared)


def _parameters(
    found: Mapping[str | None, Selected], sizes: Mapping[str, int], want: Want
) -> tuple[tuple[str, ...], list[str]]:
    names = _common("parameter", [one.parameters for one in found.values()])
    remarks = [
        f"Never measured: {listed(one.unmeasured)}{'' if label is None else f' (in {label})'}."
        for label, one in found.items()
        if one.unmeasured
    ]
    wide = tuple(name for name in names if sizes[name] > 1)
    if want.matrices and 0 < len(wide) < len(names):
        remarks.append(f"Vectors, whose ranks are 1, are left out: {len(names) - len(wide)}.")
        names = wide
    if want.most is None or len(names) <= want.most:
        return names, remarks
    widest = sorted(names, key=lambda name: -sizes[name])[: want.most]
    remarks.append(f"Shown: the {want.most} of {len(names)} parameters with the most singular values.")
    return tuple(name for name in names if name in widest), remarks


def _components(run: Run, stream: Stream, kind: str) -> dict[str, int]:
    """Parameter -> how many singular values it has. A vector's adjoint is a matrix; its gradient is a vector."""
    widths = {name: place.width for name, place in stream.places.items()}
    if kind != "gradient":
        return widths
    shapes = {name: run.parameters[name].shape or (1,) for name in widths}
    return {name: min(width, shapes[name][0], math.prod(shapes[name][1:])) for name, width in widths.items()}


def _steps(found: dict[str | None, Selected], *, values: int) -> tuple[np.ndarray, int, int]:
    """The steps shown, every so-manieth of so many that all runs have; `values` is what one of them takes."""
    shared = reduce(np.intersect1d, [one.stream.steps[one.rows] for one in found.values()])
    if not len(shared):
        raise SelectionError("The runs have no recorded step in common. Choose some of them by --run.")
    every = -(-len(shared) // max(1, min(MOST_STEPS, MOST_VALUES // max(1, values))))
    return shared[::every], every, len(shared)


def _narrowed(selected: Selected, names: Sequence[str], groups: Sequence[str], steps: np.ndarray) -> Selected:
    stream = selected.stream
    return replace(
        selected,
        parameters=tuple(names),
        groups=tuple(stream.groups.index(group) for group in groups),
        rows=np.flatnonzero(np.isin(stream.steps, steps)),
    )


def _values(selected: Selected, snapshot: Snapshot, measure: Measure, steps: np.ndarray) -> np.ndarray:
    """(parameters, steps, groups, ...) of one run."""
    rest = measure.shape(len(selected.groups))
    found = np.full((len(selected.parameters), len(steps), *rest), np.nan, np.float32)
    for part in parts(selected, snapshot.whole):
        at = np.searchsorted(steps, selected.stream.steps[part.rows])
        block: Any = measure.of(part)
        place = np.ix_(part.names, at, *map(np.arange, block.shape[2:]))
        found[place] = block
    if measure.rescaled:
        found *= _scales(selected).reshape(1, *found.shape[1:3], *[1] * (found.ndim - 3))
    return found


def _scales(selected: Selected) -> np.ndarray:
    """(steps, groups); where the samples of all were not stored, 1 stands for their number."""
    stream = selected.stream
    counts = stream.per_step("n_samples")[selected.rows].astype(np.float64)
    every = counts[:, [stream.groups.index(ALL)]] if ALL in stream.groups else np.ones((len(counts), 1))
    own = counts[:, list(selected.groups)]
    return np.where(own > 0, own_scale(selected.kinds[0], own, every), np.nan)


def _measured(series: Series, query: Query) -> Series:
    """Without the parameters of which nothing is a number."""
    there = ~np.isnan(series.values).all(axis=tuple(axis for axis in range(series.values.ndim) if axis != 1))
    if not there.any():
        what = f"{' or '.join(query.kinds)} of {listed(series.parameters)} in {listed(series.groups)}"
        raise NothingToDraw(f"no {what} was measured in the selected steps")
    if there.all():
        return series
    absent = [name for name, known in zip(series.parameters, there, strict=True) if not known]
    remark = f"Left out, as nothing was measured: {listed(absent)}."
    names = tuple(name for name, known in zip(series.parameters, there, strict=True) if known)
    return replace(series, parameters=names, values=series.values[:, there], remarks=(*series.remarks, remark))


def whole(groups: Sequence[str], query: Query) -> Sequence[str]:
    """What was asked for; else all samples together."""
    return groups if query.groups else [group for group in groups if group == ALL] or groups[:1]


def apart(groups: Sequence[str], query: Query) -> Sequence[str]:
    """What was asked for; else the groups of the first grouping, or all samples together where there is none."""
    others = [group for group in groups if group != ALL]
    if query.groups or not others:
        return groups
    grouping = others[0].partition("=")[0]
    return [group for group in others if group.partition("=")[0] == grouping]


def several(groups: Sequence[str], query: Query) -> Sequence[str]:
    """The same, where there are two or more."""
    chosen = apart(groups, query)
    if len(chosen) < 2:
        raise SelectionError(
            f"This picture compares groups, and there is only {listed(chosen)}. "
            f"Choose several by --group. {nearest('', groups) if len(groups) > 1 else 'This run has no others.'}"
        )
    return chosen


def pair(groups: Sequence[str], query: Query) -> Sequence[str]:
    """Two groups, in the order in which they were named; else the only two that there are."""
    chosen = several(groups, query)
    if len(chosen) > 2:
        raise SelectionError(
            f"This picture compares two groups, and there are {len(chosen)}: {listed(chosen, 8)}. "
            f"Choose two: --group {chosen[0]!r} --group {chosen[1]!r}."
        )
    return list(query.groups) if set(query.groups) == set(chosen) else chosen
