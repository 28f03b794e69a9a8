"""Passes over the live graph, before the real backward, that find out whose row is whose.

They start at the model's outlets with random cotangents, on the graph as it is (nothing is run forward again), and
leave it as it was. Batch statistics count as constants in them, so that samples coupled by batch norm decode.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from gradtrace.capture import Capture
from gradtrace.groups import Label
from gradtrace.hosted import sent
from gradtrace.ops import Op, OpKey
from gradtrace.outlets import Outlet, SampleAxes, random_cotangent
from gradtrace.ownership import MIXED, UNKNOWN, Codes, Layout, compact, layouts_of
from gradtrace.pull import through_graph

MOST_BYTES = 2**25  # of adjoints that one probe asks for, unless a single op has more
CONFIRMED = 3  # probes that must agree on a layout before it is used without one
Slot = tuple[int, int]  # op number, output number


@dataclass
class Memory:
    """What is known about a model from step to step.

    layouts: the layouts that still explain an op's output; an empty list says ownership changes from step to step.
    folds: rows per sample met along an axis; family, output, axis, rows. Twice the rows may be another batch, which has
    no labels.
    """

    generator: torch.Generator = field(default_factory=lambda: torch.Generator().manual_seed(0x67726164))
    layouts: dict[tuple[OpKey, int], list[Layout]] = field(default_factory=dict)
    confirmed: Counter[tuple[OpKey, int]] = field(default_factory=Counter)  # probes that a layout has explained
    sure: set[tuple[Any, int]] = field(default_factory=set)  # families of ops with enough of them
    folds: set[tuple[Any, int, int, int]] = field(default_factory=set)
    transparent: set[OpKey] = field(default_factory=set)
    opaque: dict[str, str] = field(default_factory=dict)  # parameter -> why only the global way is left
    coupled: set[str] = field(default_factory=set)
    unreached: set[tuple[OpKey, int]] = field(default_factory=set)  # outputs that led to no loss in the last step
    ungrouped: dict[str, str] = field(default_factory=dict)  # parameter -> why no group's share is known
    audited: set[str] = field(default_factory=set)
    sample_axes: SampleAxes = field(default_factory=SampleAxes)
    label_types: dict[str, tuple[str, Label]] = field(default_factory=dict)  # grouping -> type of its labels, and one
    steps: int = 0

    def reconsider(self, known_constants: int) -> None:
        """What looked opaque or coupled may have been a constant that has since been told apart."""
        if len(self.transparent) > known_constants:
            self.opaque.clear()
            self.coupled.clear()
            self.audited.clear()

    def layout(self, key: OpKey, output: int) -> Layout | None:
        """The one layout of an op's output; that of its siblings where this call was never probed."""
        known = self.layouts.get((key, output))
        if known is None:
            family = [v for (k, o), v in self.layouts.items() if k.family == key.family and o == output]
            known = family[0] if family and all(v == family[0] for v in family) else []
        return known[0] if len(known) == 1 else None

    def trusted(self, key: OpKey, output: int, shape: Sequence[int], n_samples: int) -> Layout | None:
        """The layout of an op's output once CONFIRMED probes agreed: a few routed rows may fit one by chance."""
        layout = self.layout(key, output) if (key.family, output) in self.sure else None
        if layout is None or layout.axis >= len(shape):
            return None
        return layout if (key.family, output, layout.axis, shape[layout.axis] // n_samples) in self.folds else None

    def learn(self, key: OpKey, output: int, owners: Tensor, n_samples: int) -> None:
        """Keeps the layouts that explain these owners too."""
        fitting = layouts_of(owners, n_samples)
        self.folds |= {(key.family, output, one.axis, owners.shape[one.axis] // n_samples) for one in fitting}
        self.confirmed[key, output] += 1
        if self.confirmed[key, output] >= CONFIRMED:
            self.sure.add((key.family, output))
        before = self.layouts.get((key, output))
        self.layouts[key, output] = fitting if before is None else [one for one in before if one in fitting]


@dataclass(frozen=True)
class Probe:
    """The outlets of one batch and the cotangents that probe it."""

    capture: Capture
    outlets: Sequence[Outlet]
    cotangents: Sequence[Tensor]
    n_samples: int

    @classmethod
    def draw(cls, capture: Capture, outlets: Sequence[Outlet], n_samples: int, generator: torch.Generator) -> Probe:
        return cls(capture, outlets, [random_cotangent(o, generator) for o in outlets], n_samples)

    @contextmanager
    def passing(self, *, frozen: bool) -> Iterator[None]:
        with self.capture.silence(), torch.no_grad():
            self.capture.frozen = frozen
            try:
                yield
            finally:
                self.capture.frozen = False

    def adjoints(
        self, edges: Sequence[GradientEdge], weights: Tensor | None = None, *, frozen: bool = True
    ) -> list[Tensor | None]:
        """The adjoints at `edges`, each sample's cotangent multiplied by its weight (samples,)."""
        cotangents = self.cotangents
        if weights is not None:
            cotangents = [o.spread(weights, c) for o, c in zip(self.outlets, cotangents, strict=True)]
        with self.passing(frozen=frozen):
            return through_graph([o.edge for o in self.outlets], cotangents, edges)


def batches(ops: Sequence[Op]) -> Iterator[list[Op]]:
    """The ops some at a time: a probe holds the adjoints of all it asks for, and these are as large as activations."""
    held: list[Op] = []
    size = 0
    for op in ops:
        size += sum(o.meta.numel() * o.meta.element_size() for o in op.outputs)
        if held and size > MOST_BYTES:
            yield held
            held, size = [], sum(o.meta.numel() * o.meta.element_size() for o in op.outputs)
        held.append(op)
    if held:
        yield held


def find_owners(probe: Probe, ops: Sequence[Op], memory: Memory) -> Iterator[tuple[Slot, Tensor, Tensor]]:
    """For every output that a probe reaches, one after the other: its adjoint, and the owner of every element of it."""
    slots = [(op, i) for op in ops for i in range(len(op.outputs))]
    edges = [op.outputs[i].edge for op, i in slots]
    half = any(o.meta.dtype == torch.float16 for o in probe.outlets)
    codes = Codes.draw(probe.n_samples, memory.generator, dtype=torch.float16 if half else torch.float32)
    plain = probe.adjoints(edges)
    coded = [probe.adjoints(edges, codes.factor(place)) for place in range(len(codes.digits))]
    for place, (op, i) in enumerate(slots):
        here, powers = plain[place], [one[place] for one in coded]
        for one in (plain, *coded):
            one[place] = None  # they are as large as the activations: none is held longer than it is asked
        if here is not None and all(p is not None for p in powers):
            owners = codes.decode(here, [p for p in powers if p is not None])
            yield (op.number, i), op.outputs[i].adjoint(here), owners.reshape(op.outputs[i].meta.shape)


def settle(slot_owners: Tensor, op: Op, output: int, n_samples: int, memory: Memory) -> Tensor | None:
    """Owners to use for an output, from what was decoded and what is known; None where samples are mixed."""
    if bool((slot_owners == MIXED).any()):
        return None
    if n_samples == 1:
        return torch.zeros((1,) * slot_owners.dim(), dtype=torch.int64)
    if op.routed or not bool((slot_owners != UNKNOWN).any()):
        return compact(slot_owners).long()
    memory.learn(op.key, output, slot_owners, n_samples)
    layout = memory.layout(op.key, output)
    full = layout.owners(slot_owners.shape, n_samples) if layout else None
    return full if full is not None else compact(slot_owners).long()


def find_coupled(probe: Probe, ops: Sequence[Op], owners: Mapping[Slot, Tensor], memory: Memory) -> set[str]:
    """Parameters of the ops whose rows stop decoding once batch statistics are differentiated through."""
    if not probe.capture.batch_norms or probe.n_samples == 1:
        return set()
    slots = [(op, i) for op in ops for i in range(len(op.outputs)) if (op.number, i) in owners]
    edges = [op.outputs[i].edge for op, i in slots]
    factor = Codes.draw(probe.n_samples, memory.generator).factor(0)
    plain = probe.adjoints(edges, frozen=False)
    coded = probe.adjoints(edges, factor, frozen=False)
    coupled: set[str] = set()
    for (op, i), before, after in zip(slots, plain, coded, strict=True):
        if before is None or after is None:
            continue
        before, after = op.outputs[i].adjoint(before), op.outputs[i].adjoint(after)
        of_row = sent(torch.cat([factor, torch.ones(1, dtype=factor.dtype)])[owners[op.number, i]], before.device)
        expected = before * of_row.to(before.real.dtype)
        if not torch.equal(torch.where(before == 0, after, expected), after):
            coupled.update(*(o.value.parameters for o in op.operands))
    return coupled
