"""The most that the rank of a parameter's gradient can be, by construction, and why: arithmetic on an `OpGraph`.

*Source*: arXiv:2402.06751. G = A^T D over the rows of all samples and positions, so its rank is at most that of either,
and at most the number of rows. Through linear layers with nothing between them the narrowest bounds it too: A is the
product of an earlier A with all weights in between, and D that of a later D.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from gradtrace.attribution import Attribution, attribution, attribution_of
from gradtrace.graph import OpGraph, Sizes
from gradtrace.store.schema import metric_variable

if TYPE_CHECKING:
    from gradtrace.store.reading.reader import Run

__all__ = ["Attribution", "Bound", "attribution", "attribution_of", "beside", "rank_bounds"]

CONVOLUTIONS = frozenset(f"conv{form}{axes}d" for form in ("", "_transpose") for axes in (1, 2, 3))
LOOKUPS = frozenset(("embedding", "embedding_bag"))


@dataclass(frozen=True)
class Bound:
    """The rank of a parameter's gradient over all samples is at most `rank`, for the `reason`.

    sides: of the gradient's matrix, whose smaller one always bounds it.
    """

    parameter: str
    rank: int
    reason: str
    sides: tuple[int, int]

    @property
    def is_low(self) -> bool:
        """Whether the gradient cannot have full rank."""
        return self.rank < min(self.sides)

    def __str__(self) -> str:
        return f"{self.parameter}: at most {self.rank} ({self.reason})"


@dataclass(frozen=True)
class _Limit:
    rank: int
    reason: str


@dataclass
class _Lines:
    """The calls of `linear` of a graph: how wide each is, whose weight it has, what comes right before and after it."""

    known: Mapping[str, int]
    affine: set[str] = field(default_factory=set)
    sizes: dict[str, Sizes] = field(default_factory=dict)
    before: dict[str, str] = field(default_factory=dict)
    after: dict[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, graph: OpGraph, known: Mapping[str, int]) -> _Lines:
        found = cls(known)
        for size in graph.sizes:
            if graph.nx.nodes[size.op]["map"] and size.activation is not None and size.adjoint is not None:
                found.sizes.setdefault(size.op, size)
        found.affine = {op for op, kind in graph.nx.nodes(data="map") if kind == "affine"}
        for first, second, edge in graph.nx.edges(data=True):
            if edge["feeds"] and first in found.sizes and second in found.sizes:
                found.before[second] = first
                if edge["alone"]:
                    found.after[first] = second
        return found

    def of_activations(self, op: str) -> Iterator[_Limit]:
        """What bounds the rank of an op's activations: a bias adds the same row to all, and so one to their rank."""
        more, here = 0, op
        yield from self._known(here, more)
        while here in self.before:
            here = self.before[here]
            more = 1 if here in self.affine else more
            inputs, first = self.sizes[here].activation or 0, here not in self.before
            at = self.sizes[here if first else self.before[here]].parameter
            what = f"{inputs} inputs of {at}" if first else f"narrowest linear layer before: {inputs} ({at})"
            yield _Limit(inputs + more, f"{what}{_plus(more)}, nothing nonlinear in between")
            yield from self._known(here, more)

    def of_adjoints(self, op: str) -> Iterator[_Limit]:
        """What bounds the rank of an op's adjoints."""
        here = op
        while here in self.after:
            here = self.after[here]
            outputs, at = self.sizes[here].adjoint or 0, self.sizes[here].parameter
            yield _Limit(outputs, f"narrowest linear layer after: {outputs} ({at}), nothing nonlinear in between")

    def _known(self, op: str, more: int) -> Iterator[_Limit]:
        name = self.sizes[op].parameter if op in self.sizes else ""
        if name in self.known:
            yield _Limit(self.known[name] + more, f"rank of the activations of {name}: {self.known[name]}{_plus(more)}")


def _plus(more: int) -> str:
    return " + 1 for biases" if more else ""


def rank_bounds(graph: OpGraph, *, known: Mapping[str, int] | None = None) -> dict[str, Bound]:
    """Parameter -> a bound on the numerical rank of its gradient over all samples, for every one that gets a gradient.

    graph: of `trace`, on a batch as large as those of the training: rows are counted in it. known: the rank of the
    activations of weights in `linear` calls, where it is known to be lower than their width: of the data, say.

    Only what cannot be otherwise counts: a way of use that is not understood leaves the sides of the matrix. Taken for
    granted is that the loss reads the model's outputs and nothing else (no hidden value, no weight; `gradtrace doctor`
    looks at the study's own loss), and that no `.data` or hook on a node changes values behind autograd's back.
    """
    lines = _Lines.of(graph, known or {})
    uses: dict[str, list[Sizes]] = {name: [] for name in graph.measured}
    for size in graph.sizes:
        uses.setdefault(size.parameter, []).append(size)
    return {name: _bound(name, info, uses[name], graph, lines) for name, info in graph.measured.items()}


def _bound(name: str, info: Mapping[str, Any], uses: Sequence[Sizes], graph: OpGraph, lines: _Lines) -> Bound:
    shape = tuple(info["shape"])
    sides = (shape[0], math.prod(shape[1:])) if len(shape) > 1 else (1, math.prod(shape))
    if len(shape) < 2:
        return Bound(name, min(sides), "a vector is one row", sides)
    limits = [_of_use(use, graph, lines) for use in uses] if info["rung"] == "factored" else []
    found = [limit for limit in limits if limit is not None]
    whole = _Limit(min(sides), f"its matrix is {sides[0]} x {sides[1]}")
    if not limits or len(found) < len(limits):
        return Bound(name, whole.rank, whole.reason, sides)
    least = min(whole, _together(found), key=lambda limit: limit.rank)
    return Bound(name, least.rank, least.reason, sides)


def _of_use(use: Sizes, graph: OpGraph, lines: _Lines) -> _Limit | None:
    """What bounds one use's part of the gradient; None where rows of A and D do not tell its rank."""
    function = graph.nx.nodes[use.op]["function"]
    plain = use.itself and function in CONVOLUTIONS | LOOKUPS
    if not use.owned or not use.direct or (use.form != "outer" and not plain):
        return None
    limits = [_Limit(use.rows, _rows(use.rows, graph.n_samples))]
    if use.op in lines.sizes:
        limits += [*lines.of_activations(use.op), *lines.of_adjoints(use.op)]
    return min(limits, key=lambda limit: limit.rank)


def _rows(rows: int, samples: int | None) -> str:
    if not samples or rows % samples:
        return f"{rows} rows"
    positions = rows // samples
    return f"{samples} samples x {positions} position{'' if positions == 1 else 's'}"


def _together(uses: Sequence[_Limit]) -> _Limit:
    """The bound of a sum."""
    if len(uses) == 1:
        return uses[0]
    parts = " + ".join([str(limit.rank) for limit in uses[:4]] + ["..."] * (len(uses) > 4))
    return _Limit(sum(limit.rank for limit in uses), f"{parts}, over its {len(uses)} uses")


def beside(bounds: Mapping[str, Bound], run: Run, *, probe: str | None = None) -> list[dict[str, Any]]:
    """One row per parameter: its bound, the reason, and the largest numerical rank that the run has of all samples."""
    stream, rows = run.stream(probe), []
    for name, bound in bounds.items():
        variable, most = metric_variable("gradient", "numerical_rank"), math.nan
        if variable in stream.variables(name):
            ranks = stream.read(name, variable)[:, stream.groups.index("all")]
            most = float(np.nanmax(ranks)) if np.isfinite(ranks).any() else math.nan
        rows.append({"parameter": name, "bound": bound.rank, "measured": most, "reason": bound.reason})
    return rows
