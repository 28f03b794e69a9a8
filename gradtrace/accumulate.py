"""What one parameter gathers during one recorded step: its gradient per cell, and the rows of its factors.

A *cell* is a set of samples that no grouping tells apart (a diagnosis and a sex, say); groups are unions of cells.
Rows are kept as factors while they are few, and folded into one matrix per cell when they are many.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from gradtrace.decompose.dense import narrowed, singular_values, triangle
from gradtrace.decompose.factored import SmallFactors
from gradtrace.factors import LookupFactors, Norms

MOST_PENDING = 2**18  # numbers in the rows that wait to be folded, unless their matrix is wider than tall by then


@dataclass(eq=False)
class KindRows:
    """The rows of one kind (activation or adjoint), per cell; folded into triangles before they are many.

    Never added to in place: parameters whose uses have the same rows (a layer's weight and its bias) share one, and
    what is computed of it.
    """

    width: int
    parts: tuple[tuple[Tensor, Tensor], ...] = ()
    folded: dict[int, Tensor] = field(default_factory=dict)
    _spectra: dict[tuple[int, ...], Tensor] = field(default_factory=dict)

    def plus(self, rows: Tensor, cells: Tensor) -> KindRows:
        """These and more rows."""
        most = max(self.width, MOST_PENDING // max(self.width, 1))
        found = KindRows(self.width, self.parts, self.folded)
        for start in range(0, len(rows), most):
            some = rows[start : start + most].detach()
            if some.untyped_storage().nbytes() > 2 * some.numel() * some.element_size():
                some = some.clone()  # a part that waits must not hold the whole
            found = KindRows(self.width, (*found.parts, (some, cells[start : start + most])), found.folded)
            if sum(len(part) for part, _ in found.parts) >= most:
                found.reduce()
        return found

    def reduce(self) -> None:
        """Folds what waits: per cell a matrix with the singular values of its rows, no taller than wide."""
        if self.parts:
            self.folded, self.parts = {cell: _packed(rows) for cell, rows in self._by_cell()}, ()

    def _by_cell(self) -> Iterator[tuple[int, Tensor]]:
        """The rows of one cell after the other, in double precision."""
        parts, cells = [p for p, _ in self.parts], torch.cat([c for _, c in self.parts])
        if not self.folded and len(cells) < self.width and all(bool(torch.isfinite(p).all()) for p in parts):
            # once, for all cells and groups; one row that is not finite would spoil all
            parts = [narrowed(_double(torch.cat(parts)))]
        for cell in sorted({*torch.unique(cells).tolist(), *self.folded}):
            places = [(cells == cell)[start:stop] for start, stop in _stretches(parts)]
            own = [_double(p[here]) for p, here in zip(parts, places, strict=True) if bool(here.any())]
            yield cell, torch.cat([*([_unpacked(self.folded[cell])] if cell in self.folded else []), *own])

    def is_finite(self, cells: Sequence[int]) -> bool:
        """Whether every row of `cells` is, once they are reduced."""
        return all(bool(torch.isfinite(self.folded[c]).all()) for c in cells if c in self.folded)

    def spectrum(self, cells: Sequence[int]) -> Tensor:
        """Singular values of the rows that belong to `cells`, once they are reduced; computed once."""
        key = tuple(cells)
        if key not in self._spectra:
            rows = [_unpacked(self.folded[c]) for c in cells if c in self.folded]
            empty = torch.zeros(0, dtype=torch.float64)
            self._spectra[key] = singular_values(torch.cat(rows)) if rows else empty
        return self._spectra[key]


def _packed(rows: Tensor) -> Tensor:
    """The rows, or, where they are more than columns, the triangle of their QR: a vector without its zeros."""
    if len(rows) <= rows.shape[1]:
        return rows
    factor = triangle(rows)
    return torch.cat([row[place:] for place, row in enumerate(factor)])  # indices would take twice as much as it saves


def _unpacked(held: Tensor) -> Tensor:
    """The matrix again."""
    if held.dim() == 2:
        return held
    side = math.isqrt(2 * len(held))
    matrix = held.new_zeros(side, side)
    for row, part in zip(matrix, held.split(list(range(side, 0, -1))), strict=True):
        row[side - len(part) :] = part
    return matrix


def _stretches(parts: Sequence[Tensor]) -> Iterator[tuple[int, int]]:
    """Where each part lies when they are put one after the other."""
    start = 0
    for part in parts:
        yield start, start + len(part)
        start += len(part)


def _double(rows: Tensor) -> Tensor:
    return rows.to(torch.complex128 if rows.is_complex() else torch.float64)


@dataclass
class Shared:
    """What several weights of one call have in common: the same rows added to the same rows are computed once.

    alive: the storages that outlive the call's share in the step, so that an address stands for one tensor.
    """

    alive: frozenset[int]
    _found: dict[tuple[Any, ...], tuple[Tensor, KindRows]] = field(default_factory=dict)

    def plus(self, have: KindRows | None, rows: Tensor, cells: Tensor) -> KindRows:
        """`have` and more rows; None stands for no rows yet."""
        before = KindRows(rows.shape[1]) if have is None else have
        if rows.untyped_storage().data_ptr() not in self.alive:
            return before.plus(rows, cells)
        key = (id(have), rows.data_ptr(), tuple(rows.shape), rows.stride(), rows.dtype, rows.is_conj())
        if key not in self._found or not torch.equal(self._found[key][0], cells):
            self._found[key] = (cells, before.plus(rows, cells))
        return self._found[key][1]


@dataclass
class LookupRows:
    """One-hot rows, never formed: their singular values are the square roots of how often each index was used."""

    height: int
    counts: dict[int, Tensor] = field(default_factory=dict)

    def add(self, indices: Tensor, cells: Tensor) -> None:
        for cell in torch.unique(cells).tolist():
            count = torch.bincount(indices[cells == cell], minlength=self.height)
            self.counts[cell] = self.counts[cell] + count if cell in self.counts else count


@dataclass
class GradientSum:
    """The gradient per cell: as rows of L and R (G = L^T R) while they are few, or as one dense tensor per cell."""

    shape: tuple[int, ...]
    parts: list[tuple[Tensor, Tensor, Tensor]] = field(default_factory=list)  # L, R, cells
    dense: dict[int, Tensor] = field(default_factory=dict)
    n_rows: int = 0

    @property
    def sides(self) -> tuple[int, int]:
        return matrix_shape(self.shape)

    @property
    def is_factored(self) -> bool:
        return bool(self.parts) and not self.dense

    def add_outer(self, left: Tensor, right: Tensor, cells: Tensor) -> None:
        """Rows of L (m, p) and R (m, q) with G = L^T R in the parameter's own orientation."""
        self.parts.append((left, right, cells))
        self.n_rows += len(left)
        if self.dense or self.n_rows > min(self.sides):
            self._fold()

    def add_dense(self, gradients: dict[int, Tensor]) -> None:
        """One tensor per cell, in the parameter's shape."""
        self._fold()
        for cell, gradient in gradients.items():
            wide = gradient.to(_summed_in(gradient.dtype)).reshape(self.shape)
            self.dense[cell] = self.dense[cell] + wide if cell in self.dense else wide.clone()

    def _fold(self) -> None:
        parts, self.parts = self.parts, []
        for left, right, cells in parts:
            left, right = left.to(_summed_in(left.dtype)), right.to(_summed_in(right.dtype))
            for cell in torch.unique(cells).tolist():
                index = (cells == cell).nonzero(as_tuple=True)[0]
                gradient = (left.index_select(0, index).T @ right.index_select(0, index)).reshape(self.shape)
                self.dense[cell] = self.dense[cell] + gradient if cell in self.dense else gradient

    def times(self, probes: Tensor) -> Tensor:
        """(sum over cells of G) V for probes V (q, k): how a gradient that is never formed is audited."""
        total = sum(left.T @ (right @ probes.to(right.dtype)) for left, right, _ in self.parts)
        for gradient in self.dense.values():
            total = total + gradient.reshape(self.sides) @ probes.to(gradient.dtype)
        return total if isinstance(total, Tensor) else probes.new_zeros(self.sides[0], probes.shape[1])

    def small(self) -> SmallFactors:
        """The rows kept as factors, decomposed once."""
        left, right, cells = (torch.cat(list(parts)) for parts in zip(*self.parts, strict=True))
        return SmallFactors.of(left, right, cells)


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
    scale: float = 0.0  # sum over rows of |a| |d|
    power: dict[int, tuple[float, float]] = field(default_factory=dict)  # per cell: |A|_F^2, |D|_F^2
    eps: float = 0.0  # of the coarsest dtype met

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

    def add_lookups(self, factors: LookupFactors, cells: Tensor) -> None:
        if "activation" in self.absent:
            return
        if self.activation is None:
            self.activation = LookupRows(factors.height)
        if not isinstance(self.activation, LookupRows):
            self.drop("activation", "its uses have different widths")
            return
        self.activation.add(factors.indices, cells)

    def drop(self, kind: str, why: str) -> None:
        """This parameter does not have `kind`."""
        setattr(self, kind, None)
        self.absent.setdefault(kind, why)

    def add_power(self, norms: Norms, cells: Tensor) -> None:
        """Adds the squared norms behind the rounding bound eps |A_g| |D_g|."""
        for cell in torch.unique(cells).tolist():
            here = cells == cell
            a, d = self.power.get(cell, (0.0, 0.0))
            more = [float(n[here].square().sum()) for n in (norms.activation, norms.adjoint)]
            self.power[cell] = (a + more[0], d + more[1])

    def spectrum_of(self, cells: Sequence[int], small: SmallFactors | None) -> Tensor:
        """Singular values of the gradient summed over `cells`."""
        if small is not None:
            return small.spectrum(torch.isin(small.cells, torch.as_tensor(cells, device=small.cells.device)))
        present = _wide(self.gradient.dense, cells)
        if not present:
            return torch.zeros(0, dtype=torch.float64)
        return singular_values(sum(present[1:], present[0]).reshape(self.gradient.sides))

    def kind_spectrum(self, kind: str, cells: Sequence[int]) -> Tensor:
        """Singular values of the rows of `kind` that belong to `cells`."""
        have = getattr(self, kind)
        if isinstance(have, LookupRows):
            counts = [have.counts[c] for c in cells if c in have.counts]
            if not counts:
                return torch.zeros(0, dtype=torch.float64)
            return sum(counts[1:], counts[0]).double().sqrt().sort(descending=True).values
        return have.spectrum(cells)


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


def _wide(dense: dict[int, Tensor], cells: Sequence[int]) -> list[Tensor]:
    widen: Callable[[Tensor], Tensor] = lambda g: g.to(torch.complex128 if g.is_complex() else torch.float64)  # noqa: E731
    return [widen(dense[c]) for c in cells if c in dense]


def _summed_in(dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype
