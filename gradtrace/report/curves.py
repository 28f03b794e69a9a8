"""Curves over training: medians of windows of steps, read block by block."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby

import numpy as np

from gradtrace.inference.series import COMPONENT, SCALED, WHOLE, windows_of
from gradtrace.scale import own_scale
from gradtrace.store.queries.query import Whole, cosines_of
from gradtrace.store.queries.selection import Selected
from gradtrace.store.rows import Status
from gradtrace.store.schema import INNER_PRODUCT
from gradtrace.store.tables.blocks import Part, parts

POINTS, LEAST_POINTS = 200, 20
NUMBERS = 500_000  # in all curves of a page
SCREE_POINTS = 40
LAST = 32  # steps in which the last one of a group is looked for


@dataclass(frozen=True)
class Curves:
    """windows: the first step of each. values: (parameters, kinds, metrics, groups, windows), at own-mean scale.
    cosines: (parameters, pairs, windows)."""

    windows: np.ndarray
    values: np.ndarray
    cosines: np.ndarray


def windows_for(steps: np.ndarray, curves: int) -> np.ndarray:
    """The first steps of as many windows as a page has room for."""
    room = NUMBERS // max(1, curves)
    return windows_of([steps], min(POINTS, max(LEAST_POINTS, room)))


def curves_of(selected: Selected, metrics: Sequence[str], pairs: Sequence[tuple[int, int]], whole: Whole) -> Curves:
    """Medians of the selected groups over windows. pairs: of positions among them, whose cosines are wanted."""
    count, kinds, groups = len(selected.parameters), len(selected.kinds), len(selected.groups)
    steps = selected.stream.steps[selected.rows]
    windows = windows_for(steps, count * (kinds * len(metrics) * groups + len(pairs)))
    sizes = sizes_of(selected)
    values = np.full((count, kinds, len(metrics), groups, len(windows)), np.nan, np.float32)
    cosines = np.full((count, len(pairs), len(windows)), np.nan, np.float32)

    def read(part: Part) -> tuple[np.ndarray, np.ndarray]:
        rows = np.searchsorted(selected.rows, part.rows)
        return _values(part, metrics, sizes[rows]), _cosines(part, pairs)

    for names, window, (some, angles) in _windowed(parts(selected, whole), windows, read):
        values[names, ..., window] = _median(some)
        cosines[names, :, window] = _median(angles)
    return Curves(windows, values, cosines)


def scree_of(selected: Selected, whole: Whole) -> tuple[np.ndarray, np.ndarray]:
    """Singular values of the last step that has the group: their places, (parameters, kinds, groups, places)."""
    widest = max((selected.stream.places[name].width for name in selected.parameters), default=0)
    places = np.unique(np.geomspace(1, max(1, widest), SCREE_POINTS).round().astype(int))
    sizes = sizes_of(selected)
    last = replace(selected, rows=selected.rows[-LAST:])
    shape = (len(selected.parameters), len(selected.kinds), len(selected.groups), len(places))
    found = np.full(shape, np.nan, np.float32)
    for part in parts(last, whole):
        spectra = part.spectra(None)
        there = places[places <= spectra.shape[-1]] - 1
        scale = _scale(selected.kinds, sizes[np.searchsorted(selected.rows, part.rows)])
        scaled = spectra[..., there] * scale[None, ..., None]
        for row in range(len(part.rows)):  # the later ones last
            known = np.isfinite(scaled[:, row, ..., :1])
            found[part.names, ..., : len(there)] = np.where(known, scaled[:, row], found[part.names, ..., : len(there)])
    return places, found


def sizes_of(selected: Selected) -> np.ndarray:
    """(rows, groups + 1): the samples of the selected groups, and at last of the whole batch; 1 where not stored."""
    stream = selected.stream
    counts = stream.per_step("n_samples")[selected.rows].astype(np.float64)
    batch = counts[:, stream.groups.index(WHOLE)] if WHOLE in stream.groups else np.zeros(len(counts))
    return np.column_stack([counts[:, list(selected.groups)], np.where(batch > 0, batch, 1.0)])


def _scale(kinds: Sequence[str], sizes: np.ndarray) -> np.ndarray:
    """(rows, kinds, groups): what makes of a stored value that of the group by itself."""
    return np.stack([own_scale(kind, sizes[:, :-1], sizes[:, -1:]) for kind in kinds], axis=1)


def _values(part: Part, metrics: Sequence[str], sizes: np.ndarray) -> np.ndarray:
    """(parameters, rows, kinds, metrics, groups), NaN where nothing was measured."""
    status, found = part.status(), part.metrics(metrics)
    part.check(status, np.isnan(found["sigma1"]))
    scale = _scale(part.selected.kinds, sizes)
    scaled = [
        values * scale if name in SCALED or COMPONENT.fullmatch(name) else values for name, values in found.items()
    ]
    return np.where(status[..., None, :] == Status.MEASURED, np.stack(scaled, axis=3), np.nan)


def _cosines(part: Part, pairs: Sequence[tuple[int, int]]) -> np.ndarray:
    """(parameters, rows, pairs)."""
    if not pairs or INNER_PRODUCT not in part.variables:
        return np.full((len(part.names), len(part.rows), len(pairs)), np.nan)
    groups = list(part.selected.groups)
    cosines = cosines_of(part.read(INNER_PRODUCT)[..., groups])
    return np.stack([cosines[..., a, b] for a, b in pairs], axis=-1)


Read = Callable[[Part], tuple[np.ndarray, np.ndarray]]


def _windowed(
    found: Iterator[Part], windows: np.ndarray, read: Read
) -> Iterator[tuple[np.ndarray, int, tuple[np.ndarray, np.ndarray]]]:
    """(parameters, window, values of all its steps): a window that two blocks share is held until it is whole."""
    for _, blocks in groupby(found, key=lambda part: tuple(part.names.tolist())):
        held: tuple[np.ndarray, ...] = ()
        at, names = np.empty(0, int), np.empty(0, int)
        for part in blocks:
            values = read(part)
            steps = part.selected.stream.steps[part.rows]
            at, names = np.append(at, np.searchsorted(windows, steps, side="right") - 1), part.names
            held = tuple(np.concatenate(both, axis=1) for both in zip(held, values, strict=True)) if held else values
            for window in np.unique(at)[:-1]:
                yield names, int(window), (held[0][:, at == window], held[1][:, at == window])
            held = (held[0][:, at == at[-1]], held[1][:, at == at[-1]])
            at = at[at == at[-1]]
        yield names, int(at[-1]), (held[0], held[1])


def _median(values: np.ndarray) -> np.ndarray:
    """Over axis 1, of what is finite; NaN where nothing is."""
    ordered = np.sort(np.where(np.isfinite(values), values, np.nan), axis=1)  # NaN comes last
    known = np.isfinite(ordered).sum(axis=1, keepdims=True)
    low, high = (np.take_along_axis(ordered, np.maximum(at, 0), axis=1) for at in ((known - 1) // 2, known // 2))
    return ((low + high) / 2)[:, 0]
