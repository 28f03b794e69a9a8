"""Corrections for looking at many places at once."""

from __future__ import annotations

import numpy as np
from scipy import stats

CORRECTIONS = ("bh", "by", "max", "none")
SAID = {
    "bh": "the false discovery rate was controlled by the procedure of Benjamini and Hochberg (1995)",
    "by": "the false discovery rate was controlled, under any dependence, as by Benjamini and Yekutieli (2001)",
    "max": "the family-wise error rate was controlled by the largest statistic of all (Westfall and Young 1993)",
    "none": "no correction for multiple comparisons was made",
}


def corrected(p: np.ndarray, how: str, *, statistic: np.ndarray, largest: np.ndarray | None, drawn: bool) -> np.ndarray:
    """The p-values, (features,), corrected for there being so many; NaN, where there is none, counts as no comparison.

    largest: of `max`, (permutations,) of the largest |statistic| of all. drawn: whether these are only some of all.
    """
    known = ~np.isnan(p)
    found = np.full(p.shape, np.nan)
    if how == "none" or not known.any():
        return p.copy()
    if how in ("bh", "by"):
        found[known] = stats.false_discovery_control(p[known], method=how)
        return found
    assert largest is not None
    at_least = (largest[None, :] >= np.abs(statistic[known])[:, None] * (1 - 1e-9)).sum(axis=1)
    found[known] = (at_least + 1) / (len(largest) + 1) if drawn else at_least / len(largest)
    return found
