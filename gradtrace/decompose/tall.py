"""Matrices with more rows than columns, of which the rows come some at a time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, Self

from torch import Tensor

from gradtrace.decompose.problem import Problem


class Tall(Protocol):
    """What is kept of a matrix that has more rows than columns: enough for its singular values, and for more rows.

    A value: `plus` makes another one.
    """

    @classmethod
    def none(cls, width: int, like: Tensor) -> Self:
        """No rows yet."""
        ...

    def plus(self, rows: Tensor) -> Self:
        """With more rows (m, width)."""
        ...

    @property
    def finite(self) -> bool:
        """Whether every row is."""
        ...

    @classmethod
    def problem(cls, stacked: Sequence[Self], *, most: int | None = None) -> Problem:
        """The singular values of the matrices below one another, at most `most` of which differ from zero."""
        ...
