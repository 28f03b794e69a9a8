"""Groups too small to be shown, also when they could be had from others by subtraction.

A group's gradient is a sum over its cells. So what is shown of some groups tells the sum of any combination of their
cells that the groups span: with `all` and all groups of a grouping but one, that one too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from gradtrace.groups import ALL
from gradtrace.store.rows import ParameterRow, Status, StepRow


def hidden_groups(cells: Mapping[str, Sequence[int]], counts: Mapping[int, int], least: int) -> frozenset[str]:
    """The groups that are not to be shown so that nothing is known of fewer than `least` samples.

    cells: group -> its cells; counts: cell -> its samples. Hidden are groups with fewer samples; where one could be had
    from groups that are shown, the smallest of these, and so on; and of two groups of which one is in the other, the
    smaller where fewer samples than that lie between them. A group without samples has nothing to hide.
    """
    names = list(cells)
    places = {cell: i for i, cell in enumerate(sorted({cell for own in cells.values() for cell in own}))}
    of = np.zeros((len(names), len(places)))
    for group, own in enumerate(cells.values()):
        of[group, [places[cell] for cell in own]] = 1
    size = np.array([counts.get(cell, 0) for cell in places], dtype=float)
    of = of * (size > 0)  # a cell without samples tells nothing
    samples = of @ size
    hidden = (samples > 0) & (samples < least)
    while True:
        shown = np.flatnonzero((samples > 0) & ~hidden)
        telling = _telling(of, samples, shown, np.flatnonzero(hidden), least)
        if not len(telling):
            return frozenset(name for name, gone in zip(names, hidden, strict=True) if gone)
        others = [g for g in telling if names[g] != ALL] or list(telling)
        hidden[min(others, key=lambda g: samples[g])] = True


def _telling(of: np.ndarray, samples: np.ndarray, shown: np.ndarray, hidden: np.ndarray, least: int) -> np.ndarray:
    """Shown groups that together tell what is to be hidden; none where nothing can be told."""
    for group in hidden if len(shown) else ():
        weights = np.linalg.lstsq(of[shown].T, of[group], rcond=None)[0]
        if np.allclose(of[shown].T @ weights, of[group], atol=1e-9):
            return shown[np.abs(weights) > 1e-9]
    for outer in shown:
        between = samples[outer] - samples[shown]
        inside = ~((of[shown] - of[outer]) > 0).any(1)
        near = shown[inside & (between > 0) & (between < least)]
        if len(near):
            return near
    return shown[:0]


def without(row: StepRow, groups: frozenset[str]) -> StepRow:
    """A row in which nothing is said of these groups but that they have too few samples."""
    if not groups:
        return row
    gone = np.array([name in groups for name in row.groups])
    parameters = {name: _without(measured, gone) for name, measured in row.parameters.items()}
    return replace(row, n_samples=np.where(gone, 0, row.n_samples), parameters=parameters)


def _without(measured: ParameterRow, gone: np.ndarray) -> ParameterRow:
    blank = lambda values: np.where(gone[:, None] if np.ndim(values) > 1 else gone, np.nan, values)  # noqa: E731
    nothing = (Status.GROUP_ABSENT, Status.KIND_ABSENT)
    status = {
        kind: np.where(gone & ~np.isin(codes, nothing), Status.TOO_FEW, codes).astype(np.uint8)
        for kind, codes in measured.status.items()
    }
    return replace(
        measured,
        spectra={kind: blank(values) for kind, values in measured.spectra.items()},
        metrics={kind: {name: blank(v) for name, v in metrics.items()} for kind, metrics in measured.metrics.items()},
        status=status,
        inner_product=np.where(gone[:, None] | gone, np.nan, measured.inner_product),
    )
