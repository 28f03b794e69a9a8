"""What the demo found, in a table and in sentences: description only, nothing is tested."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from gradtrace.demo.contrast import LEADING, Contrast, widest

if TYPE_CHECKING:
    from gradtrace.demo.run import Outcome

Row = tuple[str, ...]
TRAINED: Row = ("network", "weights", "steps", "loss, first to last epoch", "held-out variance explained")
HEADER: Row = ("parameter", "gap", "size", "rank", "cosine")
SHOWN = 3  # parameters per network in the table


def label(group: str) -> str:
    """`gw` from `cohort=gw`."""
    return group.partition("=")[2]


def median(values: np.ndarray) -> float:
    """Median of what is a number."""
    seen = values[np.isfinite(values)]
    return float(np.median(seen)) if seen.size else float("nan")


def table(found: Mapping[str, Mapping[str, Contrast]]) -> list[Row]:
    """The SHOWN matrices of one network in which the first grouping's groups part most, each with its yardstick.

    A cell reads `1.80 | 1.02`: between the groups of the first grouping, and between those of the second.
    """
    (_, first), (_, second) = found.items()
    return [_row(one, second[one.parameter]) for one in widest(first)[:SHOWN]]


def _row(one: Contrast, other: Contrast) -> Row:
    pairs = (
        (one.gap, other.gap),
        (median(one.ratio), median(other.ratio)),
        (median(one.rank_ratio), median(other.rank_ratio)),
        (one.cosine, other.cosine),
    )
    return (one.parameter, *(f"{left:.2f} | {right:.2f}" for left, right in pairs))


def legend(found: Mapping[str, Mapping[str, Contrast]]) -> str:
    """How to read the table."""
    (first, one), (second, other) = ((name, next(iter(each.values()))) for name, each in found.items())
    (a, b), (c, d) = map(label, one.groups), map(label, other.groups)
    return (
        f"Left of each bar {first}: {b} over {a}. Right of it {second}: {d} over {c}, the same samples split another "
        "way, as a yardstick. Medians over all steps, of each group's own mean gradient. gap: how far the "
        f"{LEADING} leading singular values are apart, in doublings (root mean square). size: their ratio (geometric "
        "mean). rank: the ratio of the effective ranks. cosine: between the two gradients. Shown are, per network, the "
        f"{SHOWN} matrices in which the gap by {first} is widest."
    )


def describe(network: str, found: Mapping[str, Mapping[str, Contrast]], held: Contrast) -> str:
    """A paragraph on where, and how steadily, the groups' spectra part in one network.

    held: the same groups among the held-out people, in the parameter of the widest gap.
    """
    (first, contrasts), (second, yardsticks) = found.items()
    top = widest(contrasts)[0]
    beside = yardsticks[top.parameter]
    wider = sum(one.gap > yardsticks[name].gap for name, one in contrasts.items())
    return " ".join(
        (
            f"{network}: by {first}, the spectra part most in {top.parameter}.",
            _larger(top),
            _course(top),
            _elsewhere(top, held),
            f"Split by {second}, the same samples give {_plain(beside)}.",
            f"The gradients of the groups have cosine {top.cosine:.2f} by {first}, {beside.cosine:.2f} by {second}.",
            f"The gap by {first} is the wider one in {wider} of {len(contrasts)} matrices.",
        )
    )


def closing(caveat: str, *, matrices: int, grouping: str) -> str:
    """What the numbers do not say."""
    return (
        "Description, not evidence: no test was made, one seed was run, and the named parameters were picked because "
        f"the gap by {grouping} is widest there among {matrices} matrices. {caveat}"
    )


def _larger(one: Contrast) -> str:
    less, more = _ordered(one)
    return (
        f"The {LEADING} leading singular values of {more}'s mean gradient are {_factor(one.ratio):.2f} times {less}'s "
        f"(geometric mean, median over the steps; larger in {_share(one):.0%} of them), the largest alone "
        f"{median(_towards_more(one, one.top_ratio)):.2f} times; its effective rank is "
        f"{median(_towards_more(one, one.rank_ratio)):.2f} times {less}'s."
    )


def _towards_more(one: Contrast, ratio: np.ndarray) -> np.ndarray:
    """A ratio of the group with the larger singular values over the other one."""
    return ratio if median(one.ratio) >= 1 else 1 / ratio


def _course(one: Contrast) -> str:
    """Early against late: the first and the last third of the steps."""
    third = max(1, len(one.ratio) // 3)
    ratio = _towards_more(one, one.ratio)
    early, late = median(ratio[:third]), median(ratio[-third:])
    if late < 1:
        verb = "turns round"
    else:
        change = np.log2(late / early)
        verb = "hardly changes" if abs(change) < 0.1 else "grows" if change > 0 else "shrinks"
    return f"Their ratio {verb} from the first third of training ({early:.2f}) to the last ({late:.2f})."


def _elsewhere(one: Contrast, held: Contrast) -> str:
    ratio = median(_towards_more(one, held.ratio))
    turned = ", the other way round" if ratio < 1 else ""
    return f"Among the held-out people, at constant weights after each epoch, it is {ratio:.2f}{turned}."


def _plain(one: Contrast) -> str:
    less, more = _ordered(one)
    return f"{_factor(one.ratio):.2f} times ({more} over {less}; larger in {_share(one):.0%} of the steps)"


def _ordered(one: Contrast) -> tuple[str, str]:
    """Labels of the group with the smaller, then of that with the larger singular values."""
    a, b = map(label, one.groups)
    return (a, b) if median(one.ratio) >= 1 else (b, a)


def _factor(ratio: np.ndarray) -> float:
    return float(max(median(ratio), 1 / median(ratio)))


def _share(one: Contrast) -> float:
    """Share of the steps in which the group that is larger in the median is the larger one."""
    seen = one.ratio[np.isfinite(one.ratio)]
    above = float(np.mean(seen > 1)) if seen.size else float("nan")
    return above if median(one.ratio) >= 1 else 1 - above


def trained(outcomes: Sequence[Outcome]) -> list[Row]:
    """How each training went: the rows of TRAINED."""
    return [
        (
            one.name,
            f"{one.weights:,}",
            str(one.steps),
            f"{one.losses[0]:.3f} to {one.losses[1]:.3f}",
            ", ".join(f"{cohort} {share:.0%}" for cohort, share in one.explained.items()),
        )
        for one in outcomes
    ]
