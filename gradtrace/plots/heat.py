"""Heat maps over training: parameters by steps, singular values by steps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from gradtrace.plots.scales import Scale, bar, coloured, colours
from gradtrace.plots.sheet import TITLE, Sheet, fitted, name_below, name_beside, panels
from gradtrace.plots.words import short_names

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MOST_NAMES = 40  # of rows, on one heat map
ROW = 0.105  # inches of a row that has a name
SPECTRUM = 1.4  # inches of a heat map of singular values


@dataclass(frozen=True)
class Field:
    """One heat map. values: (rows, steps), NaN where nothing was measured. group: named below its title, if any."""

    title: str
    values: np.ndarray
    group: str = ""


def map_figure(
    fields: Sequence[Field], steps: np.ndarray, rows: Sequence[str], *, scale: Scale, sheet: Sheet, along: str
) -> Any:
    """Rows with names, the first on top; of more than MOST_NAMES, each so-manieth has its name.

    along: the name of the axis of steps.
    """
    across = min(len(fields), 3) if sheet.wide else 1
    shown = min(len(rows), MOST_NAMES)
    lines, columns, height = sheet.grid(len(fields), columns=across, each=max(0.9, ROW * shown + 0.15))
    with sheet.figure(height) as figure:
        axes = panels(figure, len(fields), lines, columns, sharex=True, sharey=True)
        values = np.stack([field.values for field in fields])
        look_of = colours(scale, values)
        images = [
            _cells(axis, field, steps, np.arange(len(rows)), scale, look_of)
            for axis, field in zip(axes, fields, strict=True)
        ]
        axes[0].set_ylim(len(rows) - 0.5, -0.5)
        every = naming(len(rows))
        names = short_names(rows[::every], 40 if sheet.wide else 26)
        axes[0].set_yticks(range(0, len(rows), every), labels=names, size=5.5, family="monospace")
        name_below(axes, columns, along)
        bar(figure, images[0], axes, replace(scale, label=fitted(scale.label, height - 0.55)), values)
    return figure


def spectra_figure(fields: Sequence[Field], steps: np.ndarray, *, scale: Scale, sheet: Sheet, along: str) -> Any:
    """Singular values by size, the largest on top: (components, steps) in each field; NaN where there are fewer."""
    groups = len({field.group for field in fields})
    lines, columns, height = sheet.grid(len(fields), columns=groups if 1 < groups < 4 else None, each=SPECTRUM)
    with sheet.figure(height) as figure:
        axes = panels(figure, len(fields), lines, columns, sharex=True)
        titles = dict(zip(names := _titles(fields), short_names(names, sheet.letters(columns)), strict=True))
        values = np.concatenate([field.values.ravel() for field in fields])
        look_of = colours(scale, values)
        for axis, field in zip(axes, fields, strict=True):
            known = max(1, int((~np.isnan(field.values)).any(axis=1).sum()))
            known_field = replace(field, title=titles[field.title], values=field.values[:known])
            image = _cells(axis, known_field, steps, np.arange(known) + 1, scale, look_of)
            axis.set_ylim(known + 0.5, 0.5)
            axis.set_yticks(_places(known))
        name_below(axes, columns, along)
        name_beside(figure, axes, lines, "singular value, by size", each=SPECTRUM)
        bar(figure, image, axes, replace(scale, label=fitted(scale.label, lines * SPECTRUM)), values)
    return figure


def naming(rows: int) -> int:
    """Each how-manieth row has its name."""
    return -(-rows // MOST_NAMES)


def edges(steps: np.ndarray) -> np.ndarray:
    """Where the cell of each step begins, and where the last one ends."""
    if len(steps) == 1:
        return np.array([steps[0] - 0.5, steps[0] + 0.5])
    middles = (steps[1:] + steps[:-1]) / 2
    return np.concatenate([[steps[0] - (middles[0] - steps[0])], middles, [steps[-1] + (steps[-1] - middles[-1])]])


def _cells(axis: Axes, field: Field, steps: np.ndarray, rows: np.ndarray, scale: Scale, look_of: dict[str, Any]) -> Any:
    """Draws the cells of one heat map; also in vector formats as dots, which thousands of rectangles would be."""
    axis.set_title("\n".join(filter(None, [field.title, field.group])), **TITLE)
    across, down = edges(steps), np.concatenate([rows - 0.5, rows[-1:] + 0.5])
    return axis.pcolormesh(across, down, coloured(field.values, scale), rasterized=True, **look_of)


def _titles(fields: Sequence[Field]) -> list[str]:
    return list(dict.fromkeys(field.title for field in fields))


def _places(count: int) -> list[int]:
    """Of so many singular values, those with a number."""
    chosen = [1, *(each for each in (4, 8, 16, 32, 64, 128, 256, 512) if each <= count)]
    return chosen if count < 20 else [each for each in chosen if each == 1 or each >= count / 8]
