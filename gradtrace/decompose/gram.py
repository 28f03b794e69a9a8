"""Singular values by the Gram matrix, in double precision, of what was computed in single precision or less.

A Gram matrix in double precision errs by about 1e-8 |A|_F at most (by far less where singular values are not tiny), and
single precision itself by 6e-8 |A|_F. So nothing is lost, for half the work of a QR factorisation or less.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import torch
from torch import Tensor

from gradtrace.decompose.dense import all_finite, double, double_of
from gradtrace.decompose.lapack import squared
from gradtrace.decompose.problem import Problem

COLUMNS = 256  # of a block: the upper half is left out in so many steps
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
        for place, some in enumerate(rows.split(max(4 * COLUMNS, MOST_WIDENED // max(width, 1)))):
            for b, part in enumerate(_lower(squared(double(some)))):
                blocks[b] = blocks[b].add_(part) if place else blocks[b] + part
        return Gram(blocks)

    @classmethod
    def of_square(cls, whole: Tensor) -> Gram:
        """Of a Gram matrix (width, width)."""
        return cls([part.clone() for part in _lower(whole)])

    def plus_square(self, whole: Tensor) -> Gram:
        """With rows whose Gram matrix is `whole`."""
        return Gram([block + part for block, part in zip(self.blocks, _lower(whole), strict=True)])

    @cached_property
    def finite(self) -> bool:
        return all(all_finite(block.diagonal()) for block in self.blocks)  # where every entry of a row is squared

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
    def problem(cls, stacked: Sequence[Gram], *, most: int | None = None) -> Problem:
        def build() -> Tensor:
            blocks = [sum(same[1:], same[0]) for same in zip(*(one.blocks for one in stacked), strict=True)]
            return Gram(blocks).full()

        first = stacked[0].blocks[0]
        return Problem("gram", (len(first), len(first)), first.dtype, first.device, build, most)


def _lower(whole: Tensor) -> list[Tensor]:
    """The lower half of a square matrix, in blocks of columns; views of it."""
    return [whole[start:, start : start + COLUMNS] for start in range(0, len(whole), COLUMNS)]


def rounded_problem(parts: Sequence[Tensor]) -> Problem:
    """The singular values of a sum of matrices (p, q) with the errors of single precision, within 1e-8 of its norm."""
    rows, columns = parts[0].shape
    side, dtype, device = min(rows, columns), double_of(parts[0].dtype), parts[0].device

    def total() -> Tensor:
        return sum(map(double, parts[1:]), double(parts[0])) if len(parts) > 1 else parts[0]

    def gram() -> Tensor:
        return squared(double(total() if rows >= columns else total().T))

    if side == 1:
        return Problem("matrix", (rows, columns), dtype, device, lambda: double(total()))
    return Problem("gram", (side, side), dtype, device, gram)
