"""The picture of the results: one bar for every way and model, and what is aimed at."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gradtrace.plots.look import look
from tests.benchmarks.results import Results
from tests.benchmarks.targets import Targets

# Okabe and Ito's colours, told apart with every common colour vision; dark and light alternate for print in grey.
COLOURS = {"gradient": "#56B4E9", "all kinds": "#0072B2", "every=10": "#009E73", "autospec": "#E69F00"}
NAMES = {
    "gradient": "gradient, every step",
    "all kinds": "all kinds, every step",
    "every=10": "all kinds, every 10th step",
    "autospec": "AutoSpec's way, gradient",
}
TICKS = (1, 1.2, 1.5, 2, 3, 5, 10, 20, 50, 100, 200)
WIDTH = 0.2  # of a bar; models are 1 apart


def draw(found: Mapping[str, Results], path: Path, aims: Targets, *, note: str) -> None:
    """Writes the bar chart; `note` stands below it. The file's ending says which format."""
    with look():
        figure = chart(found, aims, note=note)
        figure.savefig(path, dpi=200, metadata={"Software": None} if path.suffix == ".png" else None)


def chart(found: Mapping[str, Results], aims: Targets, *, note: str) -> Any:
    """The figure: models beside each other, the ratio on a logarithmic axis that starts at 1, which is untraced."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.8, 3.9), layout="constrained")
    axes = figure.add_subplot()
    for place, way in enumerate(COLOURS):
        shift = (place - (len(COLOURS) - 1) / 2) * WIDTH
        _bars(axes, found, way, shift)
        _aims(axes, found, way, aims, shift)
    axes.plot([], [], color="black", linewidth=1.8, label="aim, at most")
    ratios = [of[way].wall for of in found.values() for way in COLOURS if way in of]
    top = 1.25 * max([2.0, *ratios, *(aims.get((model, way), 1.0) for model in found for way in COLOURS)])
    axes.set_yscale("log")
    axes.set_ylim(min([0.97, *ratios]), top)
    axes.set_yticks([t for t in TICKS if t <= top], [f"{t:g}×" for t in TICKS if t <= top])
    axes.minorticks_off()
    axes.grid(axis="y", color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.set_xticks(range(len(found)), list(found))
    axes.tick_params(axis="x", length=0)
    axes.set_ylabel("time of a training step\nto the same untraced")
    figure.legend(loc="outside upper center", ncols=3, fontsize=9, handlelength=1.2, columnspacing=1.2)
    figure.supxlabel(note, fontsize=8, color="#555555")
    return figure


def _bars(axes: Any, found: Mapping[str, Results], way: str, shift: float) -> None:
    """A way's bars with their quartiles; a dash where the way is not defined."""
    colour = COLOURS[way]
    for place, of in enumerate(found.values()):
        if way not in of:
            axes.text(place + shift, 1.02, "–", ha="center", va="bottom", color=colour)
            continue
        axes.bar(place + shift, of[way].wall - 1, WIDTH, bottom=1, color=colour, edgecolor="white", linewidth=0.5)
        axes.vlines(place + shift, of[way].low, of[way].high, color="#555555", linewidth=0.8)
    axes.bar(0, 0, WIDTH, bottom=1, color=colour, label=NAMES[way])


def _aims(axes: Any, found: Mapping[str, Results], way: str, aims: Targets, shift: float) -> None:
    """A line across each bar at the ratio that is aimed at."""
    for place, model in enumerate(found):
        if (model, way) in aims:
            at = place + shift
            for colour, width in (("white", 3.4), ("black", 1.8)):  # white around it, to be seen on dark bars
                axes.hlines(aims[model, way], at - WIDTH / 2, at + WIDTH / 2, color=colour, linewidth=width)
