"""How every parameter was measured, and what its audits found."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from gradtrace.report.numbers import number
from gradtrace.store.queries.summary import parameter_rows
from gradtrace.store.reading.reader import Run
from gradtrace.store.rows import ParameterInfo
from gradtrace.store.schema import OWNER_RESIDUAL, RESIDUAL

PASSED, FAILED, NONE = "passed", "above tolerance", "not audited"


def parameters_of(run: Run) -> list[dict[str, Any]]:
    """One row per parameter, measured or not, in the order of the run."""
    found = {audit: _worst(run, audit) for audit in (RESIDUAL, OWNER_RESIDUAL)}
    return [
        _row(row, run.parameters[row["parameter"]], [found[audit].get(row["parameter"]) for audit in found])
        for row in parameter_rows(run, run.stream())
    ]


def is_matrix(info: ParameterInfo) -> bool:
    """Whether its gradient can have more than one singular value."""
    rows, *columns = info.shape or (1,)
    return min(rows, math.prod(columns)) > 1


def _row(row: Mapping[str, Any], info: ParameterInfo, audits: Sequence[Mapping[str, Any] | None]) -> dict[str, Any]:
    """The worst of each audit, how many of its values exceed the tolerance, and what to make of them."""
    residual, owner = audits
    above = sum(one["above"] for one in audits if one)
    return {
        "name": row["parameter"],
        "shape": row["shape"].replace("x", " × "),
        "rung": row["rung"],
        "ownership": row["ownership"],
        "reason": row["reason"],
        "kinds": ", ".join(row["kinds"]),
        "adapters": _listed(info.attrs.get("adapters")),
        "ops": _listed(info.attrs.get("ops")),
        "steps": row["steps"],
        "residual": residual["value"] if residual else None,
        "owner": owner["value"] if owner else None,
        "tolerance": number(_tolerance(info)),
        "above": above,
        "audit": FAILED if above else PASSED if residual or owner else NONE,
        "matrix": is_matrix(info),
    }


def _listed(value: Any) -> str:
    """Names, each once; a mapping's values."""
    values = value.values() if isinstance(value, Mapping) else value if isinstance(value, list | tuple) else [value]
    return ", ".join(dict.fromkeys(str(one) for one in values if one))


def _tolerance(info: ParameterInfo) -> float:
    stated = info.attrs.get("tolerance")
    return float(stated) if isinstance(stated, int | float) else math.nan


def _worst(run: Run, audit: str) -> dict[str, dict[str, Any]]:
    """Parameter -> the largest value, and how many exceed the tolerance; without those that were never audited."""
    found = {}
    for names, values in run.stream().over_parameters(audit):
        for name, column in zip(names, values.T, strict=True):
            known = column[~np.isnan(column)]
            if known.size:
                above = int((known > _tolerance(run.parameters[name])).sum())
                found[name] = {"value": number(float(known.max())), "above": above}
    return found
