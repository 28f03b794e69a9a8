"""Fewer rows than columns: decomposed once, for every subset of the rows."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cached_property

import torch
from torch import Tensor

from gradtrace.decompose.dense import all_finite, double, double_of, is_exact
from gradtrace.decompose.gram import MOST_WIDENED, Gram
from gradtrace.decompose.lapack import squared
from gradtrace.decompose.problem import Problem
from gradtrace.hosted import picked, places_of, sent


class Few:
    """Rows that are fewer than their columns: in single precision their Gram matrix, else what QR leaves of them.

    Subsets are told by the places of their rows, ascending; None stands for all rows.
    """

    def __init__(self, rows: Tensor) -> None:
        """rows: (m, width)."""
        self._squared = not is_exact(rows.dtype)
        if self._squared:
            self._kept = squared(double(rows.T)) if rows.numel() < MOST_WIDENED else Gram.of(rows.T).full()
            self._finite = all_finite(self._kept)
        else:  # the same inner products; a row that is not finite would spoil all
            self._finite = all_finite(rows)
            self._kept = torch.linalg.qr(rows.T, mode="r").R.T if self._finite else rows

    def is_finite(self, index: Tensor | None) -> bool:
        """Whether the rows at `index` are."""
        if self._finite:
            return True
        return all_finite(self._some(index).tril() if self._squared else self._some(index))

    def problem(self, index: Tensor | None) -> Problem:
        """The singular values of the rows at `index`."""
        count = len(self._kept) if index is None else len(index)
        form, side = ("gram", count) if self._squared else ("matrix", self._kept.shape[1])
        dtype, device = double_of(self._kept.dtype), self._kept.device
        return Problem(form, (count, side), dtype, device, lambda: self._some(index))

    def _some(self, index: Tensor | None) -> Tensor:
        if index is None:
            return self._kept
        rows = picked(self._kept, index)
        return rows.index_select(1, sent(index, rows.device)) if self._squared else rows


class Places:
    """Where the rows of every cell stand; `of_row` (m,) is the cell of each row, on the host."""

    def __init__(self, of_row: Tensor) -> None:
        self._of_row = of_row
        self._found: dict[frozenset[int], Tensor] = {}

    @cached_property
    def _cells(self) -> frozenset[int]:
        return frozenset(self._of_row.tolist())

    def of(self, cells: Iterable[int]) -> Tensor | None:
        """The places of the rows of `cells`, ascending; None where these are all rows."""
        wanted = self._cells.intersection(cells)
        if len(wanted) == len(self._cells):
            return None
        if wanted not in self._found:
            self._found[wanted] = self._of_some(wanted)
        return self._found[wanted]

    def _of_some(self, wanted: frozenset[int]) -> Tensor:
        first, *others = wanted or (-1,)
        here = self._of_row == first
        for cell in others:
            here = here | (self._of_row == cell)
        return places_of(here)
