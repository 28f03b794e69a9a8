"""The rows of a run as they are committed, each of them once, for as long as somebody writes it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from gradtrace.store.places.keys import Directory, Keys
from gradtrace.store.places.lock import writer_of
from gradtrace.store.queries.query import Record, blocks_of_steps, records_by_step
from gradtrace.store.queries.selection import Query, Selected, select
from gradtrace.store.reading.snapshot import Rewound, Snapshot, new_segments, root_bytes

POLL, POLL_REMOTE = 0.25, 2.0  # seconds between two looks at the root; those at a bucket are paid for


class Follower:
    """What a query finds in a run that is still written, or not even begun.

    tell: takes sentences about what happens to the run, for people. given: the number of records so far. ended: why no
    more can come, once that is so.
    """

    def __init__(self, keys: Keys, query: Query, *, tell: Callable[[str], None]) -> None:
        self.ended: str | None = None
        self.given = 0
        self.interval = POLL if isinstance(keys, Directory) else POLL_REMOTE
        self._keys, self._query, self._tell = keys, query, tell
        self._told: set[str] = set()
        self._root: bytes | None = None  # as of the last look that left nothing to read
        self._about: Mapping[str, Any] | None = None  # what that of the last rows given said
        self._steps = np.empty(0, dtype=np.int64)  # of the rows of the stream that are done with

    def news(self) -> Iterator[Record]:
        """The records of what was committed since the last time, step after step. Sets `ended` where that was all."""
        root = root_bytes(self._keys)
        if root is None and self._about is None:
            self._tell_once("run", f"There is no run at {self._keys.name!r} yet. Waiting for it.")
        elif root is None:
            self.ended = f"{self._keys.name!r} was deleted: no more rows will come."
        elif root == self._root:
            self._find_silence(root)
        else:
            yield from self._read(root)

    def _read(self, root: bytes) -> Iterator[Record]:
        snapshot = Snapshot(self._keys)
        try:
            with snapshot.whole():
                selected = self._select(snapshot)
            if selected is not None:
                yield from self._records(snapshot, selected)
        except Rewound:
            return  # the next look goes on from what was given
        self._root = root
        self._end(snapshot)

    def _select(self, snapshot: Snapshot) -> Selected | None:
        """What the query finds in the whole run; None where there is no such probe."""
        run, probe = snapshot.run, self._query.probe
        if probe is None or probe in run.probe_names:
            return select(run, self._query, patient=True)
        self._tell_once("probe", f"There is no probe {probe!r} in {run.path!r} yet. Waiting for it.")
        return None

    def _records(self, snapshot: Snapshot, selected: Selected) -> Iterator[Record]:
        steps = selected.stream.steps
        self._forget(snapshot.about, steps)
        if len(steps):
            self._query = replace(self._query, last_step_only=False)  # what comes from now on is after it
            for name, sentence in selected.unknown.items():
                self._tell_once(name, f"{sentence} Waiting for it.")
        new = replace(selected, rows=selected.rows[selected.rows >= len(self._steps)])
        for rows in blocks_of_steps(new):
            for record in records_by_step(new, rows, snapshot.whole):
                yield record
                self.given += 1
            self._steps = steps[: rows[-1] + 1]
        self._steps = steps

    def _forget(self, about: Mapping[str, Any], steps: np.ndarray) -> None:
        """Be done with fewer rows where some were given up since."""
        before, self._about = self._about, about
        kept = len(self._steps) if before is None else self._kept(before, about)
        if kept > len(steps) or (self._steps[:kept] != steps[:kept]).any():
            kept = 0  # another run, in the same place
        if kept < len(self._steps):
            self._tell(
                f"The run was rewound: rows from step {self._steps[kept]} on, which were given already, are no longer "
                "in it. What comes now takes their place."
            )
        self._steps = self._steps[:kept]

    def _kept(self, before: Mapping[str, Any], now: Mapping[str, Any]) -> int:
        """How many of the rows that are done with are still in the run, as far as that is sure."""
        segments = new_segments(before, now)
        if segments is None:
            return 0
        kept = len(self._steps)
        for segment in segments:
            if segment["rewound"]:
                of_probe = int(np.searchsorted(self._steps, segment["step"], side="right"))
                kept = min(kept, segment["row"] if self._query.probe is None else of_probe)
        return kept

    def _end(self, snapshot: Snapshot) -> None:
        last = None if self._query.steps is None else self._query.steps.last
        if snapshot.run.closed:
            self.ended = f"{snapshot.run.path!r} is closed: no more rows will come."
        elif last is not None and len(self._steps) and self._steps[-1] >= last:
            self.ended = f"Step {self._steps[-1]} is there: no more rows of what was asked for will come."

    def _find_silence(self, root: bytes) -> None:
        """Nothing was committed: is there anybody who could?"""
        if writer_of(self._keys) is None and root_bytes(self._keys) == root:  # nor has it just come to its end
            rows = len(self._steps)
            self.ended = (
                f"The writer of {self._keys.name!r} is gone without having closed it, after {rows} rows: it was "
                "killed, or could not write. No more rows will come unless it is resumed."
            )

    def _tell_once(self, about: str, sentence: str) -> None:
        if about not in self._told:
            self._told.add(about)
            self._tell(sentence)
