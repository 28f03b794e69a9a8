"""Stores of a demo -> contrasts, words and the picture."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

import gradtrace as gt
from gradtrace.demo.contrast import Contrast, contrast, contrasts, mean_spectra, widest
from gradtrace.demo.run import PROBE
from gradtrace.plots.groups import Panel, group_figure

Groupings = Mapping[str, tuple[str, str]]


def groupings(labels: Mapping[str, np.ndarray]) -> dict[str, tuple[str, str]]:
    """grouping -> its two groups as the store names them, from the windows' labels."""
    pairs = {}
    for name, values in labels.items():
        first, second = np.unique(values)
        pairs[name] = (f"{name}={first}", f"{name}={second}")
    return pairs


@dataclass(frozen=True)
class Reading:
    """What one store shows: all contrasts, and, for the matrix where the first grouping parts most, more of it.

    held: its contrast among the held-out people. panel: its column in the picture.
    """

    found: dict[str, dict[str, Contrast]]
    held: Contrast
    panel: Panel


def read(store: Path, pairs: Groupings) -> Reading:
    """Every contrast in one store, and the widest one in detail."""
    run = gt.open_run(store)
    found = contrasts(run.tree, pairs)
    main, beside = pairs
    top = widest(found[main])[0].parameter
    node = run.parameter(top)
    spectra = {name: {_words(group): mean_spectra(node, group) for group in pairs[name]} for name in pairs}
    panel = Panel(store.stem, top, np.asarray(node["step"].values), spectra[main], spectra[beside])
    held = contrast(top, run.probes[PROBE].children[node.name or top], pairs[main])
    return Reading(found, held, panel)


def draw(panels: list[Panel], path: Path, *, title: str) -> None:
    """Writes the picture as PNG."""
    note = (
        "Each group's own mean gradient (stored sums × N / n of the group), at every step; thin: as recorded, thick: "
        "running median.\nPer network, the matrix in which the two coloured groups part most. Grey: the same samples "
        "split another way, for scale. Descriptive; no test was made."
    )
    group_figure(panels, title=title, note=note).savefig(path, dpi=160)


def _words(group: str) -> str:
    """`first half` from `half=first`, `gw` from `cohort=gw`."""
    grouping, _, label = group.partition("=")
    return f"{label} half" if grouping == "half" else label
