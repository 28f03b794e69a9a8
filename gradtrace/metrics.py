"""Scalar summaries of a spectrum, in numpy alone so that queries need no torch.

Every metric takes singular values, descending along the last axis and NaN-padded, and returns one value per spectrum.
Anybody's can be added: by `register`, or through the entry-point group `gradtrace.metrics`.
"""

from __future__ import annotations

import functools
import logging
import math
import re
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import entry_points

import numpy as np

from gradtrace.errors import GradtraceError, MetricWarning

GROUP = "gradtrace.metrics"
TAKEN = frozenset(
    (
        *("gradient", "activation", "adjoint", "status", "residual", "owner_residual", "inner_product"),
        *("cosine", "share"),
        *("parameter", "kind", "metric", "metrics", "value", "step", "group", "group_other", "scalar", "part"),
        *("component", "run", "loss", "epoch", "scalars", "cost", "n_samples", "recorded"),
    )
)
"""What a store or a table calls something else."""

NARROW = 64  # spectra of fewer values are not told apart by their width
RANK_RULE = "singular values above max(rows, columns) * eps(dtype) * sigma1, or above the rounding bound of the sum"


class Spectra:
    """Spectra, the rank threshold of each, and what several metrics need of them, computed once; all read-only.

    sigma: (..., components), descending, NaN-padded. floor: (...), what counts as zero for the rank: 0 where it is not
    known, as of spectra that come from a store.
    """

    def __init__(self, sigma: np.ndarray, floor: np.ndarray | float = 0.0) -> None:
        self.sigma = _locked(np.asarray(sigma, dtype=np.float64))
        self.floor = np.broadcast_to(np.asarray(floor, dtype=np.float64), self.sigma.shape[:-1])

    @cached_property
    def padding(self) -> np.ndarray:
        """Where there is no value."""
        return _locked(np.isnan(self.sigma))

    @cached_property
    def missing(self) -> np.ndarray:
        """Where there is no spectrum."""
        return _locked(np.asarray(self.padding.all(axis=-1)))

    @property
    def top(self) -> np.ndarray:
        """The largest value."""
        return self.sigma[..., 0]

    @cached_property
    def relative(self) -> np.ndarray:
        """Divided by the largest value, which keeps powers from under- or overflowing; 0 where there is no value."""
        relative = self.sigma / np.where(self.top > 0, self.top, 1.0)[..., None]
        return _locked(np.where(relative > 0, relative, 0.0))

    @cached_property
    def squares(self) -> np.ndarray:
        """Of the relative values."""
        return _locked(self.relative**2)

    @cached_property
    def power(self) -> np.ndarray:
        """The sum of the squares."""
        return _locked(np.asarray(self.squares.sum(axis=-1)))


def _locked(values: np.ndarray) -> np.ndarray:
    """The same values, not to be written to: what one metric did to them, the next would take for spectra."""
    view = values.view()
    view.flags.writeable = False
    return view


@dataclass(frozen=True)
class Metric:
    """One metric: what it is, its range, and where its definition comes from.

    compute: one value per spectrum. whole: it needs the spectrum before truncation, so it is stored with every recorded
    step; others are computed from the stored singular values when somebody asks.
    """

    name: str
    definition: str
    range: str
    source: str
    compute: Callable[[Spectra], np.ndarray]
    whole: bool = False

    def __call__(self, sigma: np.ndarray, floor: np.ndarray | float = 0.0) -> np.ndarray:
        """floor: what counts as zero for the rank."""
        return self.of(Spectra(sigma, floor))

    def of(self, spectra: Spectra) -> np.ndarray:
        """One value per spectrum, NaN where there is none; ValueError where `compute` gives another number of them."""
        shape = spectra.sigma.shape[:-1]
        if spectra.sigma.shape[-1] == 0:
            return np.full(shape, np.nan)
        with np.errstate(invalid="ignore", divide="ignore"):
            found = np.asarray(self.compute(spectra), dtype=np.float64)
        if found.shape != shape:
            raise ValueError(f"for spectra {spectra.sigma.shape} it gave values {found.shape} instead of {shape}")
        return np.where(spectra.missing, np.nan, found)

    def leniently(self, spectra: Spectra) -> np.ndarray:
        """The same, but NaN and a warning, once for each metric, where it fails: no metric stops a training."""
        try:
            return self.of(spectra)
        except Exception as error:
            if self.name not in _TOLD:
                _TOLD.add(self.name)
                warnings.warn(
                    f"The metric {self.name!r} failed and is NaN: {type(error).__name__}: {error}. It takes spectra "
                    "(..., components) and gives one number for each.",
                    MetricWarning,
                    stacklevel=3,
                )
            return np.full(spectra.sigma.shape[:-1], np.nan)


_TOLD: set[str] = set()  # the metrics that were warned of


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
        Metric(
            "frobenius",
            "sqrt(sum sigma^2)",
            "[0, inf)",
            "Frobenius norm",
            lambda s: s.top * np.sqrt(s.power),
            whole=True,
        ),
        Metric("nuclear", "sum sigma", "[0, inf)", "nuclear (trace) norm", _nuclear, whole=True),
        Metric(
            "stable_rank",
            "frobenius^2 / sigma1^2",
            "[1, rank], 0 for zero",
            "Rudelson & Vershynin 2007",
            lambda s: s.power,
            whole=True,
        ),
        Metric(
            "effective_rank",
            "exp(entropy of sigma / sum sigma)",
            "[1, rank], 0 for zero",
            "Roy & Vetterli 2007",
            _effective_rank,
            whole=True,
        ),
        Metric(
            "participation_ratio",
            "(sum sigma^2)^2 / sum sigma^4",
            "[1, rank], 0 for zero",
            "participation ratio of the covariance eigenvalues, Gao et al. 2017",
            _participation_ratio,
            whole=True,
        ),
        Metric(
            "numerical_rank",
            RANK_RULE,
            "0, 1, ..., min(rows, columns)",
            "Golub & Van Loan 5.4.1",
            lambda s: (s.sigma > s.floor[..., None]).sum(axis=-1, dtype=np.float64),
            whole=True,
        ),
        Metric(
            "condition",
            "sigma1 / smallest singular value",
            "[1, inf]",
            "2-norm condition number",
            _condition,
            whole=True,
        ),
    )
}
"""By name, the built-in ones first. `register` adds to it."""

BUILT_IN = frozenset(METRICS)
WHOLE = tuple(metric.name for metric in METRICS.values() if metric.whole)
"""Of the built-in ones those that are stored, because they need the spectrum before truncation."""


# ---------------------------------------------------------------------- anybody's


def register(metric: Metric, *, replace: bool = False) -> Metric:
    """The metric, which from now on is stored with every recorded step (if it is `whole`), and can be asked for.

    replace: take the place of one that was registered before under the same name, as a notebook does.
    Raises GradtraceError where the name is that of another metric, or of something else in a store.
    """
    if not isinstance(metric, Metric):
        raise GradtraceError(f"{metric!r} is no metric. Give a gradtrace.metrics.Metric(name, definition, ...).")
    name, known = metric.name, METRICS.get(metric.name)
    if not re.fullmatch("[a-z][a-z0-9_]*", name) or name in TAKEN or re.match("(gradient|activation|adjoint)_", name):
        raise GradtraceError(
            f"A metric cannot be called {name!r}: a name has lower-case letters, digits and underscores, begins with a "
            f"letter, not with a kind such as `adjoint_`, and is none of {', '.join(sorted(TAKEN))}."
        )
    if known is not None and known != metric and (name in BUILT_IN or not replace):
        again = "" if name in BUILT_IN else ", or say replace=True"
        raise GradtraceError(f"There is a metric {name!r} already ({known.definition}). Choose another name{again}.")
    METRICS[name] = metric
    _TOLD.discard(name)
    return metric


@functools.cache
def load_installed() -> None:
    """Registers, once, what installed packages offer through the entry-point group; one that cannot be is logged."""
    for point in sorted(entry_points(group=GROUP), key=lambda p: (p.name, p.value)):
        try:
            register(point.load())
        except Exception as error:  # somebody else's import: it must not take the others down, and it is named
            told = f"{point.name} ({point.value}): {type(error).__name__}: {error}"
            logging.getLogger("gradtrace").warning("The metric %s cannot be used.", told)


def find(name: str) -> Metric | None:
    """The metric of that name, installed ones included."""
    if name not in METRICS:
        load_installed()
    return METRICS.get(name)


def stored() -> tuple[str, ...]:
    """The metrics that are stored with a recorded step: the built-in ones of `WHOLE` first, in their order."""
    load_installed()
    return (*WHOLE, *(name for name, metric in METRICS.items() if metric.whole and name not in BUILT_IN))


def described() -> dict[str, dict[str, str]]:
    """What is to be said in a run about metrics that a reader may not know: name -> definition, range and source."""
    others = [METRICS[name] for name in stored() if name not in BUILT_IN]
    return {m.name: {"definition": m.definition, "range": m.range, "source": m.source} for m in others}


def whole_metrics(spectra: Sequence[tuple[np.ndarray, np.ndarray]]) -> list[dict[str, np.ndarray]]:
    """For each (sigma, floor) the `stored` metrics, as name -> (spectra,); those of about one width together."""
    names = stored()
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
        for name in names:
            values = METRICS[name].leniently(stacked)
            for place, (sigma, _), end in zip(places, own, ends, strict=True):
                found[place][name] = values[end - len(sigma) : end]
    return found
