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

from gradtrace.decompose.dense import all_finite, double
from gradtrace.decompose.few import Places
from gradtrace.decompose.lapack import squared
from gradtrace.decompose.problem import Problem
from gradtrace.hosted import picked, sent


@dataclass(frozen=True)
class SmallFactors:
    """R_L^T (m, min(m, p)) and R_R^T (m, min(m, q)) of m rows; `cells` (m,), on the host, says whose each row is."""

    left: Tensor
    right: Tensor
    cells: Tensor

    @cached_property
    def _places(self) -> Places:
        return Places(self.cells)

    @classmethod
    def of(cls, left: Tensor, right: Tensor, cells: Tensor) -> SmallFactors:
        """Decomposes L (m, p) and R (m, q) once, for every group of rows."""
        return cls(_triangle(double(left)).T, _triangle(double(right)).T, cells)

    @property
    def is_finite(self) -> bool:
        """Whether all of L and R is."""
        return all_finite(self.left) and all_finite(self.right)

    def problem(self, cells: Iterable[int]) -> Problem | None:
        """The singular values of L_g^T R_g for the rows of `cells`, the rest being zero; None if they have no rows."""
        index = self._places.of(cells)
        count = len(self.left) if index is None else len(index)

        def build() -> Tensor:
            left, right = self.left, self.right
            if index is not None:
                left, right = picked(left, index), picked(right, index)
            return _core(left) @ _core(right).T

        sides = min(self.left.shape[1], count), min(self.right.shape[1], count)
        return Problem("matrix", sides, self.left.dtype, self.left.device, build) if count else None

    def products(self, n_cells: int) -> Tensor:
        """(cells, cells): real inner products of the cells' matrices, <G_c, G_d> = sum_ij (l_i . l_j)(r_i . r_j)."""
        both = squared(self.left.T) * squared(self.right.T)
        member = sent(torch.eye(n_cells, dtype=both.dtype)[self.cells], both.device)
        return (member.T @ both @ member).real


def _triangle(rows: Tensor) -> Tensor:
    """R of the matrix that has these as columns."""
    return torch.linalg.qr(rows.T, mode="r").R


def _core(rows: Tensor) -> Tensor:
    """These as columns, cut to as many rows: same product with its partner up to orthogonal factors on the outside."""
    return rows.T if rows.shape[1] <= len(rows) else _triangle(rows)
