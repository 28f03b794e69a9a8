"""How numbers become colours and heights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from gradtrace.plots.look import COLOURS, NOT_THERE

if TYPE_CHECKING:
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

TIMES = (  # the first of these of which an axis holds three
    (1e-6, 1e-4, 0.01, 1, 100, 1e4, 1e6),
    (0.001, 0.01, 0.1, 1, 10, 100, 1000),
    (0.125, 0.25, 0.5, 1, 2, 4, 8),
    (0.33, 0.4, 0.5, 0.67, 0.8, 1, 1.25, 1.5, 2, 2.5, 3),
    (0.9, 0.95, 1, 1.05, 1.1),
    (0.98, 0.99, 1, 1.01, 1.02),
    (1,),
)
BELOW = "#1a0030"  # zeros on a logarithmic scale


@dataclass(frozen=True)
class Scale:
    """label: what is shown, with its scale. log: whether in decades, of which colours tell so many apart.

    diverging: whether white stands for 0 in the middle of two colours. limits: of the colours; else of the values.
    """

    label: str
    log: bool = False
    diverging: bool = False
    decades: float = 12.0
    limits: tuple[float, float] | None = None


def span(values: np.ndarray, scale: Scale) -> tuple[float, float]:
    """The numbers between which colours change: all but single outlying ones."""
    if scale.limits is not None:
        return scale.limits
    seen = values[np.isfinite(values) & ((values > 0) | (not scale.log))]
    if not seen.size:
        return (0.1, 1.0) if scale.log else (0.0, 1.0)
    if scale.diverging:
        reach = float(np.quantile(np.abs(seen), 0.99)) or 1.0
        return -reach, reach
    low, high = (float(each) for each in np.quantile(seen, (0.005, 0.995)))
    if scale.log:
        low = max(low, high / 10**scale.decades)
    if low == high:
        return (low / 1.1, high * 1.1) if scale.log else (low - 0.5, high + 0.5)
    return low, high


def colours(scale: Scale, values: np.ndarray) -> dict[str, Any]:
    """The arguments `cmap` and `norm` of a heat map of these values; what is not there is grey."""
    from matplotlib import colormaps
    from matplotlib.colors import LinearSegmentedColormap, LogNorm, Normalize

    low, high = span(values, scale)
    if scale.diverging:
        table: Any = LinearSegmentedColormap.from_list("two", [COLOURS[0], "#f7f7f7", COLOURS[1]])
    else:
        table = colormaps["viridis"]
    below = BELOW if scale.log else table(0.0)
    table = table.with_extremes(bad=NOT_THERE, under=below)
    return {"cmap": table, "norm": (LogNorm if scale.log else Normalize)(low, high)}


def coloured(values: np.ndarray, scale: Scale) -> np.ndarray:
    """The values as a heat map takes them: zeros have no logarithm, and are below everything."""
    return np.where(values <= 0, np.finfo(np.float32).tiny, values) if scale.log else values


def bar(figure: Figure, image: Any, axes: Any, scale: Scale, values: np.ndarray) -> None:
    """The colour bar of these values, its ends pointed where some lie beyond."""
    beyond = bool((values < image.norm.vmin).any()), bool((values > image.norm.vmax).any())
    extend = {(True, True): "both", (True, False): "min", (False, True): "max"}.get(beyond, "neither")
    made = figure.colorbar(image, ax=axes, label=scale.label, extend=extend, aspect=30, pad=0.02)
    made.outline.set_visible(False)
    if scale.log:
        name_decades(made.ax.yaxis, image.norm.vmin, image.norm.vmax)


def name_decades(axis: Axis, low: float, high: float) -> None:
    """Names few numbers of a logarithmic axis, and always more than one."""
    from matplotlib.ticker import LogLocator, NullFormatter

    decades = np.log10(high / low) if low > 0 else 1.0
    if decades < 3:
        axis.set_major_locator(LogLocator(subs=(1, 2, 5) if decades < 1.5 else (1, 3)))
        axis.set_major_formatter("{x:.3g}")
    else:
        axis.set_major_locator(LogLocator(numticks=5))
    axis.set_minor_formatter(NullFormatter())


def name_times(axis: Axis, low: float, high: float) -> None:
    """Names what a log2 ratio stands for, `2×` for 1."""
    known = next((some for some in TIMES if sum(low <= np.log2(each) <= high for each in some) >= 3), TIMES[-1])
    ticks = [each for each in known if low <= np.log2(each) <= high]
    axis.set_ticks(np.log2(ticks), labels=[f"{each:g}×" for each in ticks])
