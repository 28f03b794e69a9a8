"""What a run holds, counted: per parameter and per status, and the whole of what is to be said about it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

import numpy as np

from gradtrace.store.queries.cost import cost_summary
from gradtrace.store.reading.reader import Run
from gradtrace.store.reading.stream import Stream
from gradtrace.store.rows import Status
from gradtrace.store.schema import OWNER_RESIDUAL, RESIDUAL, status_variable


def parameter_rows(run: Run, stream: Stream) -> list[dict[str, Any]]:
    """One row per parameter: its shape, how it was measured, and how often."""
    counts = _measured_counts(run, stream)
    rows = []
    for name, info in run.parameters.items():
        steps = {kind: found.get(name, (0, 0)) for kind, found in counts.items()}
        place = stream.places.get(name)
        rows.append(
            {
                "parameter": name,
                "shape": "x".join(map(str, info.shape)) or "scalar",
                "rung": info.attrs.get("rung"),
                "kinds": [kind for kind, (times, _) in steps.items() if times],
                "steps": max((times for times, _ in steps.values()), default=0),
                "groups": max((groups for _, groups in steps.values()), default=0),
                "components": place.width if place else 0,
                "ownership": info.attrs.get("ownership"),
                "reason": info.attrs.get("reason"),
            }
        )
    return rows


def status_counts(run: Run, stream: Stream) -> dict[str, dict[str, int]]:
    """Kind -> status -> how many (step, parameter, group) have it."""
    total: dict[str, Counter[str]] = {kind: Counter() for kind in run.kinds}
    for kind in run.kinds:
        for _, codes in stream.over_parameters(status_variable(kind)):
            present, times = np.unique(codes, return_counts=True)
            total[kind].update({Status.NAMES[code]: int(n) for code, n in zip(present, times, strict=True)})
    return {kind: dict(sorted(counter.items())) for kind, counter in total.items()}


def worst_audits(run: Run, stream: Stream) -> dict[str, dict[str, Any]]:
    """`residual` and `owner_residual`: the largest value, where it stands, and how often the tolerance was exceeded."""
    worst: dict[str, dict[str, Any]] = {}
    for audit in (RESIDUAL, OWNER_RESIDUAL):
        above = 0
        for names, values in stream.over_parameters(audit):
            if np.isnan(values).all():
                continue
            allowed = np.array([_tolerance(run, name) for name in names])
            above += int((values > allowed).sum())
            step, position = np.unravel_index(np.nanargmax(values), values.shape)
            value = float(str(values[step, position]))
            if audit not in worst or value > worst[audit]["value"]:
                worst[audit] = {"value": value, "parameter": names[position], "step": int(stream.steps[step])}
                worst[audit]["tolerance"] = _stated(allowed[position])
        if audit in worst:
            worst[audit]["times above tolerance"] = above
    return worst


def _stated(value: float) -> float | None:
    """The tolerance, or None where none was stated."""
    return float(value) if np.isfinite(value) else None


def _tolerance(run: Run, name: str) -> float:
    """The stated tolerance of a parameter's audits; NaN, which nothing exceeds, where none was stated."""
    stated = run.parameters[name].attrs.get("tolerance")
    return float(stated) if isinstance(stated, int | float) else float("nan")


def run_summary(run: Run) -> dict[str, Any]:
    """What was run, how it was measured, and what came of it, as nested plain data."""
    stream = run.stream()
    rungs = Counter(str(info.attrs.get("rung", "not said")) for info in run.parameters.values())
    return {
        "run": {"path": str(run.path), "state": "closed" if run.closed else "unfinished", "schema": run.schema},
        "about": run.attrs,
        "recorded": {
            **{f"rows of {name}": number for name, number in run.committed.items()},
            "first step": int(stream.steps[0]) if len(stream.steps) else None,
            "last step": int(stream.steps[-1]) if len(stream.steps) else None,
            "parameters": len(run.parameters),
            "groups": list(stream.groups),
            "kinds": list(run.kinds),
            "keep": "all singular values" if run.keep is None else run.keep,
            "scalars": list(stream.scalar_names),
        },
        "measured by rung": dict(rungs),
        "not grouped": _reasons(run),
        "worst audits": worst_audits(run, stream),
        "status": status_counts(run, stream),
        **cost_summary(run),
    }


def _reasons(run: Run) -> Mapping[str, str]:
    return {name: str(info.attrs["reason"]) for name, info in run.parameters.items() if info.attrs.get("reason")}


def _measured_counts(run: Run, stream: Stream) -> dict[str, dict[str, tuple[int, int]]]:
    """Kind -> parameter -> (steps in which any group was measured, groups that ever were)."""
    counts: dict[str, dict[str, tuple[int, int]]] = {kind: {} for kind in run.kinds}
    for kind in run.kinds:
        for names, codes in stream.over_parameters(status_variable(kind)):
            known = (codes != Status.GROUP_ABSENT) & (codes != Status.KIND_ABSENT)
            steps, groups = known.any(axis=2).sum(axis=0), known.any(axis=0).sum(axis=1)
            counts[kind] |= {name: (int(steps[i]), int(groups[i])) for i, name in enumerate(names)}
    return counts
