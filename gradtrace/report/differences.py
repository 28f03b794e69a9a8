"""The strongest differences between groups, as `gradtrace.compare` finds them in one run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from gradtrace.errors import SelectionError
from gradtrace.inference.comparison import Comparison, compare
from gradtrace.inference.evidence import CLUSTER
from gradtrace.report.choice import Choice
from gradtrace.report.numbers import number, numbers
from gradtrace.store.reading.reader import Run

TOP = 40  # rows of one comparison
LEVEL = 0.05
KEPT = ("group", "group_other", "kind", "metric", "unit", "steps", "left_out", "note")
ROUNDED = ("mean", "mean_other", "difference", "low", "high", "statistic", "p", "q")


def differences_of(run: Run, choice: Choice, place: Mapping[str, int]) -> tuple[list[dict[str, Any]], list[str]]:
    """What was found in each grouping, and sentences about those that could not be compared.

    place: parameter -> its row on the page.
    """
    found, skipped = [], []
    for name, groups in choice.compared.items():
        try:
            found.append({"name": name, **_told(compare(run, *groups, test=CLUSTER), place)})
        except SelectionError as error:
            skipped.append(f"{name} is not compared: {error}")
    return found, skipped


def _told(found: Comparison, place: Mapping[str, int]) -> dict[str, Any]:
    rows = sorted(enumerate(found.rows()), key=lambda item: _order(item[1]))
    q, p = found.columns["q"], found.columns["p"]
    return {
        "count": len(found),
        "with_p": int((~np.isnan(p)).sum()),
        "below": int((q <= LEVEL).sum()),
        "probe": found.design.probe,
        "windows": numbers(found.windows.astype(float)),
        "rows": [_row(found, at, row, place) for at, row in rows[:TOP]],
        "notes": list(found.notes),
        "population": found.population,
        "methods": found.methods,
    }


def _order(row: Mapping[str, Any]) -> tuple[bool, float, float]:
    """The smallest p first, as `gradtrace compare` shows them."""
    return row["p"] is None, row["p"] or 0.0, -abs(row["statistic"] or 0.0)


def _row(found: Comparison, at: int, row: Mapping[str, Any], place: Mapping[str, int]) -> dict[str, Any]:
    """A row with its difference over training, and where that is more than chance."""
    return {
        "parameter": place[row["parameter"]],
        **{name: row[name] for name in KEPT},
        **{name: number(row[name]) for name in ROUNDED},
        "first_step": _whole(row["first_step"]),
        "last_step": _whole(row["last_step"]),
        "trajectory": numbers(found.trajectory[at]),
        "significant": np.flatnonzero(found.significant[at]).tolist(),
    }


def _whole(step: float | None) -> int | None:
    return None if step is None else int(step)
