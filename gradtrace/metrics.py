"""Scalar summaries of a spectrum, in numpy alone so that queries need no torch.

Every metric takes singular values, descending along the last axis and NaN-padded, and returns one value per spectrum.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

WHOLE = ("frobenius", "nuclear", "stable_rank", "effective_rank", "participation_ratio", "numerical_rank", "condition")
"""Stored per step, parameter, group and kind, because they need the spectrum before truncation."""

NARROW = 64  # spectra of fewer values are not told apart by their width
RANK_RULE = "singular values above max(rows, columns) * eps(dtype) * sigma1, or above the rounding bound of the sum"


class Spectra:
    """Spectra, the rank threshold of each, and what several metrics need of them, computed once."""

    def __init__(self, sigma: np.ndarray, floor: np.ndarray | float) -> None:
        self.sigma = np.asarray(sigma, dtype=np.float64)
        self.floor = np.broadcast_to(np.asarray(floor, dtype=np.float64), self.sigma.shape[:-1])

    @cached_property
    def padding(self) -> np.ndarray:
        """Where there is no value."""
        return np.isnan(self.sigma)

    @cached_property
    def missing(self) -> np.ndarray:
        """Where there is no spectrum."""
        return np.asarray(self.padding.all(axis=-1))

    @property
    def top(self) -> np.ndarray:
        return self.sigma[..., 0]

    @cached_property
    def relative(self) -> np.ndarray:
        """Divided by the largest value, which keeps squares and fourth powers from under- or overflowing."""
        relative = self.sigma / np.where(self.top > 0, self.top, 1.0)[..., None]
        return np.where(relative > 0, relative, 0.0)

    @cached_property
    def squares(self) -> np.ndarray:
        return self.relative**2

    @cached_property
    def power(self) -> np.ndarray:
        """The sum of the squares."""
        return self.squares.sum(axis=-1)


@dataclass(frozen=True)
class Metric:
    """One metric: what it is, its range, and where its definition comes from."""

    name: str
    definition: str
    range: str
    source: str
    compute: Callable[[Spectra], np.ndarray]

    def __call__(self, sigma: np.ndarray, floor: np.ndarray | float = 0.0) -> np.ndarray:
        """floor: what counts as zero for the rank."""
        return self.of(Spectra(sigma, floor))

    def of(self, spectra: Spectra) -> np.ndarray:
        if spectra.sigma.shape[-1] == 0:
            return np.full(spectra.sigma.shape[:-1], np.nan)
        with np.errstate(invalid="ignore", divide="ignore"):
            return np.where(spectra.missing, np.nan, self.compute(spectra))


def _nuclear(spectra: Spectra) -> np.ndarray:
    return np.where(spectra.padding, 0.0, spectra.sigma).sum(axis=-1)


def _effective_rank(spectra: Spectra) -> np.ndarray:
    total = spectra.relative.sum(axis=-1)
    share = spectra.relative / np.where(total > 0, total, 1.0)[..., None]
    share = np.where(share > 0, share, 1.0)  # whose product with its logarithm is zero too
    return np.where(total > 0, np.exp(-(share * np.log(share)).sum(axis=-1)), 0.0)


def _participation_ratio(spectra: Spectra) -> np.ndarray:
    fourth = (spectra.squares**2).sum(axis=-1)
    return np.where(fourth > 0, spectra.power**2 / np.where(fourth > 0, fourth, 1.0), 0.0)


def _condition(spectra: Spectra) -> np.ndarray:
    smallest = np.where(spectra.padding, np.inf, spectra.sigma).min(axis=-1)
    return np.where(smallest > 0, spectra.top / smallest, np.inf)


METRICS: dict[str, Metric] = {
    metric.name: metric
    for metric in (
        Metric("sigma1", "largest singular value", "[0, inf)", "spectral norm", lambda s: s.top),
        Metric("frobenius", "sqrt(sum sigma^2)", "[0, inf)", "Frobenius norm", lambda s: s.top * np.sqrt(s.power)),
        Metric("nuclear", "sum sigma", "[0, inf)", "nuclear (trace) norm", _nuclear),
        Metric(
            "stable_rank",
            "frobenius^2 / sigma1^2",
            "[1, rank], 0 for zero",
            "Rudelson & Vershynin 2007",
            lambda s: s.power,
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
        Metric(
            "numerical_rank",
            RANK_RULE,
            "0, 1, ..., min(rows, columns)",
            "Golub & Van Loan 5.4.1",
            lambda s: (s.sigma > s.floor[..., None]).sum(axis=-1, dtype=np.float64),
        ),
        Metric("condition", "sigma1 / smallest singular value", "[1, inf]", "2-norm condition number", _condition),
    )
}


def whole_metrics(spectra: Sequence[tuple[np.ndarray, np.ndarray]]) -> list[dict[str, np.ndarray]]:
    """For each (sigma, floor) the metrics of `WHOLE`, as name -> (spectra,); those of about one width together."""
    by_width: dict[int, list[int]] = {}
    for place, (sigma, _) in enumerate(spectra):
        by_width.setdefault(math.ceil(math.log(max(sigma.shape[-1], NARROW), 4)), []).append(place)
    found: list[dict[str, np.ndarray]] = [{} for _ in spectra]
    for places in by_width.values():
        own = [spectra[place] for place in places]
        width, ends = max(sigma.shape[-1] for sigma, _ in own), np.cumsum([len(sigma) for sigma, _ in own])
        together = np.full((ends[-1], width), np.nan)
        for (sigma, _), end in zip(own, ends, strict=True):
            together[end - len(sigma) : end, : sigma.shape[-1]] = sigma
        stacked = Spectra(together, np.concatenate([floor for _, floor in own]))
        for name in WHOLE:
            values = METRICS[name].of(stacked)
            for place, (sigma, _), end in zip(places, own, ends, strict=True):
                found[place][name] = values[end - len(sigma) : end]
    return found
