"""Opens whatever run is at a place: one run, or several merged ones, all of them or one by its label."""

from __future__ import annotations

from collections.abc import Sequence

from gradtrace.errors import SelectionError
from gradtrace.store.patterns import matching
from gradtrace.store.places.keys import Keys
from gradtrace.store.places.place import Where, keys_at
from gradtrace.store.reading.merged import MergedRun, open_merged
from gradtrace.store.reading.reader import Run, open_keys, root_of
from gradtrace.store.reading.runs import RUNS


def open_run(path: Where) -> Run:
    """The run at a path or URL, as of its last commit. Open it again to see later commits.

    Of merged runs, a run whose `tree` has a dimension `run`. Raises a `StoreError` that says what is there instead,
    where it is no run, a newer one, or a damaged one.
    """
    return opened(keys_at(path))


def opened(keys: Keys, label: str | None = None) -> Run:
    """The run that these keys hold; of merged runs the one of that label, or all of them."""
    _, document = root_of(keys)
    if RUNS not in document["attributes"]:
        if label is not None:
            raise SelectionError(f"{keys.name!r} is a single run: there are none to choose from by their labels.")
        return open_keys(keys)
    merged = open_merged(keys)
    return merged if label is None else merged.run(label)


def labels(keys: Keys, patterns: Sequence[str] = ()) -> list[str | None]:
    """The labels of those merged runs that any pattern matches (none: of all); of a single run, no label.

    patterns: names, globs or regular expressions, as for parameters.
    """
    run = opened(keys)
    if isinstance(run, MergedRun):
        return list(matching("run", patterns, run.runs))
    if patterns:
        opened(keys, patterns[0])  # which says that there is nothing to choose
    return [None]
