"""Where the model ends and the loss begins: the values with a sample axis that the loss was computed from."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from gradtrace.errors import GroupError
from gradtrace.flow import Produced


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
        factor = weights.to(device=cotangent.device, dtype=dtype).reshape(shape)
        return torch.where(factor == 0, torch.zeros_like(cotangent), cotangent * factor)


def sample_axis(
    shape: Sequence[int], n_samples: int | None, sample_dim: int | None, told: Mapping[int, int] | None = None
) -> int | None:
    """The axis of `shape` that counts the samples, or None; asks where several could.

    Without labels (`n_samples` None) it is `sample_dim`, or the first axis. `told`: number of axes -> the sample axis
    of earlier outputs, for a batch as long as another axis.
    """
    if not shape:
        return None
    if sample_dim is not None:
        axis = sample_dim + len(shape) if sample_dim < 0 else sample_dim
        fits = 0 <= axis < len(shape) and (n_samples is None or shape[axis] == n_samples)
        return axis if fits else None
    if n_samples is None:
        return 0
    fitting = [axis for axis, size in enumerate(shape) if size == n_samples]
    if len(fitting) > 1 and told is not None and told.get(len(shape)) in fitting:
        return told[len(shape)]
    if len(fitting) > 1:
        raise GroupError(
            f"The model's output has shape {tuple(shape)} and there are {n_samples} labels: axes {fitting} could both "
            "count the samples. Say which one with sample_dim=."
        )
    return fitting[0] if fitting else None


def outlets_of(
    roots: Sequence[GradientEdge],
    produced: Mapping[tuple[Any, int], Produced],
    n_samples: Mapping[int, int | None],
    sample_dim: int | None,
    told: dict[int, int],
) -> list[Outlet]:
    """The outlets behind `roots`, in the order of the forward pass.

    They are the model's values that the loss was computed from. Where such a value has no sample axis (a loss computed
    inside the model), the walk goes on into the model, to the nearest values that have one. `n_samples`: the number of
    labels by context id.
    `told` is read and added to: the sample axis by number of axes.
    """

    def axis_of(made: Produced) -> int | None:
        return sample_axis(tuple(made.meta.shape), n_samples.get(id(made.context)), sample_dim, told)

    border = list(_first_inside([(root.node, root.output_nr) for root in roots], produced))
    found = [made for made in border if axis_of(made) is not None]
    without = [made for made in border if axis_of(made) is None]
    ops = frozenset().union(*(made.sources for made in without if made.border))
    if ops:  # a function's own ops: what lies between them and the loss may count samples where they do not
        start = [(root.node, root.output_nr) for root in roots]
        after = list(_first(start, produced, lambda made: bool(made.sources & ops) and axis_of(made) is not None))
        covered = frozenset().union(*(made.sources for made in after))
        found, without = [*found, *after], [m for m in without if not m.border or m.sources - covered]
    wrong = [made for made in without if made.meta.numel() > 1]
    if wrong and not found:
        shape, labels = tuple(wrong[0].meta.shape), n_samples.get(id(wrong[0].context))
        what = "what the function computed last with a parameter" if wrong[0].border else "the model's output"
        raise GroupError(
            f"There are {labels} labels, and {what} has shape {shape}: no axis "
            + (f"counts {labels} samples" if sample_dim is None else f"{sample_dim} of that length")
            + ". Give one label per sample of this batch"
            + (", or name the sample axis with sample_dim=." if sample_dim is None else ", or correct sample_dim=.")
        )
    while without:
        queue = [edge for made in without for edge in made.edge.node.next_functions]
        beyond = list(_first_inside(queue, produced))
        found += [made for made in beyond if axis_of(made) is not None]
        without = [made for made in beyond if axis_of(made) is None]
    unique = {(made.edge.node, made.edge.output_nr): made for made in found}.values()
    ordered = sorted(unique, key=lambda made: made.edge.node._sequence_nr())
    outlets = [Outlet(m.edge, m.meta, axis, m.context) for m in ordered if (axis := axis_of(m)) is not None]
    sizes: dict[int, int] = {}  # without labels the first outlet says how many samples there are
    outlets = [o for o in outlets if o.size == sizes.setdefault(id(o.context), o.size)]
    for outlet in outlets:
        told.setdefault(outlet.meta.dim(), outlet.axis)
    return outlets


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
