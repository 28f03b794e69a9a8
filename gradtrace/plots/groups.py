"""Group spectra over training: one column per network, small multiples that share their meaning row by row."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from gradtrace.metrics import METRICS
from gradtrace.plots.look import COLOURS, GREY, look
from gradtrace.plots.summaries import smooth

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COMPONENTS = 12  # rows of the heat map


@dataclass(frozen=True)
class Panel:
    """One column. Spectra are (steps, components), of each group's *mean* gradient, NaN where a group is absent.

    groups: the two groups compared. yardstick: two other groups of the same samples, drawn in grey.
    """

    title: str
    parameter: str
    steps: np.ndarray
    groups: Mapping[str, np.ndarray]
    yardstick: Mapping[str, np.ndarray]


def group_figure(panels: Sequence[Panel], *, title: str, note: str) -> Figure:
    """Largest singular value, effective rank, and ratio of the leading singular values, per network over training."""
    with look():
        from matplotlib.figure import Figure  # without pyplot: no window, no global state

        figure = Figure(figsize=(3.5 * len(panels) + 0.8, 8.8), layout="constrained")
        grid = figure.add_gridspec(4, len(panels), height_ratios=(0.1, 1, 1, 1))
        columns = [[figure.add_subplot(grid[row, at]) for row in (1, 2, 3)] for at in range(len(panels))]
        limit = max(_limit(panel) for panel in panels)
        for column, panel in zip(columns, panels, strict=True):
            _title(column[0], panel)
            _lines(column[0], panel, "sigma1")
            _lines(column[1], panel, "effective_rank")
            image = _heat_map(column[2], panel, limit)
        _name_axes(columns[0])
        _scale(figure, image, columns[-1][2], panels[0], limit)
        _legend(figure.add_subplot(grid[0, :]), columns[0][0])
        figure.suptitle(title, x=0.01, ha="left", weight="bold")
        figure.supxlabel(note, x=0.01, ha="left", size="small", color="#444444")
    return figure


def _lines(axis: Axes, panel: Panel, metric: str) -> None:
    from matplotlib.ticker import LogLocator

    width, seen = _width(panel), []
    for (group, spectra), dashes in zip(panel.yardstick.items(), ("-", "--"), strict=False):
        values = smooth(METRICS[metric](spectra), width=width)
        axis.plot(panel.steps, values, color=GREY, lw=1.2, ls=dashes, label=group, zorder=2)
    for (group, spectra), colour in zip(panel.groups.items(), COLOURS, strict=False):
        values = METRICS[metric](spectra)
        axis.plot(panel.steps, values, color=colour, lw=0.6, alpha=0.35, zorder=1)
        seen.append(values)
        axis.plot(panel.steps, smooth(values, width=width), color=colour, lw=2.2, label=group, zorder=3)
    if metric == "sigma1":
        axis.set_yscale("log")
        axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.yaxis.set_major_formatter("{x:.3g}")
        axis.yaxis.set_minor_formatter("")
    axis.set_ylim(_without_spikes(np.concatenate(seen), log=metric == "sigma1"))
    axis.grid(axis="y", color="#dddddd", lw=0.6)
    axis.margins(x=0)


def _without_spikes(values: np.ndarray, *, log: bool) -> tuple[float, float] | None:
    """Limits of an axis that leave single outlying steps outside, so that they do not flatten the rest."""
    seen = values[np.isfinite(values) & ((values > 0) | (not log))]
    if not seen.size:
        return None
    low, high = np.quantile(seen, (0.01, 0.99))
    margin = (high / low) ** 0.15 if log else 0.15 * (high - low) or 0.5
    return (low / margin, high * margin * (1 + 1e-6)) if log else (low - margin, high + margin)


def _log_ratio(panel: Panel) -> np.ndarray:
    """(components, steps): in doublings, how many times the second group's singular values are the first one's."""
    first, second = (spectra[:, :COMPONENTS] for spectra in panel.groups.values())
    with np.errstate(divide="ignore", invalid="ignore"):
        doublings = np.log2(second / first).T
    doublings = np.where(np.isfinite(doublings), doublings, np.nan)
    return np.stack([smooth(row, width=_width(panel)) for row in doublings])


def _width(panel: Panel) -> int:
    return max(1, len(panel.steps) // 15)


def _limit(panel: Panel) -> float:
    seen = np.abs(_log_ratio(panel))
    return float(max(0.5, np.nanquantile(seen, 0.98))) if np.isfinite(seen).any() else 0.5


def _heat_map(axis: Axes, panel: Panel, limit: float) -> Any:
    from matplotlib.colors import LinearSegmentedColormap

    colours = LinearSegmentedColormap.from_list("groups", [COLOURS[0], "#f7f7f7", COLOURS[1]])
    ratio = _log_ratio(panel)
    number = np.arange(1, len(ratio) + 1)
    image = axis.pcolormesh(panel.steps, number, ratio, cmap=colours, vmin=-limit, vmax=limit, shading="nearest")
    axis.set_ylim(len(ratio) + 0.5, 0.5)
    axis.set_yticks([each for each in (1, 4, 8, 12) if each <= len(ratio)])
    axis.set_xlabel("training step")
    return image


def _title(axis: Axes, panel: Panel) -> None:
    axis.set_title(panel.title, loc="left", weight="bold", pad=20)
    axis.text(0, 1.02, panel.parameter, transform=axis.transAxes, family="monospace", size=9.5, va="bottom")


def _name_axes(column: Sequence[Axes]) -> None:
    column[0].set_ylabel("largest singular value\nof the group's mean gradient")
    column[1].set_ylabel("effective rank\nof the group's gradient")
    column[2].set_ylabel("singular value, by size")


def _legend(axis: Axes, named: Axes) -> None:
    axis.set_axis_off()
    handles, names = named.get_legend_handles_labels()
    axis.legend(handles[::-1], names[::-1], loc="center left", ncols=len(names), borderaxespad=0)


def _scale(figure: Figure, image: Any, axis: Axes, panel: Panel, limit: float) -> None:
    """The colour bar, in times rather than in doublings."""
    first, second = panel.groups
    times = [each for each in (0.1, 0.2, 0.5, 0.67, 0.8, 1, 1.25, 1.5, 2, 5, 10) if abs(np.log2(each)) <= limit]
    bar = figure.colorbar(image, ax=axis, ticks=np.log2(times), label=f"{second} ÷ {first}")
    bar.ax.set_yticklabels([f"{each:g}×" for each in times])
    bar.outline.set_visible(False)
