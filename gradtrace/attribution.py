"""Where a fall in the rank of a gradient comes from: its activations, its adjoints, both, or neither.

*Source*: G = A^T D, so rank G <= min(rank A, rank D), arXiv:2402.06751. In numpy alone, of what a run has stored.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from gradtrace.errors import SelectionError, nearest
from gradtrace.store.rows import KINDS
from gradtrace.store.schema import metric_variable

if TYPE_CHECKING:
    from gradtrace.store.reading.reader import Run

EXACT = "numerical_rank"  # the metric for which the inequality holds
HALF = 0.5  # so much of the fall has to be explained
WORDS = {"activation": "activations", "adjoint": "adjoints"}


@dataclass(frozen=True)
class Attribution:
    """What became of a rank between two steps, and what it comes from.

    first, last: steps, of the largest fall there was. values: kind -> the metric at both; NaN where there is none.
    shares: kind -> how much of the fall it explains, from 0 to 1. cause: `activation`, `adjoint`, `both`, `neither`, or
    `no fall`. `sentence` says all of it.
    """

    parameter: str
    group: str
    metric: str
    first: int
    last: int
    values: Mapping[str, tuple[float, float]]
    shares: Mapping[str, float]
    cause: str
    sentence: str

    def __str__(self) -> str:
        return self.sentence


def attribution(
    run: Run, parameter: str, *, group: str = "all", metric: str = "effective_rank", probe: str | None = None,
    least: float = 0.2,
) -> Attribution:  # fmt: skip
    """What the largest fall of a parameter's gradient in a run comes from: see `attribution_of`.

    Raises SelectionError where the parameter, the group or the metric is not in the run.
    """
    stream = run.stream(probe)
    if group not in stream.groups:
        raise SelectionError(f"There is no group {group!r} in {stream.name!r}. {nearest(group, stream.groups)}")
    place, known = stream.groups.index(group), stream.variables(parameter)
    series = {kind: np.full(len(stream.steps), np.nan) for kind in KINDS}
    for kind in KINDS:
        variable = metric_variable(kind, metric)
        if variable in known or kind == "gradient":
            series[kind] = stream.read(parameter, variable)[:, place].astype(np.float64)
    return attribution_of(stream.steps, series, metric=metric, parameter=parameter, group=group, least=least)


def attribution_of(
    steps: np.ndarray, series: Mapping[str, np.ndarray], *, metric: str, parameter: str, group: str = "all",
    least: float = 0.2,
) -> Attribution:  # fmt: skip
    """What the largest fall of a gradient's rank comes from, relative to what it was; falls below `least` are none.

    series: kind -> the metric in each step, NaN where it was not measured. A running median over a twentieth of the
    steps is taken of each. A kind explains, of `numerical_rank`, what its rank at the end forbids the gradient to have
    kept; of other metrics, by how much it fell itself, in logarithms. It is a cause if that is half or more.
    """
    there = np.isfinite(series["gradient"])
    if not there.any():
        raise SelectionError(f"There is no {metric} of the gradient of {parameter!r} for the group {group!r}.")
    smooth = {kind: _smooth(values[there]) for kind, values in series.items()}
    first, last = _fall(smooth["gradient"])
    values = {kind: (float(of[first]), float(of[last])) for kind, of in smooth.items()}
    before, after = values["gradient"]
    fell = after < (1 - least) * before
    shares = {kind: _share(metric, values["gradient"], values[kind]) if fell else 0.0 for kind in WORDS}
    causes = [kind for kind, share in shares.items() if share >= HALF]
    cause = "no fall" if not fell else "both" if len(causes) == 2 else causes[0] if causes else "neither"
    ends = int(steps[there][first]), int(steps[there][last])
    sentence = _sentence(f"{metric} of the gradient of {parameter}", ends, values, cause, metric)
    return Attribution(parameter, group, metric, *ends, values, shares, cause, sentence)


def _smooth(values: np.ndarray) -> np.ndarray:
    half = len(values) // 40
    windows = (values[max(0, at - half) : at + half + 1] for at in range(len(values)))
    return np.array([np.median(seen) if (seen := w[np.isfinite(w)]).size else np.nan for w in windows])


def _fall(values: np.ndarray) -> tuple[int, int]:
    """From where to where the values fell most, relative to what they were."""
    most = np.maximum.accumulate(values)
    left = np.divide(values, most, out=np.ones_like(values), where=most > 0)
    last = int(np.argmin(left))
    return int(np.argmax(values[: last + 1])), last


def _share(metric: str, gradient: tuple[float, float], kind: tuple[float, float]) -> float:
    """How much of the gradient's fall a kind explains; 0 where it is not known."""
    if not all(map(math.isfinite, kind)):
        return 0.0
    (before, after), (start, end) = gradient, kind
    if metric == EXACT:
        share = (before - end) / (before - after)
    elif min(after, end, start) <= 0:
        share = float(end <= 0 < start)
    else:
        share = math.log(start / end) / math.log(before / after)
    return min(max(share, 0.0), 1.0)


def _sentence(
    what: str, steps: tuple[int, int], values: Mapping[str, tuple[float, float]], cause: str, metric: str
) -> str:
    if cause == "no fall":
        return f"The {what} did not fall by much: at most from {_to(values['gradient'], steps)}."
    went = {kind: f"that of its {word} went from {_to(values[kind])}" for kind, word in WORDS.items()}
    fell = f"The {what} fell from {_to(values['gradient'], steps)}"
    told = {kind: text for kind, text in went.items() if math.isfinite(sum(values[kind]))}
    also = "; ".join(told.values()) or "nothing else was recorded"
    if cause == "neither":
        why = (
            "Neither explains it: both have their directions still, and rows of theirs have come to cancel or to align."
        )
    else:
        both = " and ".join(word for kind, word in WORDS.items() if cause in (kind, "both"))
        bound = ", whose rank it cannot exceed" if metric == EXACT else ""
        why = f"It comes from its {both}{bound}: {_where(cause)}."
    return f"{fell}; {also}. {why}"


def _where(cause: str) -> str:
    before, after = "look at the data and the layers before it", "look at the loss and the layers after it"
    return {"activation": before, "adjoint": after, "both": "look on both sides of it"}[cause]


def _to(values: tuple[float, float], steps: tuple[int, int] | None = None) -> str:
    first, last = (f" (step {step})" if steps else "" for step in steps or (0, 0))
    return f"{values[0]:.3g}{first} to {values[1]:.3g}{last}"
