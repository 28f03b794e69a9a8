"""The scale of a group by itself, whatever the size of the batch that it was in; numpy alone."""

from __future__ import annotations

import numpy as np


def own_scale(kind: str, own: np.ndarray | float, whole: np.ndarray | float) -> np.ndarray:
    """What singular values of a kind are to be multiplied with to be those of a group by itself.

    own, whole: samples of the group, and of all. A gradient is stored as the group's part of a mean over N samples:
    N / n makes it the mean over its own n. An adjoint's rows have 1 / N in them too, and its singular values, as an
    activation's, grow as the root of the number of rows: N / √n and 1 / √n make them those of a sample. NaN, or
    infinite, where the group has no sample.
    """
    own, whole = np.asarray(own, dtype=np.float64), np.asarray(whole, dtype=np.float64)
    with np.errstate(divide="ignore", invalid="ignore"):
        if kind == "gradient":
            return np.asarray(whole / own)
        return np.asarray((whole if kind == "adjoint" else 1.0) / np.sqrt(own))
