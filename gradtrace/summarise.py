"""From what a step gathered to the row that is stored: spectra, metrics, inner products, status, per group."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from gradtrace.accumulate import ParameterSum
from gradtrace.decompose.dense import NotConvergedError
from gradtrace.decompose.factored import SmallFactors
from gradtrace.kinds import KindRows, LookupRows
from gradtrace.metrics import METRICS, WHOLE
from gradtrace.store.rows import ParameterRow, Status


@dataclass(frozen=True)
class GroupsOfStep:
    """The groups of one step: their cells, and the number of samples in each."""

    cells: Mapping[str, Sequence[int]]
    n_samples: np.ndarray
    n_cells: int


def summarise(
    total: ParameterSum, groups: GroupsOfStep, *, kinds: Sequence[str], keep: int | None, ungrouped: bool = False,
    residual: float, owner_residual: float, loss_scale: float = 1.0,
) -> ParameterRow:  # fmt: skip
    """The row of one parameter. Spectra are descending, cut to the `keep` largest after the metrics are taken."""
    small = _small(total)
    row = _Row(total, groups, keep, ungrouped, 1.0 / loss_scale)
    for kind in kinds:
        row.measure(kind, small)
    return ParameterRow(
        spectra=row.spectra,
        metrics=row.metrics,
        status=row.status,
        inner_product=_with_norms(
            _inner_products(total, small, groups, ungrouped) / loss_scale**2, row.metrics.get("gradient", {})
        ),
        residual=residual,
        owner_residual=owner_residual,
    )


class _Row:
    def __init__(
        self, total: ParameterSum, groups: GroupsOfStep, keep: int | None, ungrouped: bool, factor: float
    ) -> None:
        self.total, self.groups, self.keep, self.ungrouped, self.factor = total, groups, keep, ungrouped, factor
        self.spectra: dict[str, np.ndarray] = {}
        self.metrics: dict[str, dict[str, np.ndarray]] = {}
        self.status: dict[str, np.ndarray] = {}

    def measure(self, kind: str, small: SmallFactors | str | None) -> None:
        status, spectra = [], []
        have = None if kind == "gradient" else getattr(self.total, kind)
        if isinstance(have, KindRows):
            have.reduce()
        for place, (name, cells) in enumerate(self.groups.cells.items()):
            code, sigma = self._group(kind, name, place, cells, small, have)
            status.append(code)
            spectra.append(sigma)
        self.status[kind] = np.array(status, dtype=np.uint8)
        padded = _padded(spectra)
        if kind != "activation":
            padded = padded * self.factor
        self.metrics[kind] = self._metrics(kind, padded)
        self.spectra[kind] = padded if self.keep is None else padded[:, : self.keep]

    def _group(
        self, kind: str, name: str, place: int, cells: Sequence[int], small: Any, have: Any
    ) -> tuple[int, np.ndarray]:
        nothing = np.zeros(0)
        if self.groups.n_samples[place] == 0:
            return Status.GROUP_ABSENT, nothing
        if (kind != "gradient" and have is None) or (self.ungrouped and name != "all"):
            return Status.KIND_ABSENT, nothing
        if not _finite(kind, self.total, cells, small):
            return Status.NOT_FINITE, nothing
        try:
            if kind == "gradient":
                sigma = self.total.spectrum_of(cells, small)
                limit = min(self.total.gradient.sides)
            else:
                sigma = self.total.kind_spectrum(kind, cells)
                limit = have.height if isinstance(have, LookupRows) else have.width
        except NotConvergedError:
            return Status.NOT_CONVERGED, nothing
        values = sigma.cpu().numpy().astype(np.float64)[:limit]
        if kind == "gradient" and len(values) < limit:  # rank is bounded by the rows: the rest is exactly zero
            values = np.concatenate([values, np.zeros(limit - len(values))])
        return Status.MEASURED, values

    def _metrics(self, kind: str, sigma: np.ndarray) -> dict[str, np.ndarray]:
        floor = self._rank_floor(kind, sigma)
        return {name: METRICS[name](sigma, floor) for name in WHOLE}

    def _rank_floor(self, kind: str, sigma: np.ndarray) -> np.ndarray:
        """max(rows, columns) eps sigma1, and never below the rounding bound eps |A_g|_F |D_g|_F of a gradient's sum."""
        eps = self.total.eps or torch.finfo(self.total.dtype).eps
        top = sigma[:, 0] if sigma.shape[1] else np.zeros(len(sigma))
        sides = self.total.gradient.sides if kind == "gradient" else (sigma.shape[1],)
        floor = np.nan_to_num(top) * max(sides) * eps
        if kind != "gradient" or not self.total.power:
            return floor
        bound = []
        for cells in self.groups.cells.values():
            a = sum(self.total.power.get(c, (0.0, 0.0))[0] for c in cells)
            d = sum(self.total.power.get(c, (0.0, 0.0))[1] for c in cells)
            bound.append(eps * (a * d) ** 0.5 * self.factor)
        return np.maximum(floor, np.array(bound))


def _small(total: ParameterSum) -> SmallFactors | str | None:
    """The factors decomposed, None where the gradient is dense, or "failed"."""
    if not total.gradient.is_factored:
        return None
    parts = total.gradient.parts
    if not all(bool(torch.isfinite(t).all()) for left, right, _ in parts for t in (left, right)):
        for_cells = total.gradient
        for_cells._fold()  # a group whose rows are finite can still be measured
        return None
    return total.gradient.small()


def _finite(kind: str, total: ParameterSum, cells: Sequence[int], small: Any) -> bool:
    if kind == "gradient":
        if small is not None:
            return True
        return all(bool(torch.isfinite(total.gradient.dense[c]).all()) for c in cells if c in total.gradient.dense)
    have = getattr(total, kind)
    return not isinstance(have, KindRows) or have.is_finite(cells)


def _inner_products(total: ParameterSum, small: Any, groups: GroupsOfStep, ungrouped: bool) -> np.ndarray:
    """(groups, groups) <G_g, G_h>, real part; NaN where a group is absent or not measured."""
    member = np.zeros((len(groups.cells), groups.n_cells))
    for place, cells in enumerate(groups.cells.values()):
        member[place, list(cells)] = 1.0
    if small is not None:
        between = small.products(groups.n_cells).cpu().numpy()
    else:
        between = np.zeros((groups.n_cells, groups.n_cells))
        present = sorted(total.gradient.dense)
        if present:
            kind = torch.complex128 if total.dtype.is_complex else torch.float64
            flat = torch.stack([total.gradient.dense[c].reshape(-1).to(kind) for c in present])
            between[np.ix_(present, present)] = (flat.conj() @ flat.T).real.cpu().numpy()
    product = _masked_product(member, between)
    absent = groups.n_samples == 0
    if ungrouped:
        absent = absent | (np.array(list(groups.cells)) != "all")
    product[absent, :] = np.nan
    product[:, absent] = np.nan
    return product


def _with_norms(products: np.ndarray, metrics: Mapping[str, np.ndarray]) -> np.ndarray:
    """The diagonal as the spectra have it: in sums of products it can cancel down to rounding errors."""
    if "frobenius" in metrics:
        np.fill_diagonal(products, np.where(np.isnan(np.diagonal(products)), np.nan, metrics["frobenius"] ** 2))
    return products


def _masked_product(member: np.ndarray, between: np.ndarray) -> np.ndarray:
    """member @ between @ member.T where a cell that is not finite spoils only the groups it belongs to."""
    bad = ~np.isfinite(between)
    clean = member @ np.where(bad, 0.0, between) @ member.T
    spoiled = (member @ bad.astype(float) @ member.T) > 0
    return np.where(spoiled, np.nan, clean)


def _padded(spectra: Sequence[np.ndarray]) -> np.ndarray:
    width = max((len(s) for s in spectra), default=0)
    padded = np.full((len(spectra), width), np.nan)
    for place, sigma in enumerate(spectra):
        padded[place, : len(sigma)] = sigma
    return padded
