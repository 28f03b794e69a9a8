"""A matrix whose singular values are wanted, not yet formed: what is to be decomposed can be counted, put in order and
shared out before any of it is."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gradtrace.decompose.dense import roots, singular_values


@dataclass(frozen=True, eq=False)
class Problem:
    """The singular values of one matrix.

    form: "gram", where `build` gives the lower half of its Gram matrix, or "matrix", where it gives itself. sides: what
    `build` gives has. build: may be called on any thread, and again. most: no more singular values than these differ
    from zero.
    """

    form: str
    sides: tuple[int, int]
    dtype: torch.dtype
    device: torch.device
    build: Callable[[], Tensor]
    most: int | None = None

    @property
    def bucket(self) -> Hashable:
        """Problems with the same are decomposed together."""
        return self.form, self.sides, self.dtype, self.device

    @property
    def flops(self) -> float:
        """About what the decomposition takes, without forming the matrix."""
        return flops_of(self.form, self.sides)

    @property
    def bytes(self) -> int:
        return self.sides[0] * self.sides[1] * self.dtype.itemsize


def flops_of(form: str, sides: tuple[int, int]) -> float:
    """About what a decomposition takes: "gram", "matrix" or "qr" (without Q)."""
    small, large = sorted(sides)
    if small == 1:
        return 2.0 * large  # a norm
    if form == "gram":
        return 4 / 3 * small**3
    if form == "qr":
        return 2 * small**2 * large - 2 / 3 * small**3
    return 4 * small**2 * large - 4 / 3 * small**3


def summed_problem(parts: Sequence[Tensor]) -> Problem:
    """The singular values of a sum of matrices (p, q) of double precision."""
    first = parts[0]
    return Problem("matrix", (len(first), first.shape[1]), first.dtype, first.device, lambda: sum(parts[1:], first))


def solved(problems: list[Problem]) -> list[Tensor]:
    """The singular values of problems of one bucket, each descending, in float64; NotConvergedError if one fails."""
    matrices = torch.stack([one.build() for one in problems]) if len(problems) > 1 else problems[0].build()[None]
    found = roots(matrices) if problems[0].form == "gram" else singular_values(matrices)
    return [sigma[: one.most] for sigma, one in zip(found, problems, strict=True)]
