"""Runs whose numbers are known: log spectra that wander around a level, which may be another one for each group."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from gradtrace.metrics import METRICS, WHOLE
from gradtrace.store.rows import ParameterInfo, ParameterRow, Status, StepRow
from gradtrace.store.writing.writer import RunWriter

GROUPS = ("all", "site=A", "site=B")
KINDS = ("gradient", "activation", "adjoint")


def write_run(
    path: Path,
    seed: int,
    *,
    parameters: Sequence[str] = ("fc1.weight", "fc2.weight"),
    steps: Sequence[int] = range(40),
    level: Mapping[str, float] | None = None,
    sizes: Sequence[int] = (12, 4, 8),
    groups: Sequence[str] = GROUPS,
    kinds: Sequence[str] = ("gradient",),
    status: Mapping[int, int] | None = None,
    width: int = 3,
    probe: str | None = None,
    **settings: Any,
) -> Path:
    """level: group -> by how many doublings its gradient's own mean is larger. status: step -> that of site=A."""
    rng = np.random.default_rng(seed)
    shift = np.array([(level or {}).get(name, 0.0) for name in groups])
    own = rng.normal(size=(len(parameters), len(groups))) * 0.2 + shift
    infos = [ParameterInfo(name, (width, width)) for name in parameters]
    with RunWriter(path, attrs={}, kinds=kinds, keep=None, parameters=infos, **settings) as writer:
        for step in steps:
            rows = {}
            for place, name in enumerate(parameters):
                noise = rng.normal(size=(len(groups), width)) * 0.1
                logs = own[place][:, None] + noise - np.arange(width)
                share = np.array(sizes)[:, None] / sizes[0]  # stored is the group's part of the whole batch's mean
                rows[name] = _row(-np.sort(-(2.0**logs) * share, axis=1), kinds, (status or {}).get(step))
            row = StepRow(step=step, groups=tuple(groups), n_samples=np.array(sizes), parameters=rows, epoch=step // 10)
            writer.append(row)
            if probe is not None:
                writer.append(row, stream=f"probe/{probe}")
    return path


def _row(sigma: np.ndarray, kinds: Sequence[str], status: int | None) -> ParameterRow:
    codes = np.full(len(sigma), Status.MEASURED, np.uint8)
    if status is not None:
        codes[1] = status
        sigma = np.where(np.arange(len(sigma))[:, None] == 1, np.nan, sigma)
    inner = np.full((len(sigma), len(sigma)), np.nan)
    inner[np.diag_indices(len(sigma))] = (sigma**2).sum(axis=1)
    return ParameterRow(
        spectra=dict.fromkeys(kinds, sigma),
        metrics={kind: {name: METRICS[name](sigma) for name in WHOLE} for kind in kinds},
        status=dict.fromkeys(kinds, codes),
        inner_product=inner,
    )
