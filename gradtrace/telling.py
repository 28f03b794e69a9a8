"""Who is told of what a recording's watches find, and when: callbacks are called by the training, at its next step."""

from __future__ import annotations

import functools
import warnings
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

from gradtrace.errors import GradtraceError, WatchWarning
from gradtrace.onset import Condition, Event, Watch
from gradtrace.store.rows import StepRow
from gradtrace.store.schema import MAIN_STREAM, probe_stream

Call = Callable[[Event], Any]


class Telling:
    """The watches of one recording.

    `look` may run on any thread, in the order of the rows; `tell` makes the calls that wait, on the thread that asks.
    What a condition or a call raises is raised there.
    """

    def __init__(self) -> None:
        self._watches: tuple[tuple[str, Condition, Call | None], ...] = ()
        self._waiting: deque[Callable[[], Any]] = deque()

    def add(
        self, condition: Condition, call: Call | None, probe: str | None, *, parameters: Sequence[str],
        kinds: Sequence[str],
    ) -> None:  # fmt: skip
        """Adds a watch over the training, or over a probe. parameters, kinds: what is recorded."""
        if isinstance(condition, type) or not callable(getattr(condition, "events", None)):
            raise GradtraceError(
                f"{condition!r} is no condition to watch for. Give one of gt.watch, such as gt.watch.Collapse(0.5), "
                "or an object with a method events(row) that gives gt.watch.Event objects."
            )
        if call is not None and not callable(call):
            raise GradtraceError(f"{call!r} cannot be called. Give a function of one gt.watch.Event, or None to warn.")
        if isinstance(condition, Watch):
            condition.check(parameters, kinds)
        stream = MAIN_STREAM if probe is None else probe_stream(probe)
        self._watches = (*self._watches, (stream, condition, call))

    def look(self, row: StepRow, stream: str = MAIN_STREAM) -> None:
        """Shows a row to the watches over its stream."""
        for over, condition, call in self._watches:
            if over != stream:
                continue
            try:
                events = list(condition.events(row))
            except Exception as error:  # not here: behind the training it would end the recording
                self._waiting.append(functools.partial(_fail, error, condition))
                continue
            if call is not None:
                self._waiting.extend(functools.partial(_call, call, event) for event in events)
            elif events:
                self._waiting.append(functools.partial(_warn, events))

    def tell(self) -> None:
        """Makes the calls that wait; those after one that raises go on waiting."""
        while self._waiting:
            self._waiting.popleft()()


def _call(call: Call, event: Event) -> None:
    try:
        call(event)
    except Exception as error:
        error.add_note(f"Raised by a callback of recorder.watch, called for: {event}")
        raise


def _fail(error: Exception, condition: Condition) -> None:
    error.add_note(f"Raised by the condition {condition!r} of recorder.watch.")
    raise error


def _warn(events: Sequence[Event]) -> None:
    """One warning for all that begins in a step: a model full of NaN has many parameters."""
    others = list(dict.fromkeys(event.parameter for event in events[1:]))
    listed = f"{', '.join(others[:3])}{', ...' if len(others) > 3 else ''}"
    more = f" The same of {len(others)} more: {listed}." if others else ""
    warnings.warn(f"{events[0]}{more}", WatchWarning, stacklevel=6)
