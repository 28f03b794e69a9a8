"""Where a recording begins: anew, or where a run that is there already leaves off."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from gradtrace.cadence import Cadence, checked_cadence
from gradtrace.errors import StoreError
from gradtrace.store.writing.checks import stream_path
from gradtrace.store.writing.past import Past

GROUPINGS = "groupings"  # the attribute of a run that says how samples are grouped


class Continuation:
    """What a recording takes over from the run that it goes on with, if there is one.

    first_step: the number of its first step. changed: whether other groupings than before are fine.
    """

    def __init__(self, past: Past | None, resume: bool | int, *, changed: bool) -> None:
        self.first_step = int(resume)
        if resume is True or resume is False:
            self.first_step = past.next_step if past else 0
        self._run: dict[str, Any] = past.attributes["run"] if past else {}
        self._last = past.last_steps if past else {}
        self._groupings: Sequence[str] | None = self._run.get(GROUPINGS)
        self._changed = changed

    def cadence(self, asked: Cadence) -> Cadence:
        """The cadence that was asked for, or the one that the same budget chose before."""
        chosen = self._run.get("every")
        if asked.budget is None or chosen is None or self._run.get("budget") != asked.budget:
            return asked
        return checked_cadence(chosen)

    def has_probe(self, name: str, step: int) -> bool:
        """Whether the probe of this very step is there."""
        return self._last.get(stream_path(f"probe/{name}")) == step

    def regrouped(self, now: Sequence[str]) -> bool:
        """Whether a step has other groupings than the one before; a StoreError if the first has others than the run."""
        before, self._groupings = self._groupings, list(now)
        if before not in (None, self._groupings) and not self._changed:
            self._groupings = before
            raise StoreError(
                f"Cannot go on with this run: its groupings are {before}, those of this step {list(now)}. Group as "
                "before, record into another path, or say changed=True: what follows is a new segment of this run."
            )
        self._changed = True  # later steps may have others, as ever
        return before != self._groupings
