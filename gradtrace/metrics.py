"""Scalar summaries of a spectrum, in numpy alone so that queries need no torch.

Every metric takes singular values, descending along the last axis and NaN-padded, and returns one value per spectrum.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

WHOLE = ("frobenius", "nuclear", "stable_rank", "effective_rank", "participation_ratio", "numerical_rank", "condition")
"""Stored per step, parameter, group and kind, because they need the spectrum before truncation."""

RANK_RULE = "singular values above max(rows, columns) * eps(dtype) * sigma1, or above the rounding bound of the sum"


@dataclass(frozen=True)
class Metric:
    """One metric: what it is, its range, and where its definition comes from."""

    name: str
    definition: str
    range: str
    source: str
    compute: Callable[[np.ndarray, np.ndarray], np.ndarray]  # (sigma, floor) -> values; floor: rank threshold

    def __call__(self, sigma: np.ndarray, floor: np.ndarray | float = 0.0) -> np.ndarray:
        sigma = np.asarray(sigma, dtype=np.float64)
        if sigma.shape[-1] == 0:
            return np.full(sigma.shape[:-1], np.nan)
        with np.errstate(invalid="ignore", divide="ignore"):
            values = np.asarray(self.compute(sigma, np.asarray(floor, dtype=np.float64)), dtype=np.float64)
        return np.where(np.isnan(sigma).all(axis=-1), np.nan, values)


def _sum(values: np.ndarray) -> np.ndarray:
    return np.nansum(values, axis=-1)


def _sigma1(sigma: np.ndarray, floor: np.ndarray) -> np.ndarray:
    return sigma[..., 0]


def _relative(sigma: np.ndarray, floor: np.ndarray) -> np.ndarray:
    """Spectrum divided by its largest value: keeps squares and fourth powers from under- or overflowing."""
    top = _sigma1(sigma, floor)[..., None]
    return np.where(top > 0, sigma / np.where(top > 0, top, 1.0), np.where(np.isnan(sigma), np.nan, 0.0))


def _frobenius(sigma: np.ndarray, floor: np.ndarray) -> np.ndarray:
    return _sigma1(sigma, floor) * np.sqrt(_sum(_relative(sigma, floor) ** 2))


def _nuclear(sigma: np.ndarray, floor: np.ndarray) -> np.ndarray:
    return _sum(sigma)


def _stable_rank(sigma: np.ndarray, floor: np.ndarray) -> np.ndarray:
    return _sum(_relative(sigma, floor) ** 2)


def _effective_rank(sigma: np.ndarray, floor: np.ndarray) -> np.ndarray:
    share = _relative(sigma, floor)
    total = _sum(share)[..., None]
    share = share / np.where(total > 0, total, 1.0)
    entropy = -_sum(np.where(share > 0, share * np.log(np.where(share > 0, share, 1.0)), 0.0))
    return np.where(total[..., 0] > 0, np.exp(entropy), 0.0)


def _participation_ratio(sigma: np.ndarray, floor: np.ndarray) -> np.ndarray:
    power = _relative(sigma, floor) ** 2
    fourth = _sum(power**2)
    return np.where(fourth > 0, _sum(power) ** 2 / np.where(fourth > 0, fourth, 1.0), 0.0)


def _numerical_rank(sigma: np.ndarray, floor: np.ndarray) -> np.ndarray:
    return _sum(sigma > np.broadcast_to(floor, sigma.shape[:-1])[..., None])


def _condition(sigma: np.ndarray, floor: np.ndarray) -> np.ndarray:
    smallest = np.nanmin(np.where(np.isnan(sigma), np.inf, sigma), axis=-1)
    return np.where(smallest > 0, _sigma1(sigma, floor) / smallest, np.inf)


METRICS: dict[str, Metric] = {
    metric.name: metric
    for metric in (
        Metric("sigma1", "largest singular value", "[0, inf)", "spectral norm", _sigma1),
        Metric("frobenius", "sqrt(sum sigma^2)", "[0, inf)", "Frobenius norm", _frobenius),
        Metric("nuclear", "sum sigma", "[0, inf)", "nuclear (trace) norm", _nuclear),
        Metric(
            "stable_rank", "frobenius^2 / sigma1^2", "[1, rank], 0 for zero", "Rudelson & Vershynin 2007", _stable_rank
        ),
        Metric(
            "effective_rank",
            "exp(entropy of sigma / sum sigma)",
            "[1, rank], 0 for zero",
            "Roy & Vetterli 2007",
            _effective_rank,
        ),
        Metric(
            "participation_ratio",
            "(sum sigma^2)^2 / sum sigma^4",
            "[1, rank], 0 for zero",
            "participation ratio of the covariance eigenvalues, Gao et al. 2017",
            _participation_ratio,
        ),
        Metric("numerical_rank", RANK_RULE, "0, 1, ..., min(rows, columns)", "Golub & Van Loan 5.4.1", _numerical_rank),
        Metric("condition", "sigma1 / smallest singular value", "[1, inf]", "2-norm condition number", _condition),
    )
}


def whole_metrics(spectra: Sequence[tuple[np.ndarray, np.ndarray]]) -> list[dict[str, np.ndarray]]:
    """For each (sigma, floor) the metrics of `WHOLE`, as name -> (spectra,); those of about one width together."""
    by_width: dict[int, list[int]] = {}
    for place, (sigma, _) in enumerate(spectra):
        by_width.setdefault(math.ceil(math.log(max(sigma.shape[-1], 1), 4)), []).append(place)
    found: list[dict[str, np.ndarray]] = [{} for _ in spectra]
    for places in by_width.values():
        own = [spectra[place] for place in places]
        width, ends = max(sigma.shape[-1] for sigma, _ in own), np.cumsum([len(sigma) for sigma, _ in own])
        together = np.full((ends[-1], width), np.nan)
        for (sigma, _), end in zip(own, ends, strict=True):
            together[end - len(sigma) : end, : sigma.shape[-1]] = sigma
        floors = np.concatenate([floor for _, floor in own])
        for name in WHOLE:
            for place, values in zip(places, np.split(METRICS[name](together, floors), ends[:-1]), strict=True):
                found[place][name] = values
    return found
