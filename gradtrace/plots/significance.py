"""When two groups differ by more than chance: what is marked along the axis of a picture of their difference."""

from __future__ import annotations

import numpy as np

from gradtrace.inference.comparison import compare
from gradtrace.inference.trajectories import ALPHA
from gradtrace.plots.reading import Series
from gradtrace.plots.request import Request
from gradtrace.store.places.keys import Keys


def significant_steps(keys: Keys, request: Request, series: Series) -> tuple[np.ndarray, str]:
    """(parameters, steps) that are in a significant cluster of the two groups of `series`, and a sentence on the test.

    Parameters whose q, of all that are shown, is above ALPHA have none.
    """
    query = request.query
    found = compare(
        keys,
        *series.groups,
        parameters=series.parameters,
        kinds=query.kinds,
        metrics=(request.metric,),
        steps=query.steps,
        epochs=query.epochs,
        probe=query.probe,
        test="cluster",
        scale="mean" if request.own_mean else "raw",
        runs=request.runs,
    )
    at = np.clip(np.searchsorted(found.windows, series.steps, side="right") - 1, 0, None)
    marked = np.zeros((len(series.parameters), len(series.steps)), bool)
    for name, inside, q in zip(found.columns["parameter"], found.significant, found.columns["q"], strict=True):
        marked[series.parameters.index(name)] = inside[at] & bool(q <= ALPHA)
    runs, unknown = found.design.runs, int(np.isnan(found.columns["p"]).sum())
    said = f"Bars along the axis: clusters with q ≤ {ALPHA:g}, over what is shown, of a cluster test"
    lacking = f"; of {unknown} too few independent stretches are there to tell" if unknown else ""
    return marked, f"{said} {f'over {runs} runs' if runs > 1 else 'of this run'}{lacking}."
