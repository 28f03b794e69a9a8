"""A plan, as data and as text: what tracing will compute for each parameter, and what that costs."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from gradtrace.decompose.problem import flops_of
from gradtrace.graph import table
from gradtrace.planning.ways import Shape

COLUMNS = ("parameter", "op", "kind", "way", "m", "p", "q", "shared", "decomposed", "flops", "bytes", "seconds")
WIDE = 120  # characters in a line of the table
BUDGET, DEAREST = 0.05, 5  # what the advised cadence keeps to; how many entries are named
LONGEST = 28  # characters of a name in it


@dataclass(frozen=True)
class Entry:
    """One kind of one parameter in a recorded step.

    way: `factors` or `cells` (gradients), `few`, `gram`, `triangle` or `lookup` (the other kinds), `whole` (ungrouped).
    m rows, a matrix p x q; for the other kinds m = p. shared: the parameter whose rows these are too, on which they are
    counted. decomposed: per group form, sides and dtype of the matrix whose singular values are taken. bytes: held at
    the end of the backward pass. seconds: NaN without rates. pulls: passes back through an op of unknown cost, in none
    of the other numbers. width: of the spectra that are stored.
    """

    parameter: str
    ops: tuple[str, ...]
    kind: str
    way: str
    m: int
    p: int
    q: int
    decomposed: tuple[Shape, ...]
    flops: float
    bytes: int
    seconds: float
    pulls: int = 0
    width: int = 0
    shared: str = ""

    def row(self) -> dict[str, Any]:
        """Its facts under the names of COLUMNS, plain values only."""
        counted = Counter(f"{form} {p}x{q}" for form, (p, q), _ in self.decomposed)
        facts = {
            "op": ", ".join(self.ops),
            "decomposed": ", ".join(f"{count} {what}" for what, count in counted.items()),
        }
        return {name: facts[name] if name in facts else getattr(self, name) for name in COLUMNS}


@dataclass(frozen=True)
class Plan:
    """What one recorded step computes beside the step itself. Frozen, and equal for equal arguments.

    groups: of one step. cells: occupied by its samples. step_flops: of the step itself, estimated from ops with
    parameters alone. step_seconds: that at the rate of single precision. store_bytes: per recorded step, before
    compression. recorded: how many of the `steps` are, None where these are not given.
    """

    entries: tuple[Entry, ...]
    groups: tuple[str, ...]
    cells: int
    keep: int | None
    every: int
    steps: int | None
    step_flops: float
    step_seconds: float
    store_bytes: int

    def rows(self) -> list[dict[str, Any]]:
        """One mapping per parameter and kind, in the model's order."""
        return [entry.row() for entry in self.entries]

    @property
    def buckets(self) -> dict[Shape, int]:
        """Decompositions of one form, shape and dtype -> how many per recorded step, the dearest first."""
        counted = Counter(shape for entry in self.entries for shape in entry.decomposed)
        return dict(sorted(counted.items(), key=lambda item: (-item[1] * flops_of(item[0][0], item[0][1]), item[0])))

    @property
    def flops(self) -> float:
        """Of a recorded step, beside its own."""
        return sum(entry.flops for entry in self.entries)

    @property
    def seconds(self) -> float:
        """Expected of a recorded step, beside its own; NaN without rates."""
        return sum(entry.seconds for entry in self.entries) if self.entries else 0.0

    @property
    def memory(self) -> int:
        """The most bytes that tracing holds at once at the end of the backward pass."""
        return sum(entry.bytes for entry in self.entries)

    @property
    def pulls(self) -> int:
        """Passes back through single ops, whose cost is in no other number."""
        return sum(entry.pulls for entry in self.entries)

    @property
    def recorded(self) -> int | None:
        return None if self.steps is None else math.ceil(self.steps / self.every)

    @property
    def total_bytes(self) -> int | None:
        """Of the whole store, before compression."""
        return None if self.recorded is None else self.recorded * self.store_bytes

    def overhead(self, step_seconds: float = math.nan) -> float:
        """What a recorded step adds, as a fraction of a plain one: by time, or by flops where no time is known."""
        known = self.step_seconds if math.isnan(step_seconds) else step_seconds
        added, own = self.seconds, known
        if math.isnan(added) or math.isnan(own):
            added, own = self.flops, self.step_flops
        return added / own if own else math.nan

    def every_for(self, budget: float, step_seconds: float = math.nan) -> int:
        """The cadence at which tracing adds less than this fraction of the training time, as far as the plan knows."""
        overhead = self.overhead(step_seconds)
        return 1 if math.isnan(overhead) else max(1, math.ceil(overhead / budget))

    @property
    def dearest(self) -> list[Entry]:
        """The entries that take longest first; without rates those with the most flops."""
        return sorted(self.entries, key=lambda e: (-e.flops if math.isnan(e.seconds) else -e.seconds, e.parameter))

    def totals(self) -> dict[str, Any]:
        """What all entries come to, plain values only."""
        return {
            "groups": list(self.groups),
            "cells": self.cells,
            "flops": self.flops,
            "step_flops": self.step_flops,
            "seconds": self.seconds,
            "step_seconds": self.step_seconds,
            "pulls": self.pulls,
            "memory": self.memory,
            "store_bytes": self.store_bytes,
            "total_bytes": self.total_bytes,
            "buckets": [
                {"form": form, "sides": list(sides), "dtype": dtype, "count": count}
                for (form, sides, dtype), count in self.buckets.items()
            ],
        }

    def __str__(self) -> str:
        return "\n".join([*_lines(self.entries), "", *_summary(self)])


# ---------------------------------------------------------------------- for people


def _lines(entries: Sequence[Entry]) -> list[str]:
    """The table: without the ops, and with shorter names, where it would be too wide."""
    columns: tuple[str, ...] = ("parameter", "op", "kind", "way", "m", "p x q", "decomposed", "flops", "held", "time")
    lines = table([_cells(entry, LONGEST) for entry in entries], columns)
    if max(map(len, lines)) > WIDE:
        columns = tuple(column for column in columns if column != "op")
        lines = table([_cells(entry, LONGEST) for entry in entries], columns)
    excess = max(map(len, lines)) - WIDE
    if excess > 0:
        lines = table([_cells(entry, max(LONGEST - excess, 9)) for entry in entries], columns)
    return lines


def _cells(entry: Entry, longest: int) -> dict[str, Any]:
    """An entry as the table has it."""
    return {
        "parameter": _short(entry.parameter, longest),
        "op": _short(", ".join(entry.ops) or "-", 18),
        "kind": entry.kind,
        "way": entry.way,
        "m": str(entry.m),
        "p x q": f"{entry.p}x{entry.q}",
        "decomposed": f"as {_short(entry.shared, 19)}" if entry.shared else _shapes(entry.decomposed),
        "flops": f"{entry.flops:.2g}{'+' if entry.pulls else ''}",
        "held": size_of(entry.bytes),
        "time": time_of(entry.seconds),
    }


def _shapes(decomposed: Sequence[Shape]) -> str:
    """Form, sides of the largest, and how many more there are."""
    if not decomposed:
        return "-"
    counted = Counter((form, sides) for form, sides, _ in decomposed)
    (form, (p, q)), count = next(iter(counted.items()))
    more = len(decomposed) - count
    size = str(p) if p == q else f"{p}x{q}"
    return f"{count} {form} {size}{f', {more} less' if more else ''}"


def _summary(found: Plan) -> Iterator[str]:
    names = f"{len(found.groups)} group{'s' if len(found.groups) > 1 else ''}"
    yield f"per recorded step: {names}, {found.cells} occupied cell{'s' if found.cells > 1 else ''}"
    ratio = found.flops / found.step_flops if found.step_flops else math.nan
    timed = "" if math.isnan(found.seconds) else f"; {time_of(found.seconds)} expected"
    yield f"flops: {found.flops:.2g}, {ratio:.2g} times the step's own {found.step_flops:.2g}{timed}"
    if found.pulls:
        yield f"+: and {found.pulls} passes back through single ops, whose cost is not known before"
    yield f"decompositions: {sum(found.buckets.values())} in {len(found.buckets)} shapes"
    yield f"memory held at the end of the backward pass: at most {size_of(found.memory)}"
    total = "" if found.total_bytes is None else f"; {size_of(found.total_bytes)} in {found.steps} steps"
    cadence = f", every={found.every}" if found.total_bytes is not None else ""
    yield f"store, before compression: {size_of(found.store_bytes)}{total}{cadence}"


def costs_of(found: Plan, step_seconds: float) -> tuple[str, ...]:
    """The costs beside a plain step of so many seconds: a few lines."""
    ratio, every = found.overhead(step_seconds), found.every_for(BUDGET, step_seconds)
    timed = f"{time_of(found.seconds)} beside {time_of(step_seconds)}"
    known = "by flops alone" if math.isnan(found.seconds) else timed
    lines = [
        f"Recording adds about {ratio:.2g} times a plain step to it ({known}); every={every} keeps it "
        f"below {BUDGET:.0%}."
    ]
    if found.pulls:
        lines.append(f"Besides, {found.pulls} passes back through single ops, whose cost is not known before.")
    dear = [entry for entry in found.dearest if entry.decomposed][:DEAREST]
    if dear:
        named = ", ".join(f"{e.parameter} {e.kind} ({e.way}, {_shapes(e.decomposed)})" for e in dear)
        lines.append(f"The dearest: {named}.")
    lines.append(
        f"{found.cells} occupied cell{'s' if found.cells != 1 else ''} of groups; at most {size_of(found.memory)} held "
        f"at once; the store takes {size_of(1000 * found.store_bytes)} per 1000 recorded steps, before compression."
    )
    return tuple(lines)


def _short(text: str, most: int) -> str:
    """The end of a long name says most."""
    return text if len(text) <= most else "…" + text[1 - most :]


def size_of(count: int) -> str:
    """Bytes as people read them."""
    size, units = float(count), ["B", "KiB", "MiB", "GiB"]
    while size >= 1024 and len(units) > 1:
        size, units = size / 1024, units[1:]
    return f"{size:.3g} {units[0]}" if size < 1000 else f"{size:.0f} {units[0]}"


def time_of(seconds: float) -> str:
    """Seconds as people read them."""
    if math.isnan(seconds):
        return "-"
    for scale, unit in ((1, "s"), (1e-3, "ms"), (1e-6, "µs")):
        if seconds >= scale:
            return f"{seconds / scale:.3g} {unit}"
    return f"{seconds / 1e-6:.2g} µs"
