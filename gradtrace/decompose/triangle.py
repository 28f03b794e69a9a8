"""Singular values by QR, of what was computed in double precision: nothing is squared."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from gradtrace.decompose.dense import double, singular_values


class Triangle:
    """R of A = Q R, packed: row after row without its zeros."""

    def __init__(self, packed: Tensor, width: int) -> None:
        self.packed, self.width = packed, width

    @classmethod
    def none(cls, width: int, like: Tensor) -> Triangle:
        return cls(double(like.new_zeros(width * (width + 1) // 2)), width)

    def plus(self, rows: Tensor) -> Triangle:
        factor = torch.linalg.qr(torch.cat([self.matrix(), double(rows)]), mode="r").R
        # indices would take twice as much memory as they save
        return Triangle(torch.cat([row[place:] for place, row in enumerate(factor)]), self.width)

    def is_finite(self) -> bool:
        return bool(torch.isfinite(self.packed).all())

    def matrix(self) -> Tensor:
        """(width, width), upper triangular."""
        matrix = self.packed.new_zeros(self.width, self.width)
        for row, part in zip(matrix, self.packed.split(list(range(self.width, 0, -1))), strict=True):
            row[self.width - len(part) :] = part
        return matrix

    @classmethod
    def spectrum(cls, stacked: Sequence[Triangle]) -> Tensor:
        return singular_values(torch.cat([one.matrix() for one in stacked]))
