"""Where the model ends and the loss begins: the values with a sample axis that the loss was computed from."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from gradtrace.errors import GroupError
from gradtrace.flow import Produced
from gradtrace.hosted import sent


@dataclass(frozen=True)
class Outlet:
    """A value of the model that reaches the loss, and which of its axes counts the samples."""

    edge: GradientEdge
    meta: Tensor
    axis: int
    context: Any

    @property
    def size(self) -> int:
        """The number of samples."""
        return int(self.meta.shape[self.axis])

    def spread(self, weights: Tensor, cotangent: Tensor) -> Tensor:
        """`cotangent` with each sample's part multiplied by its weight; `weights` (samples,)."""
        shape = [-1 if a == self.axis else 1 for a in range(self.meta.dim())]
        dtype = cotangent.real.dtype if cotangent.is_complex() else cotangent.dtype
        factor = sent(weights.to(dtype), cotangent.device).reshape(shape)
        return torch.where(factor == 0, torch.zeros_like(cotangent), cotangent * factor)


class Evidence(IntEnum):
    """What the ops behind a value say when its cotangent is coded along an axis; better last."""

    FEATURES = 0  # an axis of a parameter lies along it
    MIXED = 1  # all rows are fed by several indices of the axis
    NOTHING = 2  # there is no op to ask
    PARTLY = 3  # some rows belong to one index each
    SAMPLES = 4  # all do


class SampleAxes(dict[Any, int]):
    """The sample axis of values met before: by number of axes, of the model's outputs, and by place, of every outlet.

    refuted: what was found to count features; (place, axis).
    """

    def __init__(self) -> None:
        super().__init__()
        self.refuted: set[tuple[Any, int]] = set()


def sample_axis(shape: Sequence[int], n_samples: int | None, sample_dim: int | None) -> int | None:
    """The axis of `shape` that counts the samples, as far as its length tells, or None; asks where several could.

    Without labels (`n_samples` None) it is `sample_dim`, or the first axis.
    """
    fitting = _fitting(shape, n_samples, sample_dim)
    if len(fitting) > 1:
        raise GroupError(_asking(shape, n_samples, fitting))
    return fitting[0] if fitting else None


def _fitting(shape: Sequence[int], n_samples: int | None, sample_dim: int | None) -> list[int]:
    """The axes that could count the samples by their length."""
    if sample_dim is not None:
        axis = sample_dim + len(shape) if sample_dim < 0 else sample_dim
        fits = 0 <= axis < len(shape) and (n_samples is None or shape[axis] == n_samples)
        return [axis] if fits else []
    if n_samples is None:
        return [0] if shape else []
    fitting = [axis for axis, size in enumerate(shape) if size == n_samples]
    return fitting[:1] if n_samples == 1 else fitting  # the one sample owns everything, along whichever axis


def _asking(shape: Sequence[int], n_samples: int | None, fitting: Sequence[int]) -> str:
    return (
        f"The model's output has shape {tuple(shape)} and there are {n_samples} labels: axes {list(fitting)} could "
        "both count the samples. Say which one with sample_dim=."
    )


class Chooser:
    """Which axis of a value counts the samples.

    Its length is not enough: as many experts, classes or hidden units as samples are no rarity. So what fits is put to
    the test (`judge`), once per place in the model (`told`). n_samples: the number of labels by context id.
    """

    def __init__(
        self,
        n_samples: Mapping[int, int | None],
        sample_dim: int | None,
        told: SampleAxes,
        judge: Callable[[Sequence[tuple[Produced, int]]], Evidence],
    ) -> None:
        self.n_samples, self.sample_dim, self.told, self._judge = n_samples, sample_dim, told, judge
        self._chosen: dict[tuple[Any, int], tuple[int | None, Evidence]] = {}

    def axis_of(self, made: Produced) -> int | None:
        """The sample axis of a value, or None; GroupError where several axes could be it."""
        return self._choice(made)[0]

    def is_sure(self, made: Produced) -> bool:
        """Whether the test spoke for that axis."""
        return self._choice(made)[1] >= Evidence.PARTLY

    def is_doubtful(self, made: Produced) -> bool:
        """Whether nothing but its length speaks for that axis, and something against it."""
        return self._choice(made)[1] is Evidence.MIXED

    def presume(self, met: Sequence[Produced]) -> None:
        """Tests many values at once: where all rows behind them belong to one sample each, all axes count samples."""
        together: dict[int, list[tuple[Produced, int]]] = {}
        for made in met:
            fitting = self._left(made)
            if len(fitting) == 1 and made.place not in self.told and self._n(made) not in (None, 1):
                together.setdefault(id(made.context), []).append((made, fitting[0]))
        for values in together.values():
            sure = [(made, axis) for made, axis in values if not self._is_folded(made, axis)]
            if len(sure) > 1 and self._judge(sure) is Evidence.SAMPLES:
                self.told.update({made.place: axis for made, axis in sure})

    def settle(self, made: Produced, *, counts: bool) -> None:
        """Remembers whether an axis counts samples; GroupError where it shall, and only its length speaks for it."""
        axis, evidence = self._choice(made)
        n = self._n(made)
        if axis is None or n is None or n == 1:
            return
        if not counts:
            self.told.refuted.add((made.place, axis))
            self._chosen[made.edge.node, made.edge.output_nr] = (None, Evidence.FEATURES)
        elif evidence is Evidence.MIXED and axis > 0 and self.sample_dim is None:
            raise GroupError(
                f"The model's output has shape {tuple(made.meta.shape)} and there are {n} labels: axis {axis} is that "
                f"long, but it may count something else. Say which axis counts the samples with sample_dim=, be it "
                f"{axis}; give one label per index of it."
            )
        elif evidence is not Evidence.NOTHING:
            self.told[made.place] = axis

    def _choice(self, made: Produced) -> tuple[int | None, Evidence]:
        key = (made.edge.node, made.edge.output_nr)
        if key not in self._chosen:
            self._chosen[key] = self._choose(made)
        return self._chosen[key]

    def _n(self, made: Produced) -> int | None:
        return self.n_samples.get(id(made.context))

    def _left(self, made: Produced) -> list[int]:
        """The axes that could count the samples, but for those known not to."""
        fitting = _fitting(tuple(made.meta.shape), self._n(made), self.sample_dim)
        return [axis for axis in fitting if (made.place, axis) not in self.told.refuted]

    def _is_folded(self, made: Produced, axis: int) -> bool:
        """Whether the first axis could count the samples as well, several rows each."""
        first, n = made.meta.shape[0], self._n(made)
        return axis > 0 and self.sample_dim is None and n is not None and first > n and first % n == 0

    def _choose(self, made: Produced) -> tuple[int | None, Evidence]:
        fitting, n, rank = self._left(made), self._n(made), made.meta.dim()
        if not fitting or n is None or n == 1:
            return (fitting[0] if fitting else None), Evidence.NOTHING
        if self.told.get(made.place) in fitting:
            return self.told[made.place], Evidence.SAMPLES
        evidence = {axis: self._judge([(made, axis)]) for axis in fitting}
        self.told.refuted |= {(made.place, a) for a, found in evidence.items() if found is Evidence.FEATURES}
        best = max(evidence.values())
        if best is Evidence.FEATURES:
            return None, best
        likely = [axis for axis, found in evidence.items() if found is best]
        if len(likely) > 1 and self.told.get(rank) not in likely:
            raise GroupError(_asking(made.meta.shape, n, likely))
        axis = likely[0] if len(likely) == 1 else self.told[rank]
        return axis, Evidence.MIXED if self._is_folded(made, axis) else best


def outlets_of(
    roots: Sequence[GradientEdge], produced: Mapping[tuple[Any, int], Produced], chooser: Chooser
) -> list[Outlet]:
    """The outlets behind `roots`, in the order of the forward pass.

    They are the model's values that the loss was computed from. Where such a value has no sample axis (a loss computed
    inside the model), the walk goes on into the model, to the nearest values that have one. So it does where all that
    speaks for an axis is its length, and other outlets have a better one.
    """
    axis_of, start = chooser.axis_of, [(root.node, root.output_nr) for root in roots]
    found, without = _sorted_out(list(_first_inside(start, produced)), [], chooser)
    ops = frozenset().union(*(made.sources for made in without if made.border))
    if ops:  # a function's own ops: what lies between them and the loss may count samples where they do not
        after = list(_first(start, produced, lambda made: bool(made.sources & ops) and axis_of(made) is not None))
        covered = frozenset().union(*(made.sources for made in after))
        found, without = [*found, *after], [m for m in without if not m.border or m.sources - covered]
    wrong = [made for made in without if made.meta.numel() > 1]
    if wrong and not found:
        raise GroupError(_without_samples(wrong[0], chooser))
    outputs = list(found)
    while without:
        queue = [edge for made in without for edge in made.edge.node.next_functions]
        found, without = _sorted_out(list(_first_inside(queue, produced)), found, chooser)
    unique = {(made.edge.node, made.edge.output_nr): made for made in found}.values()
    ordered = sorted(unique, key=lambda made: made.edge.node._sequence_nr())
    outlets = [Outlet(m.edge, m.meta, axis, m.context) for m in ordered if (axis := axis_of(m)) is not None]
    sizes: dict[int, int] = {}  # without labels the first outlet says how many samples there are
    outlets = [o for o in outlets if o.size == sizes.setdefault(id(o.context), o.size)]
    for made in outputs:
        if made.meta.dim() not in chooser.told and (axis := axis_of(made)) is not None:
            chooser.told[made.meta.dim()] = axis
    return outlets


def _sorted_out(met: list[Produced], before: list[Produced], chooser: Chooser) -> tuple[list[Produced], list[Produced]]:
    """The outlets so far, with those among the values `met`; and the values that have no sample axis."""
    chooser.presume(met)
    fitting = [made for made in met if chooser.axis_of(made) is not None]
    sure = {id(made.context) for made in [*before, *fitting] if chooser.is_sure(made)}
    for made in fitting:
        chooser.settle(made, counts=not (chooser.is_doubtful(made) and id(made.context) in sure))
    found = [made for made in fitting if chooser.axis_of(made) is not None]
    return [*before, *found], [made for made in met if chooser.axis_of(made) is None]


def _without_samples(made: Produced, chooser: Chooser) -> str:
    shape, labels, given = tuple(made.meta.shape), chooser.n_samples.get(id(made.context)), chooser.sample_dim
    what = "what the function computed last with a parameter" if made.border else "the model's output"
    refuted = [axis for axis in range(len(shape)) if (made.place, axis) in chooser.told.refuted]
    length = f"no axis counts {labels} samples" if given is None else f"no axis {given} of that length"
    if refuted:
        length = f"axis {refuted[0]} is that long, but a parameter has an axis that lies along it: it counts features"
    remedy = ", or correct sample_dim=." if given is not None else ", or name the sample axis with sample_dim=."
    found = f"There are {labels} labels, and {what} has shape {shape}: {length}."
    return f"{found} Give one label per sample of this batch{remedy}"


def _first_inside(start: Sequence[tuple[Any, int]], produced: Mapping[tuple[Any, int], Produced]) -> Iterator[Produced]:
    """The first values made inside the model, or by a function's own ops, on every path of the graph from `start`."""
    return _first(start, produced, lambda made: made.inside or made.border)


def _first(
    start: Sequence[tuple[Any, int]],
    produced: Mapping[tuple[Any, int], Produced],
    wanted: Callable[[Produced], bool],
) -> Iterator[Produced]:
    """The first `wanted` values on every path of the graph from `start`."""
    seen: set[Any] = set()
    queue = list(start)
    while queue:
        here = queue.pop()
        if here in seen or here[0] is None:
            continue
        seen.add(here)
        made = produced.get(here)
        if made is not None and not made.parameter_only and wanted(made):
            yield made
        else:
            queue.extend(here[0].next_functions)


def random_cotangent(outlet: Outlet, generator: torch.Generator) -> Tensor:
    """A cotangent of order one for `outlet`, on the device where its gradients live."""
    meta = outlet.meta
    kind = meta.dtype if meta.dtype in (torch.float64, torch.complex64, torch.complex128) else torch.float32
    drawn = torch.randn(meta.shape, generator=generator, dtype=kind)
    return drawn.to(device=outlet.edge.node._input_metadata[outlet.edge.output_nr].device, dtype=meta.dtype)
