"""Curves over training, with bands: trajectories of a metric, and how many times one group's is another's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from gradtrace.plots.heat import edges
from gradtrace.plots.legend import legend, style
from gradtrace.plots.look import GREY
from gradtrace.plots.scales import Scale, name_decades, name_times
from gradtrace.plots.sheet import TITLE, Sheet, name_below, name_beside, panels
from gradtrace.plots.words import short_names

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MARK = 0.04  # of the height of a panel: the marks of significance


@dataclass(frozen=True)
class Curve:
    """A line over the steps. low, high: the ends of its band. under: what the line smooths, drawn thin."""

    line: np.ndarray
    low: np.ndarray | None = None
    high: np.ndarray | None = None
    under: np.ndarray | None = None


@dataclass(frozen=True)
class Panel:
    """One of several pictures side by side: group -> its curve."""

    title: str
    curves: Mapping[str, Curve]


def trajectory_figure(parts: Sequence[Panel], steps: np.ndarray, *, scale: Scale, sheet: Sheet, along: str) -> Figure:
    """A metric over training, one panel per parameter, the groups in colours. along: the name of the axis of steps."""
    lines, columns, height = sheet.grid(len(parts), each=_each(parts))
    groups = list(dict.fromkeys(group for part in parts for group in part.curves))
    with sheet.figure(height + 0.3) as figure:
        axes = panels(figure, len(parts), lines, columns, sharex=True)
        for axis, part in zip(axes, parts, strict=True):
            for group, curve in part.curves.items():
                _draw(axis, steps, curve, **style(group, groups))
            _finish(axis, part, scale)
        _name_axes(figure, axes, parts, columns, scale, sheet, along)
        legend(figure, groups)
    return figure


def difference_figure(
    parts: Sequence[Panel],
    steps: np.ndarray,
    *,
    scale: Scale,
    sheet: Sheet,
    along: str,
    significant: np.ndarray | None = None,
) -> Figure:
    """Differences of two groups over training, one curve a panel, around a line where both are equal.

    scale: log, where the differences are log2 ratios; the axis then says how many times one is the other.
    significant: (steps,) or (panels, steps), the steps to be marked along the axis; whoever made the test says so in
    the note.
    """
    lines, columns, height = sheet.grid(len(parts), each=_each(parts))
    with sheet.figure(height) as figure:
        axes = panels(figure, len(parts), lines, columns, sharex=True, sharey=True)
        for axis, part in zip(axes, parts, strict=True):
            axis.axhline(0, color=GREY, lw=0.6, zorder=0)
            for curve in part.curves.values():
                _draw(axis, steps, curve, color="#404040")
            _frame(axis)
        low, high = _reach([curve for part in parts for curve in part.curves.values()], log=False)
        axes[0].set_ylim(min(low, -0.1), max(high, 0.1))
        if scale.log:
            name_times(axes[0].yaxis, *axes[0].get_ylim())
        for axis, marked in zip(axes, _marks(significant, len(parts), len(steps)), strict=True):
            mark(axis, steps, marked)
        _name_axes(figure, axes, parts, columns, scale, sheet, along)
    return figure


def mark(axis: Axes, steps: np.ndarray, significant: np.ndarray) -> None:
    """Black bars along the axis of steps where `significant`, each as wide as its step."""
    if not significant.any():
        return
    starts = edges(steps)
    spans = [(starts[at], starts[at + 1] - starts[at]) for at in np.flatnonzero(significant)]
    axis.broken_barh(spans, (0, MARK), transform=axis.get_xaxis_transform(), color="black", lw=0, zorder=4)


def _marks(significant: np.ndarray | None, count: int, steps: int) -> np.ndarray:
    given = np.zeros(steps, dtype=bool) if significant is None else np.asarray(significant, dtype=bool)
    return np.broadcast_to(given, (count, steps))


def _draw(axis: Axes, steps: np.ndarray, curve: Curve, **style: Any) -> None:
    """The line last, so that it is on top; a single step is a dot."""
    marker = "o" if len(steps) == 1 else None
    if curve.low is not None and curve.high is not None:
        axis.fill_between(steps, curve.low, curve.high, color=style["color"], alpha=0.22, lw=0, zorder=1)
    if curve.under is not None:
        axis.plot(steps, curve.under, color=style["color"], lw=0.4, alpha=0.4, zorder=2)
    axis.plot(steps, curve.line, zorder=3, marker=marker, ms=3, **style)


def _finish(axis: Axes, part: Panel, scale: Scale) -> None:
    low, high = _reach(list(part.curves.values()), log=scale.log)
    if scale.log:
        axis.set_yscale("log")
    axis.set_ylim(low, high)
    if scale.log:
        name_decades(axis.yaxis, low, high)
    _frame(axis)


def _each(parts: Sequence[Panel]) -> float:
    """How many inches a panel is high."""
    return 1.35 if len(parts) > 1 else 1.6


def _frame(axis: Axes) -> None:
    axis.grid(axis="y", color="#dddddd", lw=0.4)
    axis.margins(x=0.01)


def _reach(curves: Sequence[Curve], *, log: bool) -> tuple[float, float]:
    """Limits that leave out single outlying steps, which would flatten the rest."""
    ends = [each for c in curves for each in (c.line, c.low, c.high, c.under) if each is not None]
    seen = np.concatenate(ends)
    seen = seen[np.isfinite(seen) & ((seen > 0) | (not log))]
    if not seen.size:
        return (0.1, 1.0) if log else (0.0, 1.0)
    low, high = (float(each) for each in np.quantile(seen, (0.005, 0.995)))
    if log:
        margin = max((high / low) ** 0.1, 1.05)
        return low / margin, high * margin
    margin = 0.1 * (high - low) or 0.05 * abs(high) or 0.5
    return low - margin, high + margin


def _name_axes(
    figure: Figure, axes: Sequence[Axes], parts: Sequence[Panel], columns: int, scale: Scale, sheet: Sheet, along: str
) -> None:
    names = short_names([part.title for part in parts], sheet.letters(columns))
    for axis, name in zip(axes, names, strict=True):
        axis.set_title(name, **TITLE)
    name_below(axes, columns, along)
    lines, _, _ = sheet.grid(len(parts))
    name_beside(figure, axes, lines, scale.label, each=_each(parts))
