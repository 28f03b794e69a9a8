"""How often to record: as a budget allows, whatever else the training does, and fixed once chosen. On its own clock."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gradtrace.cadence import PROBING, SAFETY, STEADY, WARM_UP, Cadence, checked_cadence
from gradtrace.errors import CaptureError

CALIBRATED = 1 + WARM_UP + 3 + 4 + 3 + 4 + 3 + 4 + 3  # step 0, steps to warm up, recorded steps with 2 or 3 after each


@dataclass
class Training:
    """A training whose steps take `plain` seconds; recording adds `extra`, probing owners more, and `later` afterwards.

    pause(step): seconds that the user spends between this step and the next. seen: the share that tracing's clocks see.
    """

    plain: float = 1.0
    extra: float = 0.5
    probing: float = 4.0
    later: float = 0.0
    seen: float = 0.8
    pause: Callable[[int], float] = lambda step: 0.0
    fails: Callable[[int], bool] = lambda step: False
    now: float = 100.0
    added: float = 0.0  # seconds that tracing took so far
    plainly: float = 0.0  # seconds that the steps so far would have taken without it
    recorded: list[int] = field(default_factory=list)

    def clock(self) -> float:
        return self.now

    def run(self, cadence: Cadence, steps: int, *, begin: int = 0) -> Iterator[int]:
        """Takes the steps; yields the number of each when it is over."""
        for step in range(begin, begin + steps):
            recorded = cadence.begin(step)
            behind = self.later if self.recorded and self.recorded[-1] == step - 1 else 0.0
            cost = behind
            if recorded:
                own = self.extra + self.probing * (len(self.recorded) < PROBING)
                self.recorded.append(step)
                cost += own
            self.now += self.plain + cost
            if recorded and not self.fails(step):
                cadence.traced(self.seen * own)
            self.now += self.pause(step)
            self.added += cost
            self.plainly += self.plain
            yield step

    def calibrated(self, budget: float) -> Cadence:
        cadence = Cadence(budget=budget, clock=self.clock)
        for step in self.run(cadence, 500):
            if not cadence.calibrating:
                self.last = step
                return cadence
        raise AssertionError("the calibration did not end")


def test_every_takes_the_steps_that_it_divides() -> None:
    cadence = Cadence(every=3)
    assert [step for step in range(10) if cadence.begin(step)] == [0, 3, 6, 9]
    assert not cadence.calibrating
    assert cadence.attrs() == {"every": 3}


def test_a_calibration_records_the_first_step_then_some_with_pauses_between() -> None:
    training = Training()
    cadence = training.calibrated(0.05)
    assert training.recorded == [0, 7, 10, 14, 17, 21, 24, 28]
    assert len(training.recorded) == PROBING + STEADY
    assert cadence.calibration is not None
    assert cadence.calibration.steps == CALIBRATED == 31


@pytest.mark.parametrize(("budget", "every"), [(0.05, 12), (0.5, 2), (1.0, 1), (0.01, 60)])
def test_the_cadence_is_what_a_recorded_step_adds_over_what_the_budget_allows(budget: float, every: int) -> None:
    cadence = Training(plain=1.0, extra=0.5).calibrated(budget)
    assert cadence.calibration is not None
    assert (cadence.calibration.plain, cadence.calibration.extra) == (1.0, 0.5)
    assert cadence.every == every == math.ceil(SAFETY * 0.5 / budget)


def test_first_steps_that_probe_are_paid_for_and_do_not_set_the_cadence() -> None:
    cheap, dear = Training(probing=0.0), Training(probing=50.0)
    first, second = cheap.calibrated(0.05), dear.calibrated(0.05)
    assert first.every == second.every
    assert first.calibration is not None
    assert second.calibration is not None
    assert first.calibration.spent == pytest.approx((PROBING + STEADY) * 0.5)
    assert second.calibration.spent == pytest.approx(0.8 * PROBING * 50.0 + (PROBING + STEADY) * 0.5)
    assert second.calibration.first > first.calibration.first


def test_what_is_put_off_to_the_next_step_counts() -> None:
    cadence = Training(extra=0.5, later=0.25).calibrated(0.05)
    assert cadence.calibration is not None
    assert (cadence.calibration.plain, cadence.calibration.extra) == (1.0, 0.75)


def test_what_tracing_itself_counts_is_the_least_that_is_believed() -> None:
    """Laps that shrink while the calibration goes on must not make tracing look free."""
    training = Training(plain=1.0, extra=0.5, seen=2.0)
    cadence = training.calibrated(0.05)
    assert cadence.calibration is not None
    assert cadence.calibration.extra == 1.0


@pytest.mark.parametrize("epoch", [4, 5, 6, 7, 10, 25])
def test_a_long_pause_at_the_end_of_every_epoch_changes_nothing(epoch: int) -> None:
    """A validation, say: it would hide the cost of tracing, or be taken for it."""
    training = Training(pause=lambda step: 90.0 if step % epoch == epoch - 1 else 0.0)
    cadence = training.calibrated(0.05)
    assert cadence.calibration is not None
    assert (cadence.calibration.plain, cadence.calibration.extra) == (1.0, 0.5)


def test_a_clock_that_stood_still_or_jumped_is_one_long_lap() -> None:
    """A machine that slept through one step."""
    training = Training(pause=lambda step: 3e4 if step == 17 else 0.0)
    assert training.calibrated(0.05).every == 12


def test_time_of_a_probe_belongs_to_no_step() -> None:
    training = Training()
    cadence = Cadence(budget=0.05, clock=training.clock)
    with cadence.paused():  # before the first step: there is no lap yet
        training.now += 5.0
    for _ in training.run(cadence, 60):
        with cadence.paused():
            training.now += 7.0
    assert cadence.calibration is not None
    assert (cadence.calibration.plain, cadence.calibration.extra) == (1.0, 0.5)
    assert cadence.plain == 1.0


def test_a_pause_ends_with_an_exception_too() -> None:
    training = Training()
    cadence = Cadence(every=2, clock=training.clock)
    cadence.begin(0)
    with suppress(KeyError), cadence.paused():
        training.now += 9.0
        raise KeyError
    training.now += 2.0
    cadence.traced(1.0)
    cadence.begin(1)
    assert cadence.period == 2.0


def test_a_recorded_step_that_raises_is_paid_for_and_measured_anew() -> None:
    training = Training(fails=lambda step: step in (10, 17))
    cadence = training.calibrated(0.05)
    assert len(training.recorded) == PROBING + STEADY + 2
    assert cadence.calibration is not None
    assert cadence.calibration.recorded == PROBING + STEADY + 2
    assert cadence.every == 12


def test_nothing_is_recorded_until_the_calibration_is_paid_for() -> None:
    training = Training()
    cadence = training.calibrated(0.05)
    found = cadence.calibration
    assert found is not None
    list(training.run(cadence, found.first - training.last, begin=training.last + 1))
    assert training.recorded[-2:] == [28, found.first]
    assert found.first % found.every == 0
    assert found.first * 1.0 * 0.05 >= found.spent + SAFETY * found.extra
    assert found.first - (found.spent + SAFETY * found.extra) / 0.05 < found.every


def test_once_calibrated_the_clock_has_no_say() -> None:
    """A run can be repeated: with `every=` it records the same steps, and those of the calibration's time."""
    training = Training()
    cadence = training.calibrated(0.05)
    found = cadence.calibration
    training.plain, training.extra = 40.0, 0.001
    list(training.run(cadence, 2000, begin=training.last + 1))
    assert cadence.calibration is found
    again = Cadence(every=cadence.every or 0)
    assert found is not None
    expected = [step for step in range(training.last + 2001) if again.begin(step) and step >= found.first]
    assert training.recorded[8:] == expected


def test_a_run_that_is_too_short_has_no_cadence() -> None:
    training = Training()
    cadence = Cadence(budget=0.05, clock=training.clock)
    list(training.run(cadence, CALIBRATED))
    assert cadence.calibrating
    assert cadence.attrs() == {"every": None, "budget": 0.05}
    assert training.recorded[:2] == [0, 7]


def test_a_run_says_what_was_measured() -> None:
    attrs = Training(probing=0.0).calibrated(0.25).attrs()
    assert (attrs["every"], attrs["budget"]) == (3, 0.25)
    assert attrs["calibration"] == {
        "steps": 31,
        "recorded": 8,
        "plain_seconds": 1.0,
        "extra_seconds": 0.5,
        "fraction": pytest.approx(8 * 0.5 / 31),
        "safety": SAFETY,
        "first_step": 33,
    }


def test_plain_and_recorded_laps_are_known_with_every_too() -> None:
    training = Training(plain=2.0, extra=3.0, probing=0.0, later=0.5)
    cadence = Cadence(every=4, clock=training.clock)
    assert math.isnan(cadence.plain)
    assert math.isnan(cadence.period)
    list(training.run(cadence, 12))
    assert (cadence.plain, cadence.period) == (2.0, 5.0)


def test_without_unrecorded_steps_plain_is_unknown_and_next_to_recorded_ones_it_is_theirs() -> None:
    training = Training(later=0.5)
    always = Cadence(every=1, clock=training.clock)
    list(training.run(always, 5))
    assert math.isnan(always.plain)
    training = Training(later=0.5)
    alternating = Cadence(every=2, clock=training.clock)
    list(training.run(alternating, 9))
    assert alternating.plain == 1.5


def test_a_clock_that_does_not_move_is_no_failure() -> None:
    training = Training(plain=0.0, extra=0.0, probing=0.0)
    cadence = training.calibrated(0.05)
    assert cadence.every == 1
    assert all(math.isfinite(v) for v in cadence.attrs()["calibration"].values())


@given(
    budget=st.floats(0.005, 1.0),
    plain=st.floats(1e-3, 10.0),
    extra=st.floats(1e-3, 20.0),
    probing=st.floats(0.0, 100.0),
    later=st.floats(0.0, 5.0),
    epoch=st.integers(10, 60),
)
def test_from_the_first_regular_step_on_tracing_stays_below_the_budget(
    budget: float, plain: float, extra: float, probing: float, later: float, epoch: int
) -> None:
    pauses = dict.fromkeys(range(epoch - 1, 10_000, epoch), 20 * plain)
    training = Training(plain, extra, probing, later, seen=1.0, pause=lambda step: pauses.get(step, 0.0))
    cadence = training.calibrated(budget)
    assert cadence.calibration is not None
    assert cadence.every is not None
    first = cadence.calibration.first
    training.added, training.plainly = cadence.calibration.spent, first * plain  # jump: nothing is recorded in between
    for _ in training.run(cadence, min(3 * cadence.every, 500), begin=first):
        assert training.added <= budget * training.plainly * (1 + 1e-9)


@pytest.mark.parametrize("budget", [0, 0.0, -0.1, 1.01, math.nan, True, "0.05", [0.05]])
def test_a_budget_that_is_no_fraction_is_refused(budget: Any) -> None:
    with pytest.raises(CaptureError, match=r"budget=.*fraction"):
        checked_cadence(1, budget)


def test_every_and_a_budget_exclude_each_other() -> None:
    with pytest.raises(CaptureError, match=r"every=10 and budget=0\.05 were both given"):
        checked_cadence(10, 0.05)
    assert checked_cadence(1, 0.05).calibrating
    assert checked_cadence(1, 1).budget == 1.0
