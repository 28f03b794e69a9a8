"""Scree plots: singular values by size, early and late in training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from gradtrace.plots.curves import Curve
from gradtrace.plots.legend import legend, style
from gradtrace.plots.scales import Scale, name_decades
from gradtrace.plots.sheet import TITLE, Sheet, name_beside
from gradtrace.plots.words import short_names

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FLOOR = 1e-7  # of the largest value: what lies below is float32 rounding, and no longer shown


@dataclass(frozen=True)
class Scree:
    """One parameter: when -> group -> its singular values (components,), with a band over the steps of that time."""

    title: str
    times: Mapping[str, Mapping[str, Curve]]


def scree_figure(screes: Sequence[Scree], *, scale: Scale, sheet: Sheet) -> Figure:
    """One row per parameter and one column per time, the groups in colours; each row has one axis."""
    times = list(screes[0].times)
    groups = list(dict.fromkeys(group for scree in screes for found in scree.times.values() for group in found))
    names = short_names([scree.title for scree in screes], sheet.letters(1))
    with sheet.figure(1.3 * len(screes) + 0.85) as figure:
        grid = figure.subplots(len(screes), len(times), squeeze=False, sharey="row", sharex="row")
        for row, scree, name in zip(grid, screes, names, strict=True):
            _limits(row[0], [curve for found in scree.times.values() for curve in found.values()])
            for axis, found in zip(row, scree.times.values(), strict=True):
                for group, curve in found.items():
                    _draw(axis, curve, **style(group, groups))
            row[0].set_title(name, **TITLE, pad=11)
        for axis, when in zip(grid[0], times, strict=True):
            axis.text(0, 1.02, when, transform=axis.transAxes, size=6, va="bottom", color="#444444")
        for axis in grid[-1]:
            axis.set_xlabel("singular value, by size")
        name_beside(figure, list(grid[:, 0]), len(screes), scale.label, each=1.3)
        legend(figure, groups)
    return figure


def _draw(axis: Axes, curve: Curve, **style: Any) -> None:
    number = np.arange(1, len(curve.line) + 1)
    if curve.low is not None and curve.high is not None:
        axis.fill_between(number, curve.low, curve.high, color=style["color"], alpha=0.22, lw=0)
    axis.plot(number, curve.line, marker="o", ms=2.2 if len(number) <= 20 else 0, **style)
    axis.grid(axis="y", color="#dddddd", lw=0.4)


def _limits(axis: Axes, curves: Sequence[Curve]) -> None:
    """Down to the smallest value that is more than rounding, and as far right as there are such values."""
    from matplotlib.ticker import MaxNLocator

    seen = np.stack([curve.line for curve in curves])
    ends = np.stack([each for curve in curves for each in (curve.low, curve.high, curve.line) if each is not None])
    top = float(np.nanmax(ends))
    above = seen > FLOOR * top
    axis.set_yscale("log")
    low = float(seen[above].min()) if above.any() else 0.1
    high = top if top > 0 else 1.0
    margin = max((high / low) ** 0.08, 1.05)
    axis.set_ylim(low / margin, high * margin)
    name_decades(axis.yaxis, low / margin, high * margin)
    last = int(np.flatnonzero(above.any(axis=0)).max(initial=0)) + 1
    axis.set_xlim(1 - 0.03 * last, last + 0.03 * last)
    axis.xaxis.set_major_locator(MaxNLocator(4, integer=True))
