"""The runs that a comparison is of: one, several, or several that were merged."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TypeVar

from gradtrace.errors import SelectionError
from gradtrace.store.places.keys import Keys
from gradtrace.store.places.place import keys_at
from gradtrace.store.queries.query import Whole
from gradtrace.store.reading.merged import MergedRun
from gradtrace.store.reading.opened import labels
from gradtrace.store.reading.reader import Run
from gradtrace.store.reading.snapshot import Snapshot, consistent

Place = Run | Keys | str | os.PathLike[str]
Runs = Place | Sequence[Place] | Mapping[str, Place]
Found = TypeVar("Found")


@dataclass(frozen=True)
class Source:
    """One run. label: of it among merged runs. run: as somebody has opened it; else it is opened for each look."""

    name: str
    keys: Keys | None = None
    label: str | None = None
    run: Run | None = None

    def look(self, at: Callable[[Run, Whole], Found]) -> Found:
        """What `at` finds in the run, all of one commit."""
        if self.run is not None:
            return at(self.run, nullcontext)
        assert self.keys is not None

        def whole(snapshot: Snapshot) -> Found:
            return at(snapshot.run, snapshot.whole)

        return consistent(self.keys, whole, self.label)


def sources_of(runs: Runs, patterns: Sequence[str] = ()) -> list[Source]:
    """Every run; of merged ones those whose label any pattern matches. An error where there is none, or one twice."""
    if isinstance(runs, Run | Keys | str | os.PathLike):
        found = _of_place(runs, patterns)
    elif isinstance(runs, Mapping):
        found = [Source(str(name), one.keys, one.label, one.run) for name, at in runs.items() for one in [_only(at)]]
    else:
        found = [_only(at) for at in runs]
    if not found:
        raise SelectionError("There is no run to compare groups in. Give a run, or several.")
    names = [one.name for one in found]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise SelectionError(f"The run {twice!r} is given twice. Give each run once: copies are no further evidence.")
    return found


def _of_place(place: Place, patterns: Sequence[str]) -> list[Source]:
    if isinstance(place, MergedRun):
        from gradtrace.store.patterns import matching

        return [Source(label, run=place.run(label)) for label in matching("run", patterns, place.runs)]
    if isinstance(place, Run):
        return [Source(place.path, run=place)]
    keys = keys_at(place)
    return [Source(label or keys.name, keys, label) for label in labels(keys, patterns)]


def _only(place: Place) -> Source:
    found = _of_place(place, ())
    if len(found) > 1:
        raise SelectionError(f"{found[0].keys or place} holds several runs. Give it alone, or its runs one by one.")
    return found[0]
