"""Conditions to watch a training for: a rank that collapses, a spectrum that explodes, groups that part, NaN.

Each remembers earlier steps, per parameter, kind and group, and tells of an onset once: again only after it was over.
In numpy alone. `recorder.watch` says who is called.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator, Sequence
from statistics import median

import numpy as np

from gradtrace.errors import SelectionError, nearest
from gradtrace.metrics import stored
from gradtrace.onset import ALL, Condition, Event, Reading, Watch, chosen
from gradtrace.scale import own_scale
from gradtrace.store.rows import ParameterRow, Status, StepRow

__all__ = ["Collapse", "Condition", "Divergence", "Event", "Explosion", "NotFinite", "Reading", "Watch", "mean_sigma1"]

MARGIN = 1.1  # how far back behind its threshold a value has to be before it can be told of again


class Collapse(Watch):
    """A rank that falls below `fraction` of the most that it was so far.

    metric: any that is stored, such as numerical_rank. A group's rank is bounded by its rows: watch groups that have
    about equally many samples in every step.
    """

    what = "collapse"

    def __init__(
        self, fraction: float = 0.5, *, metric: str = "effective_rank", parameters: str | Sequence[str] | None = None,
        kinds: str | Sequence[str] = "gradient", groups: str | Sequence[str] = ALL, steps: int = 3,
    ) -> None:  # fmt: skip
        super().__init__(parameters, kinds, groups, steps)
        if not 0 < fraction < 1:
            raise SelectionError(f"fraction={fraction} is of the running maximum, and must lie between 0 and 1.")
        if metric not in stored():
            raise SelectionError(f"The metric {metric!r} is not recorded. {nearest(metric, stored())}")
        self._fraction, self._metric = fraction, metric
        self._most: dict[tuple[str, str, str], float] = {}

    def readings(self, row: StepRow) -> Iterator[Reading]:
        for parameter, measured, kind, place in self._places(row):
            known, group = measured.metrics.get(kind, {}).get(self._metric), row.groups[place]
            value = math.nan if known is None else float(known[place])
            if measured.status[kind][place] != Status.MEASURED or math.isnan(value):
                continue
            most = self._most[parameter, kind, group] = max(value, self._most.get((parameter, kind, group), value))
            threshold = self._fraction * most
            why = f"has {self._metric} {value:.4g}, below {self._fraction:g} of its maximum {most:.4g}"
            yield Reading(parameter, kind, group, value, threshold, value < threshold, value > MARGIN * threshold, why)


class Explosion(Watch):
    """A largest singular value above `times` its median over the last `window` recorded steps; not before `least`.

    On the group's mean scale: what a group of another size does not change. Steps in which it is zero are left out.
    """

    what = "explosion"

    def __init__(
        self, times: float = 10.0, *, window: int = 50, least: int = 5, parameters: str | Sequence[str] | None = None,
        kinds: str | Sequence[str] = "gradient", groups: str | Sequence[str] = ALL, steps: int = 1,
    ) -> None:  # fmt: skip
        super().__init__(parameters, kinds, groups, steps)
        if times <= 1 or not 1 <= least <= window:
            raise SelectionError(f"times={times} must be above 1, and least={least} from 1 to window={window}.")
        self._times, self._window, self._least = times, window, least
        self._past: dict[tuple[str, str, str], deque[float]] = {}

    def readings(self, row: StepRow) -> Iterator[Reading]:
        for parameter, measured, kind, place in self._places(row):
            value, group = mean_sigma1(row, measured, kind, place), row.groups[place]
            past = self._past.setdefault((parameter, kind, group), deque(maxlen=self._window))
            if not value > 0:
                continue
            if len(past) >= self._least:
                usual = median(past)
                threshold = self._times * usual
                why = f"has a largest singular value of {value:.4g}, {value / usual:.4g} times its median {usual:.4g}"
                yield Reading(
                    parameter, kind, group, value, threshold, value > threshold, value < threshold / MARGIN, why
                )
            past.append(value)


class Divergence(Watch):
    """Gradients of two groups that differ: by size, or by direction, in `steps` recorded steps in a row.

    ratio: of their largest singular values on the groups' mean scale, the larger one by the smaller. distance: 1 less
    their cosine, from 0 (the same direction) to 2. One of the two.
    """

    what = "divergence"

    def __init__(
        self, first: str, second: str, *, ratio: float | None = None, distance: float | None = None,
        parameters: str | Sequence[str] | None = None, steps: int = 5,
    ) -> None:  # fmt: skip
        super().__init__(parameters, "gradient", (first, second), steps)
        if (ratio is None) == (distance is None):
            raise SelectionError("Give a ratio=, such as 3, or a distance=, such as 1, and one watch for each.")
        self._pair, self._by_size = (first, second), distance is None
        self._threshold = float(ratio if ratio is not None else distance or 0)

    def readings(self, row: StepRow) -> Iterator[Reading]:
        if not set(self._pair) <= set(row.groups):
            return
        places = [row.groups.index(group) for group in self._pair]
        for parameter in chosen(self._parameters, tuple(row.parameters)):
            measured, threshold = row.parameters[parameter], self._threshold
            value = self._ratio(row, measured, places) if self._by_size else self._distance(measured, places)
            if not math.isnan(value):
                which = "differ in size by a factor of" if self._by_size else "have 1 - cosine ="
                why = f"is not the same for both: they {which} {value:.4g}, above {threshold:g}"
                pair = " / ".join(self._pair)
                beyond, back = value > threshold, value < threshold / MARGIN
                yield Reading(parameter, "gradient", pair, value, threshold, beyond, back, why)

    def _ratio(self, row: StepRow, measured: ParameterRow, places: Sequence[int]) -> float:
        low, high = sorted(mean_sigma1(row, measured, "gradient", place) for place in places)
        return math.nan if math.isnan(low + high) or high == 0 else high / low if low > 0 else math.inf

    def _distance(self, measured: ParameterRow, places: Sequence[int]) -> float:
        inner = np.asarray(measured.inner_product, dtype=np.float64)[np.ix_(places, places)]
        norms = math.sqrt(inner[0, 0]) * math.sqrt(inner[1, 1])
        return float(1 - inner[0, 1] / norms) if norms > 0 else math.nan


class NotFinite(Watch):
    """NaN or infinity, in the gradient unless other kinds are named."""

    what = "not finite"

    def __init__(
        self, *, parameters: str | Sequence[str] | None = None, kinds: str | Sequence[str] = "gradient",
        groups: str | Sequence[str] = ALL, steps: int = 1,
    ) -> None:  # fmt: skip
        super().__init__(parameters, kinds, groups, steps)

    def readings(self, row: StepRow) -> Iterator[Reading]:
        for parameter, measured, kind, place in self._places(row):
            code, why = measured.status[kind][place], "is not finite"
            if code in (Status.MEASURED, Status.NOT_FINITE):
                bad = bool(code == Status.NOT_FINITE)
                yield Reading(parameter, kind, row.groups[place], math.nan, math.nan, bad, not bad, why)


def mean_sigma1(row: StepRow, measured: ParameterRow, kind: str, group: int) -> float:
    """The largest singular value of the group by itself, see `gradtrace.scale.own_scale`; or NaN."""
    own, sigma = int(row.n_samples[group]), measured.spectra.get(kind)
    if measured.status[kind][group] != Status.MEASURED or own == 0 or sigma is None or sigma.shape[1] == 0:
        return math.nan
    every = int(row.n_samples[row.groups.index(ALL)]) if ALL in row.groups else own
    return float(sigma[group, 0] * own_scale(kind, own, every))
