"""Singular values by the Gram matrix, in double precision, of what was computed in single precision or less.

A Gram matrix in double precision errs by about 1e-8 |A|_F at most (by far less where singular values are not tiny), and
single precision itself by 6e-8 |A|_F. So nothing is lost, for half the work of a QR factorisation or less.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from gradtrace.decompose.dense import double, roots

COLUMNS = 256  # that are computed at once: the upper half is left out in so many steps
MOST_WIDENED = 2**18  # numbers that are converted to double precision at once


class Gram:
    """The lower half of AᴴA, some columns at a time: block b holds the rows from its first column on."""

    def __init__(self, blocks: Sequence[Tensor]) -> None:
        self.blocks = tuple(blocks)

    @classmethod
    def of(cls, rows: Tensor) -> Gram:
        """Of the rows (m, width)."""
        return cls.none(rows.shape[1], rows).plus(rows)

    @classmethod
    def none(cls, width: int, like: Tensor) -> Gram:
        kind = torch.complex128 if like.is_complex() else torch.float64
        starts = range(0, width, COLUMNS)
        return cls([like.new_zeros(width - j, min(COLUMNS, width - j), dtype=kind) for j in starts])

    def plus(self, rows: Tensor) -> Gram:
        blocks, width = list(self.blocks), rows.shape[1]
        for place, some in enumerate(rows.split(max(COLUMNS, MOST_WIDENED // max(width, 1)))):
            wide = double(some)
            for b, block in enumerate(blocks):
                left, right = wide[:, b * COLUMNS :].mH, wide[:, b * COLUMNS : (b + 1) * COLUMNS]
                blocks[b] = block.addmm_(left, right) if place else torch.addmm(block, left, right)
        return Gram(blocks)

    def is_finite(self) -> bool:
        return all(bool(torch.isfinite(block).all()) for block in self.blocks)

    def full(self) -> Tensor:
        """(width, width), of which only the lower half is right."""
        if len(self.blocks) == 1:
            return self.blocks[0]
        width = self.blocks[0].shape[0]
        matrix = self.blocks[0].new_zeros(width, width)
        for b, block in enumerate(self.blocks):
            matrix[b * COLUMNS :, b * COLUMNS : b * COLUMNS + block.shape[1]] = block
        return matrix

    @classmethod
    def spectrum(cls, stacked: Sequence[Gram]) -> Tensor:
        blocks = [sum(same[1:], same[0]) for same in zip(*(one.blocks for one in stacked), strict=True)]
        return roots(Gram(blocks).full())


def rounded_singular_values(matrix: Tensor) -> Tensor:
    """The same for a matrix whose entries have the errors of single precision, within 1e-8 |matrix|_F."""
    tall = matrix if matrix.shape[0] >= matrix.shape[1] else matrix.T
    if tall.shape[1] == 1:
        return torch.linalg.vector_norm(double(tall))[None]
    return roots(Gram.of(tall).full())
