"""Medians and bands of values with gaps."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np

BAND = (0.1, 0.9)  # of the values, lie below the lower and the upper end of a band
BAND_WORDS = "10th to 90th percentile"


def smooth(values: np.ndarray, *, width: int) -> np.ndarray:
    """Running median over `width` steps, narrower at the ends; NaN only where all of them are."""
    half = width // 2
    windows = (values[max(0, at - half) : at + half + 1] for at in range(len(values)))
    return np.array([np.median(seen) if (seen := w[~np.isnan(w)]).size else np.nan for w in windows])


def median(values: np.ndarray, *, axis: int | tuple[int, ...]) -> np.ndarray:
    """Of what is a number; NaN where nothing is."""
    with _gaps():
        return np.asarray(np.nanmedian(values, axis=axis))


def mean(values: np.ndarray, *, axis: int | tuple[int, ...]) -> np.ndarray:
    """Of what is a number; NaN where nothing is."""
    with _gaps():
        return np.asarray(np.nanmean(values, axis=axis))


def band(values: np.ndarray, *, axis: int) -> tuple[np.ndarray, np.ndarray]:
    """The lower and the upper end of the middle of the values; NaN where nothing is a number."""
    with _gaps():
        low, high = np.nanquantile(values, BAND, axis=axis)
    return low, high


def doublings(values: np.ndarray) -> np.ndarray:
    """log2 of the first group over the second, which are the last axis; NaN where either is absent or zero."""
    first, second = (values[..., at].astype(np.float64) for at in (0, 1))
    there = (first > 0) & (second > 0) & np.isfinite(first) & np.isfinite(second)
    return np.log2(np.divide(first, second, out=np.full_like(first, np.nan), where=there))


def joint_cosines(inner: np.ndarray) -> np.ndarray:
    """(steps, groups, groups), of the gradients of all parameters as one: (parameters, steps, groups, groups).

    A parameter counts for two groups in a step where it was measured for both.
    """
    sums = np.zeros((3, *inner.shape[1:]))
    for products in inner.astype(np.float64):
        own = np.einsum("...gg->...g", products)
        terms = np.stack(np.broadcast_arrays(products, own[..., :, None], own[..., None, :]))
        sums += np.where(np.isfinite(terms).all(axis=0), terms, 0.0)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.asarray(sums[0] / np.sqrt(sums[1]) / np.sqrt(sums[2]))


@contextmanager
def _gaps() -> Iterator[None]:
    """Where nothing is a number is known; numpy warns of it."""
    with warnings.catch_warnings(), np.errstate(invalid="ignore"):
        warnings.filterwarnings("ignore", "(All-NaN|Mean of empty)", RuntimeWarning)
        yield
