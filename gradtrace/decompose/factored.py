"""Singular values of L^T R from its factors, the product never formed: for fewer rows than the product has sides.

With L^T = Q_L R_L and R^T = Q_R R_R (rows of L and R in the columns), L_g^T R_g = Q_L (R_L[:, g] R_R[:, g]^T) Q_R^T for
every subset g of rows, so a group is a subset of columns of two small matrices. In float64 throughout: Gram matrices
would lose half the digits.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from gradtrace.decompose.dense import double
from gradtrace.decompose.few import Places
from gradtrace.decompose.problem import Problem


@dataclass(frozen=True)
class SmallFactors:
    """R_L (min(m, p), m) and R_R (min(m, q), m) of m rows; `cells` (m,) says whose row each column is."""

    left: Tensor
    right: Tensor
    cells: Tensor

    @cached_property
    def _places(self) -> Places:
        return Places(self.cells)

    @classmethod
    def of(cls, left: Tensor, right: Tensor, cells: Tensor) -> SmallFactors:
        """Decomposes L (m, p) and R (m, q) once, for every group of rows."""
        return cls(_small(left), _small(right), cells)

    def problem(self, cells: Iterable[int]) -> Problem | None:
        """The singular values of L_g^T R_g for the rows of `cells`, the rest being zero; None if they have no rows."""
        columns = self._places.of(cells)
        count = self.left.shape[1] if columns is None else len(columns)

        def build() -> Tensor:
            left, right = self.left, self.right
            if columns is not None:
                left, right = (side.index_select(1, columns) for side in (left, right))
            return _core(left) @ _core(right).transpose(0, 1)

        sides = min(len(self.left), count), min(len(self.right), count)
        return Problem("matrix", sides, self.left.dtype, self.left.device, build) if count else None

    def products(self, n_cells: int) -> Tensor:
        """(cells, cells): real inner products of the cells' matrices, <G_c, G_d> = sum_ij (l_i . l_j)(r_i . r_j)."""
        both = (self.left.mH @ self.left) * (self.right.mH @ self.right)
        member = torch.nn.functional.one_hot(self.cells, n_cells).to(both.dtype)
        return (member.T @ both @ member).real


def _small(rows: Tensor) -> Tensor:
    return torch.linalg.qr(double(rows).transpose(0, 1), mode="r").R


def _core(columns: Tensor) -> Tensor:
    """At most as many rows as columns, same product with its partner up to orthogonal factors on the outside."""
    if columns.shape[0] <= columns.shape[1]:
        return columns
    return torch.linalg.qr(columns, mode="r").R
