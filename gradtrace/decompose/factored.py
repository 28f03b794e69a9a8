"""Singular values of L^T R from its factors, the product never formed: for fewer rows than the product has sides.

With L^T = Q_L R_L and R^T = Q_R R_R (rows of L and R in the columns), L_g^T R_g = Q_L (R_L[:, g] R_R[:, g]^T) Q_R^T for
every subset g of rows, so a group is a subset of columns of two small matrices. In float64 throughout: Gram matrices
would lose half the digits.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from gradtrace.decompose.dense import singular_values


@dataclass(frozen=True)
class SmallFactors:
    """R_L (min(m, p), m) and R_R (min(m, q), m) of m rows; `cells` (m,) says whose row each column is."""

    left: Tensor
    right: Tensor
    cells: Tensor

    @classmethod
    def of(cls, left: Tensor, right: Tensor, cells: Tensor) -> SmallFactors:
        """Decomposes L (m, p) and R (m, q) once, for every group of rows."""
        return cls(_small(left), _small(right), cells)

    def spectrum(self, columns: Tensor) -> Tensor:
        """Singular values of L_g^T R_g for the rows where `columns` (m,) is true; the rest of the spectrum is zero."""
        left, right = self.left[:, columns], self.right[:, columns]
        if left.shape[1] == 0:
            return left.new_zeros(0, dtype=torch.float64)
        return singular_values(_core(left) @ _core(right).transpose(0, 1))

    def products(self, n_cells: int) -> Tensor:
        """(cells, cells): real inner products of the cells' matrices, <G_c, G_d> = sum_ij (l_i . l_j)(r_i . r_j)."""
        both = (self.left.mH @ self.left) * (self.right.mH @ self.right)
        member = torch.nn.functional.one_hot(self.cells, n_cells).to(both.dtype)
        return (member.T @ both @ member).real


def _small(rows: Tensor) -> Tensor:
    wide = rows.to(torch.complex128 if rows.is_complex() else torch.float64).transpose(0, 1)
    return torch.linalg.qr(wide, mode="r").R


def _core(columns: Tensor) -> Tensor:
    """At most as many rows as columns, same product with its partner up to orthogonal factors on the outside."""
    if columns.shape[0] <= columns.shape[1]:
        return columns
    return torch.linalg.qr(columns, mode="r").R
