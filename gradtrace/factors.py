"""What an adapter says of one call: the activation A, the adjoint D, and whose row is whose.

For an op that multiplies its input by a weight, G = A^T D with one row per sample and position (complex: conj(A)^T D).
All shapes below are of one call; `owners` holds one sample index per row, -1 where no sample owns the row. Owners lie
on the host, and what is given per sample does too, wherever A and D are: nobody waits for a device to know whose row
is whose.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import pairwise
from math import prod

import torch
from torch import Tensor

from gradtrace.hosted import number, picked, places_of, sent
from gradtrace.sources import ChannelSource, MatrixSource, Source

MOST_NUMBERS = 2**18  # of a copy of rows that is made at once
AT_ONCE = 2**20  # terms whose sizes are summed at once


@dataclass(frozen=True)
class Rows:
    """A and D as matrices, for the spectra of the kinds. `activation` is None where the op has none."""

    activation: Tensor | None  # (rows, in)
    adjoint: Tensor  # (rows, out)
    owners: Tensor  # (rows,)


@dataclass(frozen=True)
class Norms:
    """The norms of every row of A and of D, in float64: what rounding errors of the gradient are measured against.

    Where a unit, a sample say, has several rows, they stand in one line: (units, rows of each), in any order.
    """

    activation: Tensor  # (units,) or (units, rows of each)
    adjoint: Tensor  # likewise
    owners: Tensor  # (units,)


class Factors(ABC):
    """The gradient of one call with respect to its weight, as a sum over owned rows.

    What is not finite stays with its sample: `restrict` and `by_cell` drop rows or set them to zero, and never multiply
    them by it.
    """

    owners: Tensor
    adjoint: Tensor

    @abstractmethod
    def densify(self) -> Tensor:
        """The gradient of all rows, in the weight's shape."""

    @abstractmethod
    def restrict(self, keep: Tensor) -> Factors:
        """Only the rows where `keep`, a boolean per sample plus a last one for ownerless rows, holds."""

    @abstractmethod
    def weighted(self, weights: Tensor) -> Factors:
        """Every row's adjoint times its sample's weight; `weights` is (samples + 1,), the last for ownerless rows."""

    def scale(self) -> float | Tensor:
        """The sum over rows of |a| |d|: what rounding errors of the gradient are measured against.

        A number, or a tensor that holds it where that would have to be waited for.
        """
        norms = self.norms()
        assert norms is not None, "factors without an activation have a scale of their own"
        return number((norms.activation * norms.adjoint).sum())

    def rows(self) -> Rows | None:
        """A and D as matrices, or None when the op has no rows."""
        return None

    def blocks(self) -> Iterator[Rows]:
        """The rows, some at a time where all of them would be larger than what the factors hold."""
        rows = self.rows()
        if rows is not None:
            yield rows

    def source(self, kind: str) -> Source | None:
        """How the rows of "activation" or "adjoint" are made, where they need not be made at once; else `blocks` has
        them."""
        return None

    def norms(self) -> Norms | None:
        """The norms of the rows, or None where there is no activation."""
        rows = self.rows()
        if rows is None or rows.activation is None:
            return None
        return Norms(row_norms(rows.activation), row_norms(rows.adjoint), rows.owners)

    def times(self, probes: Tensor) -> Tensor | None:
        """The gradient as a matrix, `flatten(1)`, times probes (columns, k); None where it must be formed for that."""
        return None

    def by_cell(self, cells: Tensor) -> dict[int, Tensor]:
        """The gradient of every cell that owns a row; `cells` is (samples + 1,), the last for ownerless rows.

        Cells below zero are not asked for: they may be left out.
        """
        present = [cell for cell in torch.unique(cells[self.owners]).tolist() if cell >= 0]
        return {cell: self.restrict(cells == cell).densify() for cell in present}


def trusted_scale(factors: Factors, norms: Norms | None) -> float | Tensor:
    """What the factors say is their scale, or what their rows say where that is less.

    Residuals are divided by it: an adapter whose scale is too large would pass every audit.
    """
    if norms is None:
        return factors.scale()
    bound = number((norms.activation * norms.adjoint).sum())
    if type(factors).scale is Factors.scale:  # that is the bound, once more
        return bound
    own = factors.scale()
    fits = own <= bound * (1 + 1e-6)
    return torch.where(fits, own, bound) if isinstance(fits, Tensor) else own if fits else bound


@dataclass(frozen=True)
class OuterFactors(Factors):
    """G = A^T D, reshaped: the weight's axes are `inputs + outputs`, permuted by `order`.

    activation: (rows, in), adjoint: (rows, out). `shape`: sizes of the in-axes and then of the out-axes;
    `order`: the permutation that takes them to the weight's own axes. A matrix stored (out, in) has order (1, 0).
    """

    activation: Tensor
    adjoint: Tensor
    owners: Tensor
    shape: tuple[int, ...]
    order: tuple[int, ...]

    def densify(self) -> Tensor:
        return (self.activation.mH @ self.adjoint).reshape(self.shape).permute(self.order)

    def restrict(self, keep: Tensor) -> OuterFactors:
        index = places_of(keep[self.owners])
        if len(index) == len(self.owners):
            return self
        activation, adjoint = picked(self.activation, index), picked(self.adjoint, index)
        return replace(self, activation=activation, adjoint=adjoint, owners=picked(self.owners, index))

    def weighted(self, weights: Tensor) -> OuterFactors:
        return replace(self, adjoint=self.adjoint * _shares(self, weights)[:, None])

    def rows(self) -> Rows:
        return Rows(self.activation, self.adjoint, self.owners)

    def source(self, kind: str) -> Source:
        return MatrixSource(self.activation if kind == "activation" else self.adjoint, self.owners)

    def as_matrix(self) -> tuple[Tensor, Tensor] | None:
        """L and R with `densify().flatten(1)` = L^T R, or None where the weight's axes mix inputs and outputs."""
        last = len(self.shape) - 1
        if last < 1:
            return None
        if self.order == tuple(range(last + 1)) and self.shape[0] == self.activation.shape[1]:
            return self.activation.conj(), self.adjoint
        if self.order == (last, *range(last)) and self.shape[-1] == self.adjoint.shape[1]:
            return self.adjoint, self.activation.conj()
        return None


@dataclass(frozen=True)
class BatchedFactors(Factors):
    """Independent products side by side, as in `bmm` with a three-dimensional weight: G[b] = A[b]^T D[b].

    activation: (batch, rows, in), adjoint: (batch, rows, out), owners: (batch, rows). `shape` and `order` as for
    `OuterFactors`, with the batch axes first.
    """

    activation: Tensor
    adjoint: Tensor
    owners: Tensor
    shape: tuple[int, ...]
    order: tuple[int, ...]

    def densify(self) -> Tensor:
        return (self.activation.mH @ self.adjoint).reshape(self.shape).permute(self.order)

    def restrict(self, keep: Tensor) -> BatchedFactors:
        mask = sent(keep[self.owners], self.adjoint.device)[..., None]
        return replace(self, activation=_masked(self.activation, mask), adjoint=_masked(self.adjoint, mask))

    def weighted(self, weights: Tensor) -> BatchedFactors:
        return replace(self, adjoint=self.adjoint * _shares(self, weights)[..., None])

    def rows(self) -> Rows:
        return Rows(self.activation.flatten(0, 1), self.adjoint.flatten(0, 1), self.owners.flatten())


@dataclass(frozen=True)
class LookupFactors(Factors):
    """A table of `height` rows, looked up: A is one-hot and never formed.

    indices: (rows,), adjoint: (rows, width), owners: (rows,). `shape`: the table's, where it is no matrix. `padding`:
    an index whose entry stays as it is; the adjoint is zero wherever it is looked up, and A there too.
    """

    indices: Tensor
    adjoint: Tensor
    owners: Tensor
    height: int
    shape: tuple[int, ...] | None = None
    padding: int | None = None

    def densify(self) -> Tensor:
        table = self.adjoint.new_zeros(self.height, self.adjoint.shape[1])
        table.index_add_(0, self.indices, self.adjoint)
        return table if self.shape is None else table.reshape(self.shape)

    def restrict(self, keep: Tensor) -> LookupFactors:
        index = places_of(keep[self.owners])
        indices, adjoint = picked(self.indices, index), picked(self.adjoint, index)
        return replace(self, indices=indices, adjoint=adjoint, owners=picked(self.owners, index))

    def weighted(self, weights: Tensor) -> LookupFactors:
        return replace(self, adjoint=self.adjoint * _shares(self, weights)[:, None])

    def scale(self) -> float | Tensor:
        return number(row_norms(self.adjoint).sum())  # rows of A have norm one

    def rows(self) -> Rows:
        return Rows(None, self.adjoint, self.owners)


@dataclass(frozen=True)
class ElementFactors(Factors):
    """A weight applied element by element: G = the sum of a * d over the axes along which the weight is broadcast.

    adjoint: the output's shape; activation: broadcastable to it, or None for a shift; owners: broadcastable to it;
    shape: the weight's, each axis of the output's size or of size one.
    """

    activation: Tensor | None
    adjoint: Tensor
    owners: Tensor
    shape: tuple[int, ...]

    def densify(self) -> Tensor:
        return self._terms().sum_to_size(self.shape)

    def restrict(self, keep: Tensor) -> ElementFactors:
        mask = sent(keep[self.owners], self.adjoint.device)
        activation = None if self.activation is None else _masked(self.activation, mask)
        return replace(self, activation=activation, adjoint=_masked(self.adjoint, mask))

    def weighted(self, weights: Tensor) -> ElementFactors:
        return replace(self, adjoint=self.adjoint * _shares(self, weights))

    def scale(self) -> float | Tensor:
        terms = self._terms()  # their norm of order one takes four times as long
        length = len(terms) if terms.dim() else 1
        parts = terms.split(max(AT_ONCE * length // max(terms.numel(), 1), 1)) if length > 1 else (terms,)
        wide = torch.promote_types(terms.real.dtype if terms.is_complex() else terms.dtype, torch.float32)
        sums = torch.stack([part.abs().sum(dtype=wide) for part in parts])
        return number(sums.double().sum())

    def by_cell(self, cells: Tensor) -> dict[int, Tensor]:
        """Summed first over every axis along which neither the weight nor the owner varies: one pass over the data."""
        terms = self._terms()
        owners = self.owners.reshape((1,) * (terms.dim() - self.owners.dim()) + tuple(self.owners.shape))
        kept = self._kept
        free = [i for i in range(terms.dim()) if kept[i] == 1 and owners.shape[i] == 1 and terms.shape[i] != 1]
        terms = terms.sum(free, keepdim=True) if free else terms
        of_row = cells[owners]
        present = torch.unique(of_row).tolist()
        masks = {cell: sent(of_row == cell, terms.device) for cell in present}
        return {cell: _masked(terms, mask).sum_to_size(self.shape) for cell, mask in masks.items()}

    def rows(self) -> Rows | None:
        """Rows are the axes the weight is broadcast along, columns the weight's own; None if an owner cuts a row."""
        rank = self.adjoint.dim()
        kept = self._kept
        owners = self.owners.reshape((1,) * (rank - self.owners.dim()) + tuple(self.owners.shape))
        columns = [i for i in range(rank) if kept[i] != 1]
        if any(owners.shape[i] != 1 for i in columns):
            return None
        along = [i for i in range(rank) if kept[i] == 1]
        order = along + columns
        sizes = [self.adjoint.shape[i] for i in along]
        matrix = (prod(sizes), prod(self.adjoint.shape[i] for i in columns))
        of_row = owners.permute(order).expand([*sizes, *(1 for _ in columns)]).reshape(matrix[0])
        activation = None
        if self.activation is not None:
            activation = self.activation.expand_as(self.adjoint).permute(order).reshape(matrix)
        return Rows(activation, self.adjoint.permute(order).reshape(matrix), of_row)

    def norms(self) -> Norms | None:
        """Without putting the rows in order, where there is an activation."""
        if self.activation is None:
            return None
        axis = self._channel_axis
        if axis is None:
            return super().norms()
        activation = norms_along(self.activation.expand_as(self.adjoint), axis)
        return Norms(activation.flatten(1), norms_along(self.adjoint, axis).flatten(1), self.owners.flatten())

    def source(self, kind: str) -> Source | None:
        values = self.activation if kind == "activation" else self.adjoint
        if values is None or values.shape != self.adjoint.shape:
            return None
        if self._in_order(values):
            rows = self.rows()
            matrix = None if rows is None else rows.activation if kind == "activation" else rows.adjoint
            return None if rows is None or matrix is None else MatrixSource(matrix, rows.owners)
        if self._channel_axis is None:
            return None
        return ChannelSource(values.movedim(self._channel_axis, 1), self.owners.flatten())

    @property
    def _kept(self) -> tuple[int, ...]:
        """The weight's shape, with ones before it."""
        return (1,) * (self.adjoint.dim() - len(self.shape)) + self.shape

    @property
    def _channel_axis(self) -> int | None:
        """The axis along which the weight has one number each, where every sample has a stretch along another, the
        first; its second axis or its last. None elsewhere."""
        sizes, kept = self.adjoint.shape, self._kept
        if len(sizes) < 3 or tuple(self.owners.shape) != (sizes[0], *(1 for _ in sizes[1:])):
            return None
        whole = (axis for axis in (1, len(sizes) - 1) if kept[axis] == sizes[axis] == prod(kept))
        return next(whole, None)

    def _in_order(self, *values: Tensor | None) -> bool:
        """Whether making rows of these moves no axis, and so copies nothing."""
        plain = [value for value in values if value is not None]
        as_it_is = all(value.shape == self.adjoint.shape and value.is_contiguous() for value in plain)
        return as_it_is and all(before == 1 or after != 1 for before, after in pairwise(self._kept))

    def blocks(self) -> Iterator[Rows]:
        """The same rows, one stretch along the first axis after the other where they would be a large copy."""
        length, owners, kept = (self.adjoint.shape or (1,))[0], self.owners, self._kept
        count = min(-(-self.adjoint.numel() // MOST_NUMBERS), length)
        if count < 2 or kept[0] != 1 or self._in_order(self.activation, self.adjoint):
            yield from super().blocks()
            return
        for start in range(0, length, -(-length // count)):
            some = slice(start, start - (-length // count))
            activation = None if self.activation is None else _cut(self.activation, some, self.adjoint.dim())
            here = _cut(owners, some, self.adjoint.dim())
            rows = replace(self, activation=activation, adjoint=self.adjoint[some], owners=here).rows()
            if rows is not None:
                yield rows

    def _terms(self) -> Tensor:
        return self.adjoint if self.activation is None else self.activation.conj() * self.adjoint


def _cut(tensor: Tensor, some: slice, rank: int) -> Tensor:
    """A stretch along the first of `rank` axes; a tensor that is broadcast along it is left whole."""
    return tensor if tensor.dim() < rank or tensor.shape[0] == 1 else tensor[some]


def row_norms(rows: Tensor) -> Tensor:
    """(rows,) the Euclidean norm of every row, in float64."""
    return torch.linalg.vector_norm(rows, dim=-1).double()


def norms_along(values: Tensor, axis: int) -> Tensor:
    """The norms along an axis that is not the last, in float64: as sums of squares, which take a tenth of the time."""
    return squares_along(values, axis).sqrt().double()


def squares_along(values: Tensor, axis: int) -> Tensor:
    """The sums of squared sizes along an axis, in float32 or better."""
    sizes = values.abs() if values.is_complex() else values
    return sizes.to(torch.promote_types(sizes.dtype, torch.float32)).square().sum(axis)


def _shares(factors: Factors, weights: Tensor) -> Tensor:
    """Every row's weight, that of its sample."""
    return sent(weights[factors.owners], factors.adjoint.device).to(factors.adjoint.real.dtype)


def _masked(tensor: Tensor, mask: Tensor) -> Tensor:
    """Zero where `mask`, which broadcasts, does not hold; NaN times zero would be NaN."""
    return torch.where(mask, tensor, 0)
