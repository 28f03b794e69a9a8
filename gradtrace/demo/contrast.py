"""How far apart two groups' gradients are, parameter by parameter; numpy over the reader's tree."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from gradtrace.metrics import METRICS

LEADING = 8  # singular values that count towards the gap


@dataclass(frozen=True)
class Contrast:
    """Two groups of one grouping, seen in one parameter's gradient. Arrays are (2, steps), first group first.

    sigma1, effective_rank: of each group's *mean* gradient. gap: in doublings, the root mean square over the leading
    singular values of the median (over steps) log2 ratio between the groups. cosine: median over steps, of the angle
    between the groups' gradients.
    """

    parameter: str
    groups: tuple[str, str]
    sigma1: np.ndarray
    effective_rank: np.ndarray
    gap: float
    cosine: float

    @property
    def ratio(self) -> np.ndarray:
        """(steps,): how many times the second group's largest singular value is the first one's."""
        return _ratio(self.sigma1)

    @property
    def rank_ratio(self) -> np.ndarray:
        """(steps,): how many times the second group's effective rank is the first one's."""
        return _ratio(self.effective_rank)


def mean_spectra(node: Any, group: str) -> np.ndarray:
    """(steps, components): singular values of the group's own mean gradient; NaN where the group is absent.

    Stored is the group's part of the sum that enters `p.grad`, which the loss divides by all samples; times N / n_group
    it is the mean over the group's own samples, comparable between groups of different size.
    """
    counts = node["n_samples"]
    own = counts.sel(group=group).values.astype(np.float64)
    share = np.divide(counts.sel(group="all").values, own, out=np.full_like(own, np.nan), where=own > 0)
    return np.asarray(node["gradient"].sel(group=group).values * share[:, None], dtype=np.float64)


def contrast(parameter: str, node: Any, groups: tuple[str, str]) -> Contrast:
    """The two groups (as named in the store, `cohort=gw`) in one parameter's node."""
    spectra = [mean_spectra(node, group) for group in groups]
    with np.errstate(divide="ignore", invalid="ignore"):
        doublings = np.log2(spectra[1][:, :LEADING] / spectra[0][:, :LEADING])
    doublings = np.where(np.isfinite(doublings), doublings, np.nan)
    seen = doublings[:, ~np.isnan(doublings).all(axis=0)]
    gap = float(np.sqrt(np.mean(np.nanmedian(seen, axis=0) ** 2))) if seen.size else float("nan")
    return Contrast(
        parameter=parameter,
        groups=groups,
        sigma1=np.stack([each[:, 0] for each in spectra]),
        effective_rank=np.stack([METRICS["effective_rank"](each) for each in spectra]),
        gap=gap,
        cosine=_cosine(node, groups),
    )


def contrasts(tree: Any, groupings: Mapping[str, tuple[str, str]]) -> dict[str, dict[str, Contrast]]:
    """grouping -> parameter -> contrast, for every matrix whose gradient was recorded (vectors have one direction)."""
    nodes = {
        node.attrs["parameter"]: node for node in tree.children.values() if "gradient" in node and _is_matrix(node)
    }
    return {
        grouping: {name: contrast(name, node, groups) for name, node in nodes.items()}
        for grouping, groups in groupings.items()
    }


def widest(of: Mapping[str, Contrast]) -> list[Contrast]:
    """The contrasts from the widest gap to the narrowest."""
    return sorted((each for each in of.values() if np.isfinite(each.gap)), key=lambda each: -each.gap)


def _cosine(node: Any, groups: tuple[str, str]) -> float:
    names = [str(name) for name in node["group"].values]
    first, second = (names.index(group) for group in groups)
    products = np.asarray(node["inner_product"].values, dtype=np.float64)
    length = np.sqrt(products[:, first, first] * products[:, second, second])
    with np.errstate(divide="ignore", invalid="ignore"):
        cosines = products[:, first, second] / length
    return float(np.nanmedian(cosines)) if np.isfinite(cosines).any() else float("nan")


def _is_matrix(node: Any) -> bool:
    rows, *columns = node.attrs["shape"] or (1,)
    return min(rows, math.prod(columns)) > 1


def _ratio(pair: np.ndarray) -> np.ndarray:
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(pair[0] > 0, pair[1] / pair[0], np.nan)
