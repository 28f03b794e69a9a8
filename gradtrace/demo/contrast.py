"""How far apart two groups' gradients are, parameter by parameter; numpy over the reader's tree."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from gradtrace.metrics import METRICS

LEADING = 8  # singular values that count towards the gap
NOISE = 1e-6  # of the largest singular value: what lies below is float32 rounding


@dataclass(frozen=True)
class Contrast:
    """Two groups of one grouping, seen in one parameter's gradient: ratios (steps,) say second group over first.

    All are of each group's own *mean* gradient. ratio: of the LEADING singular values, their geometric mean.
    top_ratio: of the largest one. rank_ratio: of the effective ranks. gap: how far the leading singular values are
    apart, in doublings: the root mean square over them of the median (over steps) log2 ratio. cosine: median over
    steps, of the angle between the two gradients.
    """

    parameter: str
    groups: tuple[str, str]
    ratio: np.ndarray
    top_ratio: np.ndarray
    rank_ratio: np.ndarray
    gap: float
    cosine: float


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
    first, second = (mean_spectra(node, group) for group in groups)
    doublings = _doublings(first[:, :LEADING], second[:, :LEADING])
    ranks = [METRICS["effective_rank"](each)[:, None] for each in (first, second)]
    return Contrast(
        parameter=parameter,
        groups=groups,
        ratio=2 ** _over_numbers(np.mean, doublings, axis=1),
        top_ratio=2 ** doublings[:, 0],
        rank_ratio=2 ** _doublings(*ranks)[:, 0],
        gap=_gap(doublings),
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


def _gap(doublings: np.ndarray) -> float:
    typical = _over_numbers(np.median, doublings, axis=0)
    seen = typical[np.isfinite(typical)]
    return float(np.sqrt(np.mean(seen**2))) if seen.size else float("nan")


def _doublings(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """log2(second / first); NaN where a group is absent, or where either is rounding beside its largest value."""
    counted = (first > NOISE * first[:, :1]) & (second > NOISE * second[:, :1])
    return np.log2(np.divide(second, first, out=np.full_like(first, np.nan), where=counted))


def _over_numbers(summary: Callable[[np.ndarray], float], values: np.ndarray, *, axis: int) -> np.ndarray:
    """The summary of what is a number along an axis; NaN where nothing is."""
    rows = values if axis else values.T
    return np.array([summary(seen) if (seen := row[np.isfinite(row)]).size else np.nan for row in rows])
