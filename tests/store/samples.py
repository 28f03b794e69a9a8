"""Rows as the recorder makes them, small, with values that tell where they belong."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from gradtrace.metrics import METRICS, WHOLE
from gradtrace.store.rows import KINDS, ParameterInfo, ParameterRow, Status, StepRow

GROUPS = ("all", "diagnosis=HC", "diagnosis=SZ")


def parameter_row(
    seed: int, *, groups: int = 3, width: int = 5, kinds: Sequence[str] = KINDS, dtype: str = "float32"
) -> ParameterRow:
    rng = np.random.default_rng(seed)
    spectra = {kind: -np.sort(-rng.random((groups, width)).astype(dtype), axis=1) for kind in kinds}
    factor = rng.random((groups, 7))
    return ParameterRow(
        spectra=spectra,
        metrics={kind: {name: METRICS[name](sigma) for name in WHOLE} for kind, sigma in spectra.items()},
        status={kind: np.full(groups, Status.MEASURED, np.uint8) for kind in kinds},
        inner_product=factor @ factor.T,
        residual=1e-7 * (seed + 1),
        owner_residual=float("nan"),
    )


def step_row(
    step: int, names: Sequence[str], *, groups: Sequence[str] = GROUPS, width: int = 5, **extra: object
) -> StepRow:
    rows = {name: parameter_row(1000 * step + i, groups=len(groups), width=width) for i, name in enumerate(names)}
    return StepRow(
        step=step,
        groups=tuple(groups),
        n_samples=np.arange(1, len(groups) + 1) + step,
        parameters=rows,
        **{"loss": 1.0 / (step + 1), "epoch": float(step // 10), "cost": {"measure": 0.25}, **extra},  # type: ignore[arg-type]
    )


def infos(names: Sequence[str]) -> list[ParameterInfo]:
    return [
        ParameterInfo(name, (11, 5), {"rung": "factored", "kinds": list(KINDS), "tolerance": 1e-2}) for name in names
    ]
