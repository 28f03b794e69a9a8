"""The one door to matplotlib, which is an extra: everything else works without it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from gradtrace.errors import GradtraceError

COLOURS = ("#0072B2", "#D55E00")  # blue and vermilion of Okabe & Ito: told apart with every common colour vision
GREY = "#8a8a8a"
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


def require_matplotlib() -> None:
    """Raises GradtraceError that names the extra when matplotlib is missing."""
    try:
        import matplotlib  # noqa: F401
    except ModuleNotFoundError as error:
        raise GradtraceError(
            'pictures need matplotlib, which is not installed: pip install "gradtrace[plot]"'
        ) from error


@contextmanager
def look() -> Iterator[None]:
    """gradtrace's look for the figures made inside; the caller's settings come back afterwards."""
    require_matplotlib()
    import matplotlib

    with matplotlib.rc_context(LOOK):
        yield
