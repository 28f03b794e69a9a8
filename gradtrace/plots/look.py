"""The one door to matplotlib, which is an extra: everything else works without it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from gradtrace.errors import GradtraceError

COLOURS = ("#0072B2", "#D55E00")  # blue and vermilion of Okabe & Ito: told apart with every common colour vision
PALETTE = (*COLOURS, "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")  # all of theirs that stand out on white
GREY = "#8a8a8a"
NOT_THERE = "#e4e4e4"  # cells of a heat map in which nothing was measured
LOOK: Any = {
    "font.size": 11,
    "axes.titlesize": 11,
    "axes.labelsize": 10.5,
    "xtick.labelsize": 9.5,
    "ytick.labelsize": 9.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#666666",
    "figure.facecolor": "white",
    "legend.frameon": False,
}
PAPER: Any = LOOK | {
    "font.size": 7.5,
    "axes.titlesize": 7,
    "axes.labelsize": 7.5,
    "xtick.labelsize": 6.5,
    "ytick.labelsize": 6.5,
    "legend.fontsize": 7,
    "axes.linewidth": 0.6,
    "lines.linewidth": 1.3,
    **{f"{axis}tick.{size}.width": 0.5 for axis in "xy" for size in ("major", "minor")},
    **{f"{axis}tick.major.size": 2.5 for axis in "xy"},
    **{f"{axis}tick.minor.size": 1.5 for axis in "xy"},
    "pdf.fonttype": 42,  # text that stays text; journals refuse the other kind
    "svg.hashsalt": "gradtrace",  # the same figure gives the same file
}


def require_matplotlib() -> None:
    """Raises GradtraceError that names the extra when matplotlib is missing."""
    try:
        import matplotlib  # noqa: F401
    except ModuleNotFoundError as error:
        raise GradtraceError(
            'pictures need matplotlib, which is not installed: pip install "gradtrace[plot]"'
        ) from error


@contextmanager
def look(settings: Any = LOOK) -> Iterator[None]:
    """gradtrace's look for the figures made inside; the caller's settings come back afterwards."""
    require_matplotlib()
    import matplotlib

    with matplotlib.rc_context(settings):
        yield
