"""What one parameter gathers during one recorded step: its gradient per cell, and the rows of its factors.

A *cell* is a set of samples that no grouping tells apart (a diagnosis and a sex, say); groups are unions of cells.
Rows are kept as factors while they are few, and folded into one matrix per cell when they are many.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from gradtrace.decompose.dense import is_exact
from gradtrace.decompose.factored import SmallFactors
from gradtrace.decompose.gram import rounded_problem
from gradtrace.decompose.problem import Problem, summed_problem
from gradtrace.factors import LookupFactors, Norms
from gradtrace.hosted import is_here, picked, places_of, sent
from gradtrace.kinds import KindRows, LookupRows, Shared
from gradtrace.sources import Source

PROBES = 4  # random vectors that stand for a gradient that is never formed


@dataclass
class GradientSum:
    """The gradient per cell: as rows of L and R (G = L^T R) while they are few, or as one dense tensor per cell."""

    shape: tuple[int, ...]
    parts: list[tuple[Tensor, Tensor, Tensor]] = field(default_factory=list)  # L, R, cells (on the host)
    dense: dict[int, Tensor] = field(default_factory=dict)
    n_rows: int = 0
    left: dict[int, Tensor] = field(default_factory=dict)  # cell left to subtraction -> its gradient times the probes
    small: SmallFactors | None = None  # the parts, decomposed

    @property
    def sides(self) -> tuple[int, int]:
        return matrix_shape(self.shape)

    @property
    def is_factored(self) -> bool:
        return bool(self.parts) and not self.dense

    def add_outer(self, left: Tensor, right: Tensor, cells: Tensor, *, leave: int | None = None) -> None:
        """Rows of L (m, p) and R (m, q) with G = L^T R in the parameter's own orientation.

        leave: a cell whose gradient, if it would be summed here, is left to `settle`; all rows are finite then.
        """
        self.parts.append((left, right, cells))
        self.n_rows += len(left)
        if self.dense or self.n_rows > min(self.sides):
            self._fold(leave)

    def add_dense(self, gradients: dict[int, Tensor]) -> None:
        """One tensor per cell, in the parameter's shape."""
        self._fold()
        for cell, gradient in gradients.items():
            self._add(cell, gradient.to(_summed_in(gradient.dtype)).reshape(self.shape), owned=False)

    def _add(self, cell: int, gradient: Tensor, *, owned: bool) -> None:
        """owned: nobody else has this tensor."""
        if cell in self.left:
            probes = probes_of(self.sides[1], gradient.dtype, gradient.device)
            self.left[cell] = self.left[cell] + gradient.reshape(self.sides) @ probes
        if cell in self.dense:
            self.dense[cell] = self.dense[cell] + gradient
        elif cell not in self.left:  # else it is part of the whole that is still to come
            self.dense[cell] = gradient if owned else gradient.clone()

    def leave(self, cell: int, products: Tensor) -> None:
        """Leaves a cell's gradient to `settle`; `products` are those of it with `probes_of`."""
        self.left[cell] = products

    def settle(self, whole: Tensor | None) -> None:
        """Gives the cell that was left what all others leave of the whole gradient; NaN where that never came."""
        for cell in self.left.keys() - self.dense.keys():
            if whole is None:
                self.dense[cell] = self.left[cell].new_full(self.shape, float("nan"))
                continue
            rest = whole.reshape(self.shape).clone()
            for gradient in self.dense.values():
                rest -= gradient
            self.dense[cell] = rest

    def _fold(self, leave: int | None = None) -> None:
        parts, self.parts, self.small = self.parts, [], None
        for left, right, cells in parts:
            left, right = left.to(_summed_in(left.dtype)), right.to(_summed_in(right.dtype))
            for cell in torch.unique(cells).tolist():
                if cell == leave:
                    seen = right @ probes_of(self.sides[1], right.dtype, right.device)
                    seen.masked_fill_(sent(cells != cell, seen.device)[:, None], 0)
                    self.leave(cell, (seen.T @ left).T)  # the other way about takes ten times as long
                    continue
                index = places_of(cells == cell)
                gradient = picked(left, index).T @ picked(right, index)
                self._add(cell, gradient.reshape(self.shape), owned=True)

    def times(self, probes: Tensor) -> Tensor:
        """(sum over cells of G) V for V = `probes_of` (q, k): how a gradient that is never formed is audited."""
        total = sum(((right @ probes.to(right.dtype)).T @ left).T for left, right, _ in self.parts)
        for cell, gradient in self.dense.items():
            if cell not in self.left:  # that would be the whole again, whatever the others are
                total = total + gradient.reshape(self.sides) @ probes.to(gradient.dtype)
        for products in self.left.values():
            total = total + products
        return total if isinstance(total, Tensor) else probes.new_zeros(self.sides[0], probes.shape[1])

    @property
    def flops(self) -> float:
        """About what `reduce` takes."""
        return 2.0 * self.n_rows**2 * sum(self.sides) if self.is_factored else 0.0

    def reduce(self) -> None:
        """Decomposes the rows that were kept as factors, once for all groups.

        Where some are not finite they become one dense tensor per cell: the groups of others can still be measured.
        """
        if not self.is_factored or self.small is not None:
            return
        columns = list(zip(*self.parts, strict=True))
        small = SmallFactors.of(*(each[0] if len(each) == 1 else torch.cat(each) for each in columns))
        if small.is_finite:
            self.small = small
        else:
            self._fold()


@dataclass
class ParameterSum:
    """Everything gathered of one parameter in one step."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    gradient: GradientSum = field(init=False)
    activation: KindRows | LookupRows | None = None
    adjoint: KindRows | None = None
    absent: dict[str, str] = field(default_factory=dict)  # kind -> why it is absent
    eps: float = 0.0  # of the coarsest dtype met
    _scale: float | Tensor = 0.0
    _power: dict[int, tuple[float, float]] = field(default_factory=dict)
    _unread: list[tuple[list[int], Tensor]] = field(default_factory=list)  # cells, and what adds to their power

    def __post_init__(self) -> None:
        self.gradient = GradientSum(self.shape)

    def add_rows(self, kind: str, rows: Tensor, cells: Tensor, shared: Shared) -> None:
        """Adds rows of activations or adjoints."""
        if kind in self.absent:
            return
        have = getattr(self, kind)
        if have is not None and (not isinstance(have, KindRows) or have.width != rows.shape[1]):
            self.drop(kind, "its uses have different widths")
            return
        setattr(self, kind, shared.plus(have, rows, cells))

    def takes(self, kind: str, source: Source) -> bool:
        """Whether the rows of a source can be folded as they are formed; else they are to be added by `add_rows`."""
        have = getattr(self, kind)
        start = KindRows(source.width) if have is None else have
        return kind not in self.absent and isinstance(start, KindRows) and start.takes(source)

    def add_source(self, kind: str, source: Source, cells: Tensor, shared: Shared) -> None:
        """Adds the rows of a source that it `takes`."""
        setattr(self, kind, shared.plus_source(getattr(self, kind), source, cells))

    def add_lookups(self, factors: LookupFactors, cells: Tensor) -> None:
        if "activation" in self.absent:
            return
        if self.activation is None:
            self.activation = LookupRows(factors.height)
        if not isinstance(self.activation, LookupRows):
            self.drop("activation", "its uses have different widths")
            return
        self.activation.add(factors.indices, cells, factors.padding)

    def drop(self, kind: str, why: str) -> None:
        """This parameter does not have `kind`."""
        setattr(self, kind, None)
        self.absent.setdefault(kind, why)

    def add_power(self, norms: Norms, cells: Tensor) -> None:
        """Adds the squared norms behind the rounding bound eps |A_g| |D_g|."""
        if not len(cells):
            return
        both = norms.activation, norms.adjoint
        squares = [n.square() if n.dim() == 1 else torch.linalg.vecdot(n, n) for n in both]
        if is_here(norms.adjoint):
            sums = np.stack([np.bincount(cells.numpy(), n.numpy()) for n in squares], 1)
            self._add_power(range(len(sums)), sums.tolist())
        else:  # there counting with weights is refused where algorithms have to be deterministic
            present = torch.unique(cells).tolist()
            masks = [sent(cells == c, norms.adjoint.device) for c in present]
            sums_of = torch.stack([torch.stack([n.where(mask, 0).sum() for n in squares]) for mask in masks])
            self._unread.append((present, sums_of))

    def _add_power(self, cells: Sequence[int], sums: Sequence[Sequence[float]]) -> None:
        for cell, (a, d) in zip(cells, sums, strict=True):
            before = self._power.get(cell, (0.0, 0.0))
            self._power[cell] = (before[0] + a, before[1] + d)

    @property
    def power(self) -> Mapping[int, tuple[float, float]]:
        """Per cell |A|_F^2 and |D|_F^2. Waits for the device."""
        for cells, sums in self._unread:
            self._add_power(cells, sums.tolist())
        self._unread = []
        return self._power

    @property
    def scale(self) -> float:
        """The sum over rows of |a| |d|; NaN where no factors are known. Waits for the device."""
        self._scale = float(self._scale)
        return self._scale

    def add_scale(self, scale: float | Tensor) -> None:
        """Adds to the scale; NaN for rows without factors."""
        self._scale = self._scale + scale

    @property
    def unreduced(self) -> list[GradientSum | KindRows]:
        """What is to be reduced before anything of it is decomposed."""
        kinds = [rows for rows in (self.activation, self.adjoint) if isinstance(rows, KindRows)]
        return [self.gradient, *kinds]

    def part(self) -> None:
        """Copies the rows that wait: they are those of the model, and training may write over them."""
        gradient = self.gradient
        gradient.parts = [(left.clone(), right.clone(), cells) for left, right, cells in gradient.parts]
        for rows in (self.activation, self.adjoint):
            if isinstance(rows, KindRows):
                rows.part()

    def problem(self, cells: Sequence[int]) -> Problem | None:
        """The singular values of the gradient summed over `cells`; None if nothing was gathered of them."""
        if self.gradient.small is not None:
            return self.gradient.small.problem(cells)
        present = [self.gradient.dense[c].reshape(self.gradient.sides) for c in cells if c in self.gradient.dense]
        if not present:
            return None
        return summed_problem(present) if all(is_exact(one.dtype) for one in present) else rounded_problem(present)


@functools.lru_cache(maxsize=64)
def probes_of(side: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """(side, a few) orthonormal random vectors, the same every time, that gradients are multiplied by in audits."""
    generator = torch.Generator().manual_seed(side)
    drawn = torch.randn(side, min(PROBES, side), generator=generator, dtype=torch.float64)
    return torch.linalg.qr(drawn).Q.to(device=device, dtype=dtype)


def matrix_shape(shape: Sequence[int]) -> tuple[int, int]:
    """The matrix a parameter is: `gradient.flatten(1)`; a vector is one row, a scalar 1 x 1."""
    if len(shape) == 0:
        return 1, 1
    if len(shape) == 1:
        return 1, shape[0]
    rest = 1
    for size in shape[1:]:
        rest *= size
    return shape[0], rest


def _summed_in(dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype
