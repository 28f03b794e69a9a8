"""What tracing will compute, how, and what it will cost: pure arithmetic on the graph of a model's ops."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from gradtrace.decompose.problem import flops_of
from gradtrace.errors import SelectionError
from gradtrace.graph import OpGraph, Sizes
from gradtrace.metrics import stored
from gradtrace.planning.partition import Partition
from gradtrace.planning.planned import Entry, Plan
from gradtrace.planning.rates import Rates
from gradtrace.planning.ways import Work, gradient_work, kind_work, step_flops
from gradtrace.selection import checked_kinds
from gradtrace.store.rows import KINDS
from gradtrace.store.schema import width_class

PARTS = 8  # of a step's cost at most: survey, reduce, decompose, waited, behind, step, plain, period


def plan(
    graph: OpGraph,
    groups: Any = None,
    *,
    kinds: Sequence[str] = KINDS,
    keep: int | None = 64,
    every: int = 1,
    steps: int | None = None,
    rates: Rates | None = None,
) -> Plan:
    """What tracing will compute for each parameter, in which way, and what that costs per recorded step.

    graph: of `trace`, on a batch as large as those of the training. groups: labels of that batch as for `spectra`, or a
    mapping from grouping to how many labels it has; without it the whole alone. kinds, keep, every: as for `record`.
    steps: of the training, for the size of the store. rates: of a machine, by `planning.rates.measured_rates`.

    Nothing is run and no clock is read. Samples count as having equally many rows: those of packed sequences or routed
    tokens do not, and then the sizes of groups are only about right.
    Raises GroupError where the groupings cut the samples into too many cells.
    """
    if every < 1 or (steps is not None and steps < 0):
        raise SelectionError(f"every={every} must be 1 or more, and steps={steps} 0 or more.")
    wanted, partition = checked_kinds(kinds), Partition.of(groups, graph.n_samples)
    uses: dict[str, list[Sizes]] = {name: [] for name in graph.measured}
    for use in graph.sizes:
        if use.parameter in uses:
            uses[use.parameter].append(use)
    own = sum(step_flops(uses[name], math.prod(info["shape"])) for name, info in graph.measured.items())
    entries = tuple(_entries(graph, uses, wanted, partition, own, rates))
    return Plan(
        entries=entries,
        groups=tuple(share.group for share in partition.shares),
        cells=partition.cells,
        keep=keep,
        every=every,
        steps=steps,
        step_flops=own,
        step_seconds=math.nan if rates is None else own / rates.single,
        store_bytes=_store_bytes(entries, wanted, partition.stored, keep),
    )


def _entries(
    graph: OpGraph,
    uses: Mapping[str, Sequence[Sizes]],
    kinds: Sequence[str],
    partition: Partition,
    step: float,
    rates: Rates | None,
) -> Iterator[Entry]:
    passed = False  # the passes over the whole graph serve all parameters that need them
    for name, info in graph.measured.items():
        ops = tuple(dict.fromkeys(use.op for use in uses[name]))
        work = gradient_work(info, uses[name], partition)
        kept = work.way == "factors"
        if "gradient" not in kinds:  # summed for the audits all the same
            work = replace(work, decomposed=())
        whole = 0.0 if passed else 2 / 3 * step * work.passes
        passed = passed or bool(work.passes)
        yield _entry(name, ops, "gradient", work, whole, "", rates)
        for kind in kinds:
            if kind == "gradient" or kind not in info["kinds"]:
                continue
            known = [use for use in uses[name] if getattr(use, kind) is not None]
            work = kind_work(kind, known, partition, kept=kept)
            yield _entry(name, ops, kind, work, 0.0, info.get("shared", {}).get(kind, ""), rates)


def _entry(
    name: str, ops: tuple[str, ...], kind: str, work: Work, whole: float, shared: str, rates: Rates | None
) -> Entry:
    facts: dict[str, Any] = {
        "parameter": name,
        "ops": ops,
        "kind": kind,
        "way": work.way,
        "m": work.rows,
        "width": work.width,
    }
    facts |= {"p": work.sides[0], "q": work.sides[1]}
    if shared:
        seconds = math.nan if rates is None else 0.0
        return Entry(**facts, shared=shared, decomposed=(), flops=0.0, bytes=0, seconds=seconds)
    shapes = [*(("qr", sides) for sides in work.triangles), *((form, sides) for form, sides, _ in work.decomposed)]
    flops = work.single + work.double + whole + sum(flops_of(form, sides) for form, sides in shapes)
    seconds = math.nan
    if rates is not None:
        seconds = (work.single + whole) / rates.single + work.touched / rates.copied + work.calls * rates.call
        seconds += (work.double / rates.double + sum(rates.seconds(*shape) for shape in shapes)) / rates.workers
    facts |= {"decomposed": work.decomposed, "bytes": work.held, "pulls": work.pulls}
    return Entry(**facts, flops=flops, seconds=seconds)


def _store_bytes(entries: Sequence[Entry], kinds: Sequence[str], groups: int, keep: int | None) -> int:
    """The lengths of all rows of one recorded step, as `gradtrace.store` lays them out."""
    widths: dict[str, int] = {}
    for entry in entries:
        width = entry.width if keep is None else min(entry.width, keep)
        widths[entry.parameter] = max(widths.get(entry.parameter, 0), width)
    classes: dict[int, list[int]] = {}
    for width in widths.values():
        classes.setdefault(width_class(width), []).append(width)
    size = 8 * (3 + groups + PARTS)  # step, loss, epoch; n_samples; cost
    for members in classes.values():
        spectra, metrics = len(kinds) * max(members), len(kinds) * len(stored())
        numbers = groups * (spectra + metrics + groups) + 2  # inner products; residual, owner_residual
        size += len(members) * (4 * numbers + len(kinds) * groups)  # status: a byte
    return size
