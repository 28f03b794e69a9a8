"""Which steps are recorded: every so many, or as many as a budget pays for. Reads a clock; knows nothing of tensors.

A *lap* is the wall time from the beginning of a step to that of the next: data loading, optimizer and whatever else the
user does are in it. What a recorded step adds is its lap less the median lap of steps that are not recorded.
"""

from __future__ import annotations

import itertools
import math
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from numbers import Real
from statistics import median
from typing import Any

from gradtrace.errors import CaptureError

WARM_UP = 6  # steps not recorded after step 0: libraries load, kernels are chosen
PROBING = 3  # the first recorded steps, in which owners are probed: paid for, but no measure of the others
STEADY = 5  # recorded steps after them, whose median is
SAFETY = 1.2  # what a recorded step adds is taken to be this much more than was measured
RECENT = 32  # laps of unrecorded steps whose median is kept
LEAST = 1e-9  # seconds: the least that a step pays for, should the clock not move


@dataclass(frozen=True)
class Lap:
    """Seconds of one step. tracing: what tracing's own clocks counted in it; NaN where it was not recorded, or raised.

    settled: neither this step nor the one before it was recorded, so nothing that was put off is waited for.
    """

    seconds: float
    recorded: bool = False
    settled: bool = False
    tracing: float = math.nan

    @property
    def measured(self) -> bool:
        """Whether this is a recorded step that came to its end."""
        return not math.isnan(self.tracing)


@dataclass(frozen=True)
class Calibration:
    """What a calibration measured, in seconds of wall time, and the cadence that follows from it.

    plain: a step that is not recorded. extra: what recording adds to one. spent: by all `recorded` of the `steps`.
    """

    budget: float
    plain: float
    extra: float
    spent: float
    steps: int
    recorded: int

    @classmethod
    def of(cls, laps: Sequence[Lap], budget: float) -> Calibration:
        """The calibration by these laps. Medians: a pause between two steps changes nothing."""
        plain = median(lap.seconds for lap in laps if lap.settled)
        steady = [i for i, lap in enumerate(laps) if lap.measured][PROBING:]
        counted = median(laps[i].tracing for i in steady)
        at_once = median(laps[i].seconds for i in steady) - plain
        later = median(laps[i + 1].seconds for i in steady) - plain  # the next step waits for what was put off
        extra = max(at_once + max(later, 0.0), counted)
        recorded = [lap for lap in laps if lap.recorded]
        spent = sum(extra + (lap.tracing - counted if lap.measured else 0.0) for lap in recorded)
        return cls(budget, plain, extra, max(spent, 0.0), len(laps), len(recorded))

    @property
    def every(self) -> int:
        """Steps from one recorded step to the next."""
        return max(1, math.ceil(SAFETY * self.extra / self._paid_by_a_step))

    @property
    def first(self) -> int:
        """The step with which `every` begins: until then the budget pays for the calibration, and for this step."""
        paid = math.ceil((self.spent + SAFETY * self.extra) / self._paid_by_a_step)
        return math.ceil(max(paid, self.steps) / self.every) * self.every

    @property
    def _paid_by_a_step(self) -> float:
        return max(self.budget * self.plain, LEAST)

    def attrs(self) -> dict[str, Any]:
        """What a run says about it. fraction: of the training time of its steps, what recording some of them took."""
        return {
            "steps": self.steps,
            "recorded": self.recorded,
            "plain_seconds": self.plain,
            "extra_seconds": self.extra,
            "fraction": self.spent / max(self.steps * self.plain, LEAST),
            "safety": SAFETY,
            "first_step": self.first,
        }


class Stopwatch:
    """Measures laps, and keeps the last of those that were not recorded.

    period: seconds of the last lap that was measured and is over, NaN before.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._began: float | None = None
        self._recorded = self._settled = False
        self._tracing = math.nan
        self._plain: deque[float] = deque(maxlen=RECENT)  # settled ones
        self._following: deque[float] = deque(maxlen=RECENT)  # of steps after a recorded one
        self.period = math.nan

    def lap(self) -> Lap | None:
        """The lap that ends now; None at the first step. `start` begins the next, at the same moment."""
        now = self._clock()
        began, self._began = self._began, now
        if began is None:
            return None
        lap = Lap(now - began, self._recorded, self._settled, self._tracing)
        if lap.measured:
            self.period = lap.seconds
        elif not lap.recorded:
            (self._plain if lap.settled else self._following).append(lap.seconds)
        return lap

    def start(self, *, recorded: bool, after: Lap | None) -> None:
        """Says what the lap that began with the last call of `lap` is."""
        self._recorded, self._tracing = recorded, math.nan
        self._settled = not recorded and after is not None and not after.recorded

    def traced(self, seconds: float) -> None:
        """The recorded step of this lap came to its end; tracing's own clocks counted so many seconds."""
        self._tracing = seconds

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Time inside belongs to no lap."""
        stopped = self._clock()
        try:
            yield
        finally:
            if self._began is not None:
                self._began += self._clock() - stopped

    @property
    def plain(self) -> float:
        """The median lap, in seconds, of recent steps not recorded: settled ones if any, NaN if there were none."""
        recent = self._plain or self._following
        return median(recent) if recent else math.nan


class Cadence:
    """Decides, step by step, which are recorded; `begin` every step with it, in order from 0.

    every: steps from one recorded step to the next; None until a budget's calibration ends. calibration: its outcome.
    """

    def __init__(
        self, *, every: int = 1, budget: float | None = None, clock: Callable[[], float] = time.perf_counter
    ) -> None:
        self.budget = budget
        self.every = every if budget is None else None
        self.calibration: Calibration | None = None
        self._laps: list[Lap] = []
        self._first = 0
        self._watch = Stopwatch(clock)
        self.traced, self.paused = self._watch.traced, self._watch.paused

    def begin(self, step: int) -> bool:
        """Whether this step, which begins now, is recorded. Say `traced(seconds)` when a recorded one is over."""
        lap = self._watch.lap()
        if self.calibrating and lap is not None:
            self._laps.append(lap)
            self._conclude()
        due = self.is_due(step)
        self._watch.start(recorded=due, after=lap)
        return due

    def is_due(self, step: int) -> bool:
        """Whether this step is to be recorded, as far as is known now."""
        if self.every is None:
            return _unrecorded(self._laps) >= _wanted(self._laps)
        return step >= self._first and step % self.every == 0

    @property
    def calibrating(self) -> bool:
        """Whether laps are measured to choose a cadence."""
        return self.every is None

    @property
    def plain(self) -> float:
        """The median lap, in seconds, of recent steps that were not recorded; NaN if there were none."""
        return self._watch.plain

    @property
    def period(self) -> float:
        """Seconds of the last recorded step's lap, NaN at the first."""
        return self._watch.period

    def attrs(self) -> dict[str, Any]:
        """What a run says about its cadence."""
        if self.budget is None:
            return {"every": self.every}
        found = {} if self.calibration is None else {"calibration": self.calibration.attrs()}
        return {"every": self.every, "budget": self.budget, **found}

    def _conclude(self) -> None:
        """Ends the calibration once it has seen enough: the cadence is fixed from here."""
        enough = sum(lap.measured for lap in self._laps) >= PROBING + STEADY
        if enough and self.budget is not None and _unrecorded(self._laps) >= _wanted(self._laps):
            self.calibration = Calibration.of(self._laps, self.budget)
            self.every, self._first = self.calibration.every, self.calibration.first
            self._laps = []


def checked_cadence(every: int = 1, budget: float | None = None) -> Cadence:
    """The cadence that was asked for; a `CaptureError` where that cannot be."""
    if isinstance(every, bool) or not isinstance(every, int) or every < 1:
        raise CaptureError(f"every={every!r} must be a whole number of steps, 1 or more.")
    if budget is None:
        return Cadence(every=every)
    if isinstance(budget, bool) or not isinstance(budget, Real) or not 0 < budget <= 1:
        raise CaptureError(
            f"budget={budget!r} must be a fraction of the training time, above 0 and at most 1: 0.05 for 5 %."
        )
    if every != 1:
        raise CaptureError(
            f"every={every} and budget={budget!r} were both given, and each says how often to record. Give budget= to "
            "have a cadence chosen, or every= to set it, as when a run is repeated."
        )
    return Cadence(budget=float(budget))


def _unrecorded(laps: Sequence[Lap]) -> int:
    """How many steps have passed since the last recorded one."""
    return sum(1 for _ in itertools.takewhile(lambda lap: not lap.recorded, reversed(laps)))


def _wanted(laps: Iterable[Lap]) -> int:
    """How many steps a calibration passes over before it records the next.

    Two at least: the first may wait for what was put off, the second tells what a plain step takes. Two and three in
    turn, lest the same steps meet the pause at the end of every short epoch.
    """
    recorded = sum(lap.recorded for lap in laps)
    return (0, WARM_UP)[recorded] if recorded < 2 else 2 + recorded % 2
