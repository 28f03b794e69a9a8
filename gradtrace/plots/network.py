"""The graph of a model's ops, coloured by a metric."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from gradtrace.plots.scales import Scale, bar, coloured, colours
from gradtrace.plots.sheet import Sheet
from gradtrace.plots.words import short_names

if TYPE_CHECKING:
    import networkx
    from matplotlib.figure import Figure

LEVEL = 0.17  # inches between ops that follow each other
LETTERS = 20  # of a name, in an inch
MOST_LEVELS = 40  # below each other, before the graph goes on beside itself


def graph_figure(graph: networkx.DiGraph, values: Mapping[str, float], *, scale: Scale, sheet: Sheet) -> Figure:
    """Every op below those that it follows, data flowing down; a long graph goes on in the next column.

    graph: nodes are names of ops. values: op -> its colour; ops without one are grey.
    """
    place, levels, columns = layout(graph)
    with sheet.figure(max(1.5, LEVEL * levels + 0.3)) as figure:
        from matplotlib.patheffects import withStroke

        axis = figure.subplots()
        axis.set_axis_off()
        names = list(graph)
        shades = np.array([values.get(name, np.nan) for name in names])
        for start, end in graph.edges():
            goes_on = place[end][1] <= place[start][1]  # in another column
            axis.annotate("", place[end], place[start], arrowprops=_ARROW | (_BACK if goes_on else {}), zorder=1)
        x, y = np.array([place[name] for name in names]).T
        image = axis.scatter(
            x, y, c=coloured(shades, scale), s=26, edgecolors="#444444", linewidths=0.5, zorder=3,
            plotnonfinite=True, **colours(scale, shades),
        )  # fmt: skip
        for name, words in zip(
            names, short_names(names, max(8, int(sheet.inches * LETTERS / columns) - 5)), strict=True
        ):
            axis.annotate(
                words, place[name], (5, 0), path_effects=[withStroke(linewidth=1.5, foreground="w")], **_WORDS
            )
        axis.set_xlim(-0.15, columns)
        axis.set_ylim(levels - 0.4, -0.6)
        bar(figure, image, axis, scale, shades)
    return figure


_WORDS: dict[str, Any] = {"textcoords": "offset points", "size": 5, "family": "monospace", "va": "center", "zorder": 4}
_BACK = {"color": "#d0d0d0", "ls": ":"}
_ARROW: dict[str, Any] = {
    "arrowstyle": "-|>,head_length=0.25,head_width=0.12",
    "color": "#9a9a9a",
    "lw": 0.5,
    "shrinkA": 3,
    "shrinkB": 3,
}


def layout(graph: networkx.DiGraph) -> tuple[dict[str, tuple[float, float]], int, int]:
    """Op -> (column, level from the top); how many levels are below each other, and how many columns there are."""
    from networkx import topological_generations

    generations = [sorted(each) for each in topological_generations(graph)]
    place: dict[str, tuple[float, float]] = {}
    columns = 0
    for first in range(0, len(generations), MOST_LEVELS):
        below = generations[first : first + MOST_LEVELS]
        for level, names in enumerate(below):
            place |= {name: (float(columns + lane), float(level)) for lane, name in enumerate(names)}
        columns += max(map(len, below))
    return place, min(len(generations), MOST_LEVELS), columns
