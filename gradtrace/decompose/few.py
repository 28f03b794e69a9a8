"""Fewer rows than columns: decomposed once, for every subset of the rows."""

from __future__ import annotations

import torch
from torch import Tensor

from gradtrace.decompose.dense import is_exact, roots, singular_values
from gradtrace.decompose.gram import Gram


class Few:
    """Rows that are fewer than their columns, decomposed once for every subset of them."""

    def __init__(self, rows: Tensor) -> None:
        """rows: (m, width)."""
        self._gram = None if is_exact(rows.dtype) else Gram.of(rows.T).full()
        self._rows = rows if self._gram is None else None
        if self._rows is not None and bool(torch.isfinite(rows).all()):  # a row that is not finite would spoil all
            self._rows = torch.linalg.qr(rows.T, mode="r").R.T  # the same inner products

    def is_finite(self, index: Tensor) -> bool:
        """Whether the rows at `index` are."""
        return bool(torch.isfinite(self._some(index)).all())

    def spectrum(self, index: Tensor) -> Tensor:
        """Singular values of the rows at `index`, descending."""
        some = self._some(index)
        return singular_values(some) if self._gram is None else roots(some)

    def _some(self, index: Tensor) -> Tensor:
        if self._rows is not None:
            return self._rows[index]
        assert self._gram is not None
        return self._gram[index][:, index]
