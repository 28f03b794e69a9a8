"""What a watch is: a condition on recorded rows, with memory of earlier ones, that tells of each onset once."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar, Protocol

from gradtrace.errors import SelectionError, nearest
from gradtrace.store.patterns import matching
from gradtrace.store.rows import ParameterRow, StepRow

ALL = "all"


@dataclass(frozen=True)
class Event:
    """The onset of a condition. `sentence` says all of it, and is what `str` gives.

    what: the condition's name. group: of a divergence both, as `first / second`. value, threshold: of what was watched;
    NaN where there is none.
    """

    step: int
    parameter: str
    kind: str
    group: str
    what: str
    value: float
    threshold: float
    sentence: str

    def __str__(self) -> str:
        return self.sentence


class Condition(Protocol):
    """What can be watched: it is shown every recorded row, in order, and gives what is to be told of it."""

    def events(self, row: StepRow) -> Iterable[Event]: ...


@dataclass(frozen=True)
class Reading:
    """One value in one step. beyond: it is as it should not be; back: it is well away from that. why: in words."""

    parameter: str
    kind: str
    group: str
    value: float
    threshold: float
    beyond: bool
    back: bool
    why: str


@dataclass
class _Series:
    """What is known of one parameter, kind and group: readings in a row that were beyond, and whether that was told."""

    beyond: int = 0
    told: bool = False

    def begins(self, reading: Reading, steps: int) -> bool:
        """Whether this reading is the onset."""
        if self.told:
            self.told = not reading.back
            return False
        self.beyond = self.beyond + 1 if reading.beyond else 0
        if self.beyond < steps:
            return False
        self.beyond, self.told = 0, True
        return True


class Watch(ABC):
    """A condition that holds when readings were beyond a threshold in `steps` recorded steps in a row.

    parameters, groups: names, globs, or regular expressions after `re:`; None means all parameters. A watch belongs to
    one recorder, whose steps it remembers.
    """

    what: ClassVar[str]

    def __init__(
        self,
        parameters: str | Sequence[str] | None,
        kinds: str | Sequence[str],
        groups: str | Sequence[str],
        steps: int,
    ) -> None:
        if steps < 1:
            raise SelectionError(f"steps={steps} counts recorded steps in a row, and must be 1 or more.")
        self._parameters, self._kinds, self._groups = several(parameters or ()), several(kinds), several(groups)
        self._steps = steps
        self._series: dict[tuple[str, str, str], _Series] = {}

    def check(self, parameters: Sequence[str], kinds: Sequence[str]) -> None:
        """None, or a SelectionError where parameters or kinds are named that are not recorded."""
        matching("parameter", self._parameters, parameters)
        for kind in self._kinds:
            if kind not in kinds:
                raise SelectionError(f"This run does not record the kind {kind!r}. {nearest(kind, kinds)}")

    def events(self, row: StepRow) -> Iterator[Event]:
        """What begins with this row."""
        for reading in self.readings(row):
            series = self._series.setdefault((reading.parameter, reading.kind, reading.group), _Series())
            if series.begins(reading, self._steps):
                yield self._event(row.step, reading)

    @abstractmethod
    def readings(self, row: StepRow) -> Iterator[Reading]:
        """The values of a row that there are."""

    def _event(self, step: int, reading: Reading) -> Event:
        of_group = "" if reading.group == ALL else f" ({reading.group})"
        lasting = f", for {self._steps} recorded steps" if self._steps > 1 else ""
        return Event(
            step=step,
            parameter=reading.parameter,
            kind=reading.kind,
            group=reading.group,
            what=self.what,
            value=reading.value,
            threshold=reading.threshold,
            sentence=f"Step {step}: the {reading.kind} of {reading.parameter}{of_group} {reading.why}{lasting}.",
        )

    def _places(self, row: StepRow) -> Iterator[tuple[str, ParameterRow, str, int]]:
        """Parameter, what was measured of it, kind, and the place of a group."""
        groups = [row.groups.index(name) for name in chosen(self._groups, row.groups)]
        for parameter in chosen(self._parameters, tuple(row.parameters)):
            measured = row.parameters[parameter]
            for kind in self._kinds:
                if kind in measured.status:
                    yield from ((parameter, measured, kind, group) for group in groups)


def several(names: str | Sequence[str]) -> tuple[str, ...]:
    """One name or several, as several."""
    return (names,) if isinstance(names, str) else tuple(names)


@lru_cache(maxsize=64)
def chosen(patterns: tuple[str, ...], names: tuple[str, ...]) -> tuple[str, ...]:
    """The names that the patterns match; what is not there may come yet."""
    return matching("name", patterns, names, patient=True)
