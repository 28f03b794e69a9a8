"""Everything that a page says of a run, as plain data of bounded size."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from gradtrace.errors import SelectionError, nearest
from gradtrace.inference.series import COMPONENT, LOGARITHMIC, windows_of
from gradtrace.report.audits import parameters_of
from gradtrace.report.choice import Choice, choose
from gradtrace.report.curves import POINTS, Curves, curves_of, scree_of
from gradtrace.report.differences import differences_of
from gradtrace.report.numbers import numbers, plain
from gradtrace.store.places.keys import Keys
from gradtrace.store.queries.query import Whole
from gradtrace.store.queries.selection import Query, Selected, select
from gradtrace.store.queries.summary import run_summary
from gradtrace.store.reading.opened import labels
from gradtrace.store.reading.reader import Run
from gradtrace.store.reading.snapshot import consistent
from gradtrace.store.reading.stream import Stream

METRICS = ("sigma1", "effective_rank")  # that every page has
NOT_TOLD = ("parameters", "groups")  # of the summary: they have tables of their own


def report_of(
    keys: Keys, *, label: str | None = None, metric: str | None = None, groups: Sequence[str] = (), title: str = ""
) -> dict[str, Any]:
    """What a page says of the run at its last commit, ready for JSON.

    label: of one of merged runs. metric: that the map shows at first, by default the effective rank. groups: to be
    shown and compared; by default those of every grouping.
    """
    several = [each for each in labels(keys) if each is not None]
    if several and label is None:
        raise SelectionError(
            f"{keys.name!r} holds several runs, and a report is of one. Choose it by --run LABEL. "
            f"{nearest('', several, most=len(several))}"
        )
    name = keys.name.replace("\\", "/").rstrip("/").rpartition("/")[2] + (f", {label}" if label else "")
    return consistent(
        keys, lambda snapshot: _told(snapshot.run, snapshot.whole, name, title or name, metric, groups), label
    )


def _told(run: Run, whole: Whole, name: str, title: str, metric: str | None, groups: Sequence[str]) -> dict[str, Any]:
    stream = run.stream()
    samples = stream.per_step("n_samples")
    choice = choose(dict(zip(stream.groups, samples.sum(axis=0).tolist(), strict=True)), groups)
    parameters = parameters_of(run)
    place = {one["name"]: at for at, one in enumerate(parameters)}
    found, skipped = differences_of(run, choice, place) if len(stream.steps) else ([], [])
    return {
        "title": title,
        "name": name,
        "closed": run.closed,
        "recorded": len(stream.steps),
        "ends": [int(stream.steps[0]), int(stream.steps[-1])] if len(stream.steps) else None,
        "about": list(_about(run, name)),
        "groups": _groups(stream, samples),
        "parameters": parameters,
        "loss": _loss(stream),
        **_curves(run, whole, choice, metric, place),
        "differences": found,
        "notes": [*choice.notes, *skipped],
    }


def _about(run: Run, name: str) -> Iterator[tuple[str, str, Any]]:
    """Section, name and value of all that is known of the run; of its path, the last part alone."""
    summary = run_summary(run)
    summary["run"] = {**summary["run"], "path": name}
    for section, entries in summary.items():
        for key, value in _flat(entries):
            if section != "recorded" or key not in NOT_TOLD:
                yield section, key, plain(value)


def _flat(entries: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in entries.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def _groups(stream: Stream, samples: np.ndarray) -> list[dict[str, Any]]:
    """How often each group was there, and with how many samples."""
    return [
        {
            "name": name,
            "steps": int((counts > 0).sum()),
            "samples": int(counts.sum()),
            "least": int(counts[counts > 0].min(initial=counts.max(initial=0))),
            "median": plain(float(np.median(counts[counts > 0]))) if counts.any() else 0,
            "most": int(counts.max(initial=0)),
        }
        for name, counts in zip(stream.groups, samples.T, strict=True)
    ]


def _loss(stream: Stream) -> dict[str, Any] | None:
    """Medians of windows; None where no loss was recorded."""
    loss = stream.per_step("loss")
    known = np.isfinite(loss)
    if not known.any():
        return None
    steps = stream.steps[known]
    windows = windows_of([steps], POINTS)
    parts = np.split(loss[known], np.searchsorted(steps, windows[1:]))
    return {"steps": windows.tolist(), "values": numbers(np.array([np.median(part) for part in parts]))}


def _curves(run: Run, whole: Whole, choice: Choice, metric: str | None, place: Mapping[str, int]) -> dict[str, Any]:
    metrics = tuple(dict.fromkeys((*METRICS, *([metric] if metric else []))))
    if metric and COMPONENT.fullmatch(metric) and metric != "sigma1":
        raise SelectionError(f"The map has no {metric!r}. Choose sigma1 or a metric of whole spectra.")
    selected = select(run, Query(metrics=metrics))
    shown = tuple(selected.stream.groups.index(name) for name in choice.shown)
    selected = replace(selected, groups=shown)
    pairs = [(choice.shown.index(a), choice.shown.index(b)) for a, b in choice.pairs]
    told = {
        "metrics": metrics,
        "first": metric or METRICS[1],
        "ratios": [name in LOGARITHMIC or name == "sigma1" for name in metrics],
        "kinds": selected.kinds,
        "shown": choice.shown,
        "pairs": pairs,
    }
    if not len(selected.rows) or not selected.parameters:
        return told | {"steps": [], "places": [], "curves": {}}
    curves = curves_of(selected, metrics, pairs, whole)
    if metric and np.isnan(curves.values[:, :, metrics.index(metric)]).all():
        raise SelectionError(f"This run did not record the metric {metric!r}. Choose another by --metric.")
    places, scree = scree_of(selected, whole)
    return told | {
        "steps": curves.windows.tolist(),
        "places": places.tolist(),
        "curves": _by_parameter(run, selected, curves, scree, place),
    }


def _by_parameter(
    run: Run, selected: Selected, curves: Curves, scree: np.ndarray, place: Mapping[str, int]
) -> dict[int, dict[str, Any]]:
    """Row on the page -> values (kinds, metrics, groups, windows), cosines (pairs, windows), scree (kinds, groups)."""
    return {
        place[name]: {
            "values": [[[numbers(curve) for curve in groups] for groups in metrics] for metrics in curves.values[at]],
            "cosines": [numbers(curve) for curve in curves.cosines[at]],
            "scree": [[_spectrum(curve) for curve in groups] for groups in scree[at]],
        }
        for at, name in enumerate(selected.parameters)
    }


def _spectrum(values: np.ndarray) -> list[float | int | None] | None:
    """Without the padding of narrower spectra."""
    return numbers(values[np.isfinite(values)])
