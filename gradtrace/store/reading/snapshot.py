"""A run as of one commit, and whether what was read of it is of that commit.

A writer only ever adds rows, but where it goes on from an earlier step (a rewind). Then the root says so first, and
only afterwards chunks go or are written anew. So what was read is right if the root, read after it, knows of no rewind.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

from gradtrace.errors import StoreError
from gradtrace.store.places.keys import ROOT_KEY, Keys
from gradtrace.store.reading import guard
from gradtrace.store.reading.opened import opened
from gradtrace.store.reading.reader import Run

Found = TypeVar("Found")
ATTEMPTS = 20


class Rewound(StoreError):
    """What was read may not be of the commit it was read for: rows were given up meanwhile."""


class Snapshot:
    """A run, and a way to know that nothing of it was given up since it was opened.

    label: of the one that is meant of merged runs.
    """

    def __init__(self, keys: Keys, label: str | None = None) -> None:
        self.run: Run = opened(keys, label)
        self.about: dict[str, Any] = self.run.group.attrs.asdict()
        self._keys = keys
        self._checked: bytes | None = None  # the last root that was found to hold everything of this one

    @property
    def holds(self) -> bool:
        """Whether all rows of this snapshot are still in the run."""
        data = root_bytes(self._keys)
        if data is None:
            return False
        if data != self._checked:
            if not is_later(self.about, json.loads(data).get("attributes", {})):
                return False
            self._checked = data
        return True

    @contextmanager
    def whole(self) -> Iterator[None]:
        """What is read within is of this snapshot; else a `Rewound`, whatever may have gone wrong in reading."""
        try:
            yield
        except StoreError:
            self._check()
            raise
        self._check()

    def _check(self) -> None:
        if not self.holds:
            raise Rewound(
                f"{self.run.path!r} was rewound to an earlier step, or deleted, while it was read: what was read so "
                "far is of the run as it was. Run the command again."
            )


def root_bytes(keys: Keys) -> bytes | None:
    """The root's zarr.json as it is now; cheap enough to be asked for again and again."""
    try:
        return guard.get(keys, ROOT_KEY)
    except (OSError, ValueError) as error:
        opened(keys)  # which may know better what is there
        raise StoreError(f"{keys.name!r} cannot be read: {error}. Check the path and its permissions.") from error


def is_later(before: Mapping[str, Any], now: Mapping[str, Any]) -> bool:
    """Whether a root's attributes are of the same run, which since `before` gave up no rows."""
    segments = new_segments(before, now)
    committed = now.get("committed", {})
    grown = all(committed.get(path, -1) >= rows for path, rows in before["committed"].items())
    return grown and segments is not None and not any(segment["rewound"] for segment in segments)


def new_segments(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[dict[str, Any]] | None:
    """How a run was gone on with since `before`, one entry each time; None where it is another run."""
    if before.get("id") != now.get("id") and "id" in before:
        return None
    old, new = (about.get("run", {}).get("segments", []) for about in (before, now))
    return new[len(old) :] if new[: len(old)] == old else None


def consistent(keys: Keys, look: Callable[[Snapshot], Found], label: str | None = None) -> Found:
    """What `look` finds in a run, all of it of one commit: it looks again where rows were given up meanwhile."""
    for _ in range(ATTEMPTS):
        snapshot = Snapshot(keys, label)
        try:
            with snapshot.whole():
                return look(snapshot)
        except Rewound:
            continue
    raise StoreError(f"{keys.name!r} is rewound again and again. Wait until its writer has settled, then try again.")
