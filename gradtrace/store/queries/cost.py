"""What tracing cost: in seconds, per recorded step, as fractions, and who chose how often."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from gradtrace.store.reading.reader import Run
from gradtrace.store.reading.stream import Stream

STEP = "step"  # a whole recorded step, training included
PERIOD = "period"  # from the beginning of the recorded step before this one to that of the step after it
PLAIN = "plain"  # the same of steps that are not recorded: the median of recent ones
PROBE = "probe"  # a whole probe
BEHIND = "behind"  # decomposing while the training went on
NOT_PARTS = (STEP, PERIOD, PLAIN, PROBE, BEHIND)


def cost_summary(run: Run) -> dict[str, Any]:
    """Four sections: seconds over all recorded steps, medians per recorded step, fractions, and the cadence."""
    costs = _Costs(run.stream())
    return {
        "cost in seconds": {**costs.totals(), **_probes(run)},
        "cost per recorded step": costs.medians(),
        "cost as a fraction": costs.fractions(),
        "cadence": cadence(run.attrs),
    }


def cadence(attrs: Mapping[str, Any]) -> dict[str, Any]:
    """How often steps were recorded, and who chose that; nothing where the run does not say."""
    every, budget = attrs.get("every"), attrs.get("budget")
    if budget is None:
        return {} if every is None else {"every": every, "chosen by": f"every={every}"}
    how = "so far too few steps to choose from" if every is None else f"every={every} repeats it"
    return {"every": every, "chosen by": f"budget={budget}; {how}"}


class _Costs:
    """The parts of the cost of recorded steps, by name: (steps,), seconds. What was never measured is not in it."""

    def __init__(self, stream: Stream) -> None:
        table = stream.per_step("cost")
        known = {name: table[:, i] for i, name in enumerate(stream.cost_parts) if np.isfinite(table[:, i]).any()}
        self.parts = {name: seconds for name, seconds in known.items() if name not in NOT_PARTS}
        self.around = {name: seconds for name, seconds in known.items() if name in NOT_PARTS}
        parts = np.array(list(self.parts.values()) or [np.zeros(0)])
        self.tracing = np.nansum(parts, axis=0)[np.isfinite(parts).any(axis=0)]  # of the steps that say
        self.steps = int(stream.steps[-1]) + 1 if len(stream.steps) else 0

    def totals(self) -> dict[str, float]:
        """Each part of tracing, their sum, what went on behind the training, and the whole of the recorded steps,
        training included."""
        if not self.parts:
            return {}
        parts = {name: float(np.nansum(seconds)) for name, seconds in self.parts.items()}
        names = {"behind the training": BEHIND, "recorded steps": STEP}
        around = {told: float(np.nansum(self.around[name])) for told, name in names.items() if name in self.around}
        return {**parts, "tracing": float(self.tracing.sum()), **around}

    def medians(self) -> dict[str, float]:
        """Of tracing's own clocks, of the recorded step, and, where known, of a plain step and what recording added."""
        if not self.parts:
            return {}
        found = {"tracing": float(np.median(self.tracing)), **{k: _median(v) for k, v in self.around.items()}}
        return found | ({"added": found[PERIOD] - found[PLAIN]} if {PERIOD, PLAIN} <= found.keys() else {})

    def fractions(self) -> dict[str, float]:
        """Tracing per time of the recorded steps, and per time that all steps would have taken without it.

        The second counts what tracing's own clocks do not see, as far as recorded steps take longer than plain ones.
        """
        found, medians, totals = {}, self.medians(), self.totals()
        if totals.get("recorded steps"):
            found["of recorded steps"] = totals["tracing"] / totals["recorded steps"]
        if medians.get(PLAIN, 0.0) > 0:
            unseen = max(0.0, medians.get("added", 0.0) - medians["tracing"]) * len(self.tracing)
            found["of training time"] = (totals["tracing"] + unseen) / (medians[PLAIN] * self.steps)
        return found


def _median(seconds: np.ndarray) -> float:
    return float(np.nanmedian(seconds))


def _probes(run: Run) -> dict[str, float]:
    """Seconds of all probes, if there were any that say."""
    costs = [_Costs(run.stream(name)).around for name in run.probe_names]
    seconds = [float(np.nansum(cost[PROBE])) for cost in costs if PROBE in cost]
    return {"probes": sum(seconds)} if seconds else {}
