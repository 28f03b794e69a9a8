"""From what a step gathered to the row that is stored: spectra, metrics, inner products, status, per group."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gradtrace.accumulate import ParameterSum
from gradtrace.decompose.dense import all_finite, double
from gradtrace.decompose.lapack import NotConvergedError
from gradtrace.decompose.problem import Problem
from gradtrace.kinds import KindRows, LookupRows
from gradtrace.metrics import whole_metrics
from gradtrace.schedule import Result, beside, solve
from gradtrace.store.rows import ParameterRow, Status

FEW_NUMBERS = 2**16  # in the gradients of all cells: multiplied in double precision, with one call
LEAST = 1e-25  # an inner product in single precision; squares below may have underflown
Wanted = Problem | Tensor | int | None  # to be decomposed; known already; a status; a matrix of zeros


@dataclass(frozen=True)
class GroupsOfStep:
    """The groups of one step: their cells, and the number of samples in each."""

    cells: Mapping[str, Sequence[int]]
    n_samples: np.ndarray
    n_cells: int

    @cached_property
    def of_each(self) -> list[tuple[str, Sequence[int], int]]:
        """Name, cells and number of samples."""
        return list(zip(self.cells, self.cells.values(), self.n_samples.tolist(), strict=True))

    @cached_property
    def members(self) -> np.ndarray:
        """(groups, cells): one where a cell belongs to a group."""
        member = np.zeros((len(self.cells), self.n_cells))
        for place, cells in enumerate(self.cells.values()):
            member[place, list(cells)] = 1.0
        return member


class Summary:
    """One parameter's part of a step: first what is to be decomposed for it, then its row.

    total: reduced. Spectra are descending, cut to the `keep` largest after the metrics are taken.
    """

    def __init__(
        self, total: ParameterSum, groups: GroupsOfStep, *, kinds: Sequence[str], keep: int | None,
        residual: float, owner_residual: float, ungrouped: bool = False, loss_scale: float = 1.0,
    ) -> None:  # fmt: skip
        self._total, self._groups, self._keep, self._ungrouped = total, groups, keep, ungrouped
        self._residuals, self._scale = (residual, owner_residual), loss_scale
        self._wanted = {kind: self._posed(kind) for kind in kinds}
        self._sigma: dict[str, np.ndarray] = {}
        self._status: dict[str, np.ndarray] = {}

    @property
    def problems(self) -> list[Problem]:
        """What is to be decomposed."""
        return [one for wanted in self._wanted.values() for one in wanted if isinstance(one, Problem)]

    def _posed(self, kind: str) -> list[Wanted]:
        """Per group what its spectrum comes from, or the status that says why there is none."""
        have = None if kind == "gradient" else getattr(self._total, kind)
        return [self._of_group(kind, have, *group) for group in self._groups.of_each]

    def _of_group(self, kind: str, have: Any, name: str, cells: Sequence[int], n_samples: int) -> Wanted:
        if n_samples == 0:
            return Status.GROUP_ABSENT
        if (kind != "gradient" and have is None) or (self._ungrouped and name != "all"):
            return Status.KIND_ABSENT
        if not self._is_finite(kind, have, cells):
            return Status.NOT_FINITE
        if kind == "gradient":
            return self._total.problem(cells)
        return have.spectrum(cells) if isinstance(have, LookupRows) else have.problem(cells)

    def _is_finite(self, kind: str, have: Any, cells: Sequence[int]) -> bool:
        if kind == "gradient":  # factors that are decomposed are finite
            return not self._spoiled.intersection(cells)
        return not isinstance(have, KindRows) or have.is_finite(cells)

    @cached_property
    def _spoiled(self) -> frozenset[int]:
        """The cells whose gradient has entries that are not finite."""
        return frozenset(c for c, gradient in self._total.gradient.dense.items() if not all_finite(gradient))

    def take(self, solved: Mapping[Problem, Result]) -> None:
        """Takes the spectra, per kind padded with NaN to (groups, components)."""
        for kind, wanted in self._wanted.items():
            found = [self._spectrum(kind, one, solved) for one in wanted]
            self._status[kind] = np.array([status for status, _ in found], dtype=np.uint8)
            factor = 1.0 if kind == "activation" else 1.0 / self._scale
            self._sigma[kind] = _padded([sigma for _, sigma in found]) * factor

    def _spectrum(self, kind: str, wanted: Wanted, solved: Mapping[Problem, Result]) -> tuple[int, np.ndarray]:
        if isinstance(wanted, int):
            return wanted, np.zeros(0)
        result = solved[wanted] if isinstance(wanted, Problem) else wanted
        if isinstance(result, NotConvergedError):
            return Status.NOT_CONVERGED, np.zeros(0)
        limit = self._limit(kind)
        values = np.zeros(0) if result is None else result.cpu().numpy()[:limit]
        if kind == "gradient" and len(values) < limit:  # rank is bounded by the rows: the rest is exactly zero
            values = np.concatenate([values, np.zeros(limit - len(values))])
        return Status.MEASURED, values

    def _limit(self, kind: str) -> int:
        """The most components that a spectrum of this kind can have."""
        if kind == "gradient":
            return min(self._total.gradient.sides)
        have = getattr(self._total, kind)
        return have.height if isinstance(have, LookupRows) else have.width

    @property
    def measured(self) -> list[tuple[np.ndarray, np.ndarray]]:
        """Per kind the spectra that metrics are taken of, and (groups,) what counts as zero in them."""
        return [(sigma, self._rank_floor(kind, sigma)) for kind, sigma in self._sigma.items()]

    def row(self, metrics: Sequence[Mapping[str, np.ndarray]]) -> ParameterRow:
        """The row, with the metrics of each of `measured`."""
        by_kind = dict(zip(self._sigma, metrics, strict=True))
        products = _inner_products(self._total, self._groups, self._ungrouped) / self._scale**2
        return ParameterRow(
            spectra={kind: sigma[:, : self._keep] for kind, sigma in self._sigma.items()},
            metrics=by_kind,
            status=self._status,
            inner_product=_with_norms(products, by_kind.get("gradient", {})),
            residual=self._residuals[0],
            owner_residual=self._residuals[1],
        )

    def _rank_floor(self, kind: str, sigma: np.ndarray) -> np.ndarray:
        """max(rows, columns) eps sigma1, and never below the rounding bound eps |A_g|_F |D_g|_F of a gradient's sum."""
        total = self._total
        eps = total.eps or torch.finfo(total.dtype).eps
        top = sigma[:, 0] if sigma.shape[1] else np.zeros(len(sigma))
        sides = total.gradient.sides if kind == "gradient" else (sigma.shape[1],)
        floor = np.nan_to_num(top) * max(sides) * eps
        if kind != "gradient" or not total.power:
            return floor
        powers = [[total.power.get(c, (0.0, 0.0)) for c in cells] for cells in self._groups.cells.values()]
        bound = [(sum(a for a, _ in of) * sum(d for _, d in of)) ** 0.5 for of in powers]
        return np.maximum(floor, eps / self._scale * np.array(bound))


def reduce(totals: Iterable[ParameterSum], *, workers: int | None = None) -> None:
    """Makes all of them ready for their summaries, beside each other; what parameters share is reduced once."""
    each = list({id(one): one for total in totals for one in total.unreduced}.values())
    dear = sorted(each, key=lambda one: -one.flops)
    if workers == 1:  # on an accelerator too, where no thread of the CPU's is asked for
        for one in dear:
            one.reduce()
    else:
        beside(lambda one: one.reduce(), dear, flops=sum(one.flops for one in each), workers=workers)


def summarise(summaries: Mapping[str, Summary], *, workers: int | None = None) -> dict[str, ParameterRow]:
    """The rows of all parameters of a step: everything is decomposed together, and metrics taken together."""
    solved = solve([one for summary in summaries.values() for one in summary.problems], workers=workers)
    for summary in summaries.values():
        summary.take(solved)
    measured = [summary.measured for summary in summaries.values()]
    metrics = iter(whole_metrics(list(itertools.chain.from_iterable(measured))))
    return {
        name: summary.row(list(itertools.islice(metrics, len(own))))
        for (name, summary), own in zip(summaries.items(), measured, strict=True)
    }


def _inner_products(total: ParameterSum, groups: GroupsOfStep, ungrouped: bool) -> np.ndarray:
    """(groups, groups) <G_g, G_h>, real part; NaN where a group is absent or not measured."""
    if total.gradient.small is not None:
        between = total.gradient.small.products(groups.n_cells).cpu().numpy()
    else:
        between = np.zeros((groups.n_cells, groups.n_cells))
        present = sorted(total.gradient.dense)
        between[np.ix_(present, present)] = _between(
            [total.gradient.dense[c].reshape(total.gradient.sides) for c in present]
        )
    product = _masked_product(groups.members, between)
    absent = groups.n_samples == 0
    if ungrouped:
        absent = absent | (np.array(list(groups.cells)) != "all")
    product[absent | absent[:, None]] = np.nan
    return product


def _between(gradients: Sequence[Tensor]) -> np.ndarray:
    """The real part of the inner product of each matrix with each."""
    if 0 < sum(one.numel() for one in gradients) < FEW_NUMBERS:
        flat = torch.stack([double(one).flatten() for one in gradients])
        return (flat.conj() @ flat.T).real.cpu().numpy()
    found = np.zeros((len(gradients), len(gradients)))
    for (i, one), (j, other) in itertools.combinations_with_replacement(enumerate(gradients), 2):
        found[i, j] = found[j, i] = _inner_product(one, other)
    return found


def _inner_product(one: Tensor, other: Tensor) -> float:
    """Its real part: rows in the gradients' own precision, in double precision over rows, or where that overflows."""
    found = float(torch.linalg.vecdot(one, other).real.double().sum())
    if LEAST < abs(found) < float("inf"):
        return found
    return float(torch.linalg.vecdot(double(one), double(other)).real.sum())


def _with_norms(products: np.ndarray, metrics: Mapping[str, np.ndarray]) -> np.ndarray:
    """The diagonal as the spectra have it: in sums of products it can cancel down to rounding errors."""
    if "frobenius" in metrics:
        np.fill_diagonal(products, np.where(np.isnan(np.diagonal(products)), np.nan, metrics["frobenius"] ** 2))
    return products


def _masked_product(member: np.ndarray, between: np.ndarray) -> np.ndarray:
    """member @ between @ member.T where a cell that is not finite spoils only the groups it belongs to."""
    bad = ~np.isfinite(between)
    if not bad.any():
        return member @ between @ member.T
    clean = member @ np.where(bad, 0.0, between) @ member.T
    spoiled = (member @ bad.astype(float) @ member.T) > 0
    return np.where(spoiled, np.nan, clean)


def _padded(spectra: Sequence[np.ndarray]) -> np.ndarray:
    width = max((len(s) for s in spectra), default=0)
    padded = np.full((len(spectra), width), np.nan)
    for place, sigma in enumerate(spectra):
        padded[place, : len(sigma)] = sigma
    return padded
