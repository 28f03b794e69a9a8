"""Singular values by QR, of what was computed in double precision: nothing is squared."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import torch
from torch import Tensor

from gradtrace.decompose.dense import all_finite, double
from gradtrace.decompose.problem import Problem


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

    @cached_property
    def finite(self) -> bool:
        return all_finite(self.packed)

    def matrix(self) -> Tensor:
        """(width, width), upper triangular."""
        matrix = self.packed.new_zeros(self.width, self.width)
        for row, part in zip(matrix, self.packed.split(list(range(self.width, 0, -1))), strict=True):
            row[self.width - len(part) :] = part
        return matrix

    @classmethod
    def problem(cls, stacked: Sequence[Triangle], *, most: int | None = None) -> Problem:
        packed, sides = stacked[0].packed, (len(stacked) * stacked[0].width, stacked[0].width)
        build = lambda: torch.cat([one.matrix() for one in stacked])  # noqa: E731
        return Problem("matrix", sides, packed.dtype, packed.device, build, most)
