"""What must hold of numbers that were measured, whatever they are: each rule says where it is broken.

float32 keeps a number to 6e-8 of itself, and the formulas below multiply that by a few tens at most; hence CLOSE. Where
a spectrum is so small or so large that float32 leaves its normal range, only its order and its sign are looked at.
Nothing is asked of inner products of different groups but symmetry: rounding there is relative to the samples'
gradients, which are not stored and may cancel.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from gradtrace.metrics import WHOLE
from gradtrace.store.rows import Status
from gradtrace.store.schema import INNER_PRODUCT, METRICS, OWNER_RESIDUAL, RESIDUAL, STATUS

CLOSE = 1e-5
SMALL, LARGE = 1e-20, 1e30  # between them, a spectrum and its metrics have all the digits of float32
LARGEST_SQUARE = 1e19  # its square is still a float32


class Fault(NamedTuple):
    """A rule that is broken: of which array, and where: (rows, parameters) or (rows, parameters, groups)."""

    array: str
    what: str
    where: np.ndarray


@dataclass(frozen=True)
class Block:
    """What the arrays of a width class hold in some rows.

    spectra: kind -> (rows, parameters, groups, components). status: (rows, parameters, groups, kinds). metrics: those
    that are named, (rows, parameters, groups, kinds, metrics). n_samples: (rows, groups). widths, empty: of each
    parameter its number of components, and whether it has no elements. keep: components that are stored at most.
    """

    kinds: Sequence[str]
    spectra: Mapping[str, np.ndarray]
    status: np.ndarray
    metrics: np.ndarray | None
    named: Sequence[str]
    inner_product: np.ndarray
    residuals: Mapping[str, np.ndarray]
    n_samples: np.ndarray
    widths: np.ndarray
    empty: np.ndarray
    keep: int | None

    def metric(self, kind: int, name: str) -> np.ndarray | None:
        """(rows, parameters, groups), if it is there."""
        if self.metrics is None or name not in self.named:
            return None
        place = self.named.index(name)
        return self.metrics[..., kind, place].astype(np.float64) if place < self.metrics.shape[-1] else None

    def has_values(self, kind: int) -> np.ndarray:
        """Where something that was measured has singular values: (rows, parameters, groups).

        A parameter without elements has none, nor has a group without rows in an op, whose activations and adjoints are
        matrices of no rows. These show by having no metrics either; what is lost lacks one of the two.
        """
        filled = np.broadcast_to(~self.empty[:, None], self.status.shape[:-1])
        name, frobenius = self.kinds[kind], self.metric(kind, "frobenius")
        if name == "gradient" or frobenius is None or name not in self.spectra:
            return filled
        return filled & (~np.isnan(self.spectra[name]).all(axis=-1) | ~np.isnan(frobenius))


def some(where: np.ndarray) -> np.ndarray:
    """Whether anything is, along the last axis."""
    return np.asarray(where.any(axis=-1))


def faults(block: Block) -> Iterator[Fault]:
    """Every rule that is broken somewhere."""
    with np.errstate(all="ignore"):
        yield from _of_status(block)
        for place, kind in enumerate(block.kinds):
            measured = block.status[..., place] == Status.MEASURED
            there = measured & block.has_values(place)
            if kind in block.spectra:
                yield from _of_spectra(kind, block.spectra[kind], measured, there)
                yield from _beyond(kind, block.spectra[kind], block.widths)
            else:
                yield Fault(STATUS, f"the {kind} is said to be measured, and none is stored", there)
            yield from _of_metrics(place, measured, there, block)
        yield from _of_inner_products(block)
        for name in (RESIDUAL, OWNER_RESIDUAL):
            yield Fault(name, "it is negative", block.residuals[name] < 0)


def _of_status(block: Block) -> Iterator[Fault]:
    codes, present = block.status, block.n_samples[:, None, :, None] > 0
    yield Fault(STATUS, "it holds a code that there is not", some(codes >= len(Status.NAMES)))
    something = np.isin(codes, (Status.MEASURED, Status.NOT_FINITE, Status.NOT_CONVERGED))
    yield Fault(STATUS, "a group without samples is said to be measured", some(something & ~present))
    in_row = (codes != Status.GROUP_ABSENT).any(axis=(2, 3), keepdims=True)
    left_out = in_row & present & (codes == Status.GROUP_ABSENT)
    yield Fault(STATUS, "a group with samples is said to be absent", some(left_out))


def _of_spectra(kind: str, values: np.ndarray, measured: np.ndarray, filled: np.ndarray) -> Iterator[Fault]:
    there = ~np.isnan(values)
    first = there[..., 0] if values.shape[-1] else np.zeros(there.shape[:-1], bool)
    yield Fault(kind, "it is said to be measured, and there is no value", filled & ~first)
    yield Fault(kind, "there are values where it is not said to be measured", there.any(axis=-1) & ~measured)
    yield Fault(kind, "values are missing in between", some(there[..., 1:] & ~there[..., :-1]))
    yield Fault(kind, "singular values are negative", some(values < 0))
    yield Fault(kind, "singular values do not descend", some(values[..., 1:] > values[..., :-1]))


def _beyond(kind: str, values: np.ndarray, widths: np.ndarray) -> Iterator[Fault]:
    beyond = np.arange(values.shape[-1]) >= widths[:, None]
    yield Fault(kind, "there are values beyond the parameter's width", some(~np.isnan(values) & beyond[:, None, :]))


# ---------------------------------------------------------------------- metrics


def _of_metrics(place: int, measured: np.ndarray, filled: np.ndarray, block: Block) -> Iterator[Fault]:
    kind = block.kinds[place]
    found = {name: values for name in WHOLE if (values := block.metric(place, name)) is not None}
    for name, values in found.items():
        yield Fault(METRICS, f"the {name} of the measured {kind} is missing", filled & np.isnan(values))
        yield Fault(METRICS, f"there is a {name} of the {kind}, which was not measured", ~measured & ~np.isnan(values))
        yield Fault(METRICS, f"the {name} of the {kind} is negative", values < 0)
    if kind not in block.spectra or len(found) < len(WHOLE) or block.spectra[kind].shape[-1] == 0:
        return
    sigma = block.spectra[kind].astype(np.float64)
    first = sigma[..., 0]
    usual = measured & ~np.isnan(first) & (_is_usual(first) | _is_usual(found["frobenius"]))
    for name, wrong in _contradictions(sigma, found, block.keep):
        yield Fault(METRICS, f"the {name} of the {kind} contradicts its singular values", usual & wrong)


def _is_usual(size: np.ndarray) -> np.ndarray:
    return (size > SMALL) & (size < LARGE)


def _contradictions(
    sigma: np.ndarray, metrics: Mapping[str, np.ndarray], keep: int | None
) -> Iterator[tuple[str, np.ndarray]]:
    """Metric, and where it cannot be that of these singular values, the largest ones of a whole spectrum."""
    frobenius, nuclear, stable, effective, participation, rank, condition = (metrics[name] for name in WHOLE)
    known = np.nan_to_num(sigma)
    count, top = (~np.isnan(sigma)).sum(axis=-1), known[..., 0]
    last = np.take_along_axis(known, np.maximum(count - 1, 0)[..., None], axis=-1)[..., 0]
    whole = np.full(count.shape, keep is None) if keep is None else count < keep
    total, squares = known.sum(axis=-1), (known**2).sum(axis=-1)
    rest, rest_squares = nuclear - total, frobenius**2 - squares
    yield "frobenius", _differs(frobenius**2, squares, whole)
    yield (
        "frobenius",
        rest_squares > last * rest + CLOSE * frobenius**2,
    )  # what is not stored is no larger than the last
    yield "nuclear", _differs(nuclear, total, whole) | (nuclear < frobenius * (1 - CLOSE))
    yield "stable_rank", ~np.isclose(stable, (frobenius / top) ** 2, rtol=CLOSE)
    yield "effective_rank", effective < (nuclear / frobenius) ** 2 * (1 - CLOSE)  # Rényi's entropies decrease in order
    share = known / total[..., None]
    entropy = -np.where(share > 0, share * np.log(np.where(share > 0, share, 1)), 0).sum(axis=-1)
    yield "effective_rank", whole & ~np.isclose(effective, np.exp(entropy), rtol=CLOSE)
    bounds = (participation < stable * (1 - CLOSE)) | (participation > stable**2 * (1 + CLOSE))
    relative = known / top[..., None]
    exact = (relative**2).sum(axis=-1) ** 2 / (relative**4).sum(axis=-1)
    yield "participation_ratio", bounds | (whole & ~np.isclose(participation, exact, rtol=CLOSE))
    yield "numerical_rank", (rank != np.floor(rank)) | (whole & (rank > (known > 0).sum(axis=-1)))
    ratio = top / np.where(last > np.finfo(np.float32).tiny, last, np.inf)
    exactly = whole & (ratio > 0) & (ratio < 1e37) & ~np.isclose(condition, ratio, rtol=CLOSE)
    yield "condition", exactly | (condition < np.maximum(ratio, 1) * (1 - CLOSE))


def _differs(found: np.ndarray, known: np.ndarray, whole: np.ndarray) -> np.ndarray:
    """Where a sum is less than what of it is known, or, of a whole spectrum, is not that."""
    return np.where(whole, ~np.isclose(found, known, rtol=CLOSE), found < known * (1 - CLOSE))


# ---------------------------------------------------------------------- inner products


def _of_inner_products(block: Block) -> Iterator[Fault]:
    products = block.inner_product.astype(np.float64)
    there, size = ~np.isnan(products), np.nan_to_num(np.abs(products), posinf=0).max(axis=(2, 3), initial=0)
    mirrored = products.swapaxes(2, 3)
    apart = np.abs(products - mirrored) > CLOSE * size[..., None, None]
    lopsided = (apart & (products != mirrored)) | (there != there.swapaxes(2, 3))
    yield Fault(INNER_PRODUCT, "it is not symmetric", some(lopsided))
    if "gradient" not in block.kinds:
        return
    place = list(block.kinds).index("gradient")
    codes = block.status[..., place]
    nothing = np.isin(codes, (Status.GROUP_ABSENT, Status.KIND_ABSENT, Status.TOO_FEW))
    of_nothing = there & (nothing[..., :, None] | nothing[..., None, :])
    yield Fault(INNER_PRODUCT, "there is one of a group that was not measured", some(of_nothing))
    frobenius = block.metric(place, "frobenius")
    if frobenius is None:
        return
    usual = (codes == Status.MEASURED) & (frobenius < LARGEST_SQUARE) & ~block.empty[:, None]
    lacking = ~there & usual[..., :, None] & usual[..., None, :]
    yield Fault(INNER_PRODUCT, "it is missing between groups that were measured", some(lacking))
    own = np.einsum("rpgg->rpg", products)
    other = ~np.isclose(own, frobenius**2, rtol=CLOSE, atol=1e-44)
    yield Fault(INNER_PRODUCT, "a group's own is not its frobenius squared", usual & ~np.isnan(own) & other)
