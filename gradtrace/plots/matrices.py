"""Matrices of groups by groups: the cosines between their gradients, and how often these conflict."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from gradtrace.plots.look import PAPER
from gradtrace.plots.scales import Scale, bar, colours
from gradtrace.plots.sheet import TITLE, Sheet, fitted, panels
from gradtrace.plots.words import group_words, short_names

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MOST_NUMBERS = 8  # groups, of which every cell can hold its number


@dataclass(frozen=True)
class Matrix:
    """One matrix (groups, groups), NaN where two groups were never in one step. Its lower triangle is drawn."""

    title: str
    values: np.ndarray


def matrix_figure(matrices: Sequence[Matrix], groups: Sequence[str], *, scale: Scale, sheet: Sheet) -> Figure:
    """One panel per matrix, with the numbers in the cells where they can be read."""
    columns = min(len(matrices), (4 if sheet.wide else 2) if len(groups) <= 5 else (2 if sheet.wide else 1))
    side = min(0.85 * sheet.inches / columns, max(0.8, 0.36 * len(groups)))
    lines, columns, _ = sheet.grid(len(matrices), columns=columns)
    with sheet.figure(lines * (side + 0.25) + 0.45) as figure:
        axes = panels(figure, len(matrices), lines, columns, sharex=True, sharey=True)
        values = np.stack([_lower(matrix.values) for matrix in matrices])
        chosen = colours(scale, values)
        chosen["cmap"] = chosen["cmap"].with_extremes(bad="white")
        for axis, matrix in zip(axes, matrices, strict=True):
            image = _draw(axis, matrix, chosen, numbers=len(groups) <= MOST_NUMBERS)
        names = short_names([matrix.title for matrix in matrices], sheet.letters(columns))
        for axis, name in zip(axes, names, strict=True):
            axis.set_title(name, **TITLE)
        _name(figure, axes, groups)
        bar(figure, image, axes, replace(scale, label=fitted(scale.label, lines * (side + 0.25))), values)
    return figure


def _lower(values: np.ndarray) -> np.ndarray:
    """Rows from the second group on, columns up to the last but one, each pair once."""
    shown = values[1:, :-1]
    return np.where(np.tri(*shown.shape) > 0, shown, np.nan)


def _draw(axis: Axes, matrix: Matrix, chosen: dict[str, Any], *, numbers: bool) -> Any:
    values = _lower(matrix.values)
    image = axis.pcolormesh(np.ma.masked_invalid(values), edgecolors="white", lw=1, **chosen)
    for row, column in zip(*np.tril_indices_from(values), strict=True):
        value = values[row, column]
        if np.isnan(value):
            axis.text(column + 0.5, row + 0.5, "–", ha="center", va="center", size=6.5)
        elif numbers:
            luminance = np.dot(image.cmap(image.norm(value))[:3], (0.3, 0.59, 0.11))
            colour = "black" if luminance > 0.5 else "white"
            axis.text(
                column + 0.5,
                row + 0.5,
                f"{value:.2f}".replace("-", "−"),
                ha="center",
                va="center",
                size=6.5,
                color=colour,
            )
    axis.set_aspect("equal")
    axis.spines[:].set_visible(False)
    axis.tick_params(length=0)
    return image


def _name(figure: Figure, axes: Sequence[Axes], groups: Sequence[str]) -> None:
    title, names = group_words(groups)
    names = short_names(names, 16)
    places = np.arange(len(groups) - 1) + 0.5
    upright = max(map(len, names[:-1])) > 6
    axes[0].set_yticks(places, labels=names[1:])
    axes[0].set_xticks(places, labels=names[:-1])
    axes[0].invert_yaxis()
    for axis in axes:
        axis.tick_params(axis="x", rotation=45 if upright else 0)
        for label in axis.get_xticklabels() if upright else ():
            label.set(ha="right", rotation_mode="anchor")
    if title:
        figure.supylabel(title, size=PAPER["axes.labelsize"])
