"""What a figure for a paper is drawn on, and the file that it becomes."""

from __future__ import annotations

import io
import textwrap
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from gradtrace.plots.look import PAPER, look

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDTHS = {"column": 3.5, "page": 7.2}  # inches
FORMATS = ("png", "svg", "pdf")
DPI = 300
UNDATED: dict[str, Any] = {"png": {}, "svg": {"Date": None}, "pdf": {"CreationDate": None}}
TITLE: dict[str, Any] = {"loc": "left", "family": "monospace", "size": 6}
NOTE_SIZE, NOTE_LETTERS = 6, 20.5  # points; letters in an inch
LABEL_LETTERS = 17  # in an inch


@dataclass(frozen=True)
class Sheet:
    """width: a name of WIDTHS. note: small print below the figure."""

    width: str = "column"
    note: str = ""

    @property
    def inches(self) -> float:
        return WIDTHS[self.width]

    @property
    def wide(self) -> bool:
        return self.width == "page"

    def letters(self, columns: int) -> int:
        """How many letters the title of one of so many panels side by side may have."""
        return int(self.inches * (12 if columns > 1 else 15) / columns)

    @contextmanager
    def figure(self, height: float) -> Iterator[Figure]:
        """An empty figure in the look of a paper, `height` inches high without its note."""
        with look(PAPER):
            from matplotlib.figure import Figure  # without pyplot: no window, no global state

            lines = textwrap.wrap(self.note, int(self.inches * NOTE_LETTERS))
            size = (self.inches, height + len(lines) * 1.35 * NOTE_SIZE / 72)
            figure = Figure(figsize=size, layout="constrained", dpi=DPI)
            if lines:
                figure.supxlabel("\n".join(lines), x=0.01, ha="left", size=NOTE_SIZE, color="#444444", linespacing=1.25)
            yield figure

    def grid(self, count: int, *, columns: int | None = None, each: float = 1.25) -> tuple[int, int, float]:
        """Rows, columns and height for so many panels side by side, each so many inches high."""
        columns = min(count, columns or (3 if self.wide else 2))
        rows = -(-count // columns)
        return rows, columns, rows * each + 0.55


def panels(figure: Figure, count: int, rows: int, columns: int, **options: Any) -> list[Axes]:
    """The axes of the panels, line by line; places that are left over stay empty."""
    axes: Sequence[Axes] = figure.subplots(rows, columns, squeeze=False, **options).ravel()
    for left_over in axes[count:]:
        left_over.set_axis_off()
    return list(axes[:count])


def name_below(axes: Sequence[Axes], columns: int, along: str) -> None:
    """Names the axis of steps below the last panel of each column, with few whole numbers on it."""
    from matplotlib.ticker import MaxNLocator

    for axis in axes:
        axis.xaxis.set_major_locator(MaxNLocator(4, integer=True))
    for axis in axes[-columns:]:
        axis.set_xlabel(along)
        axis.xaxis.set_tick_params(labelbottom=True)


def name_beside(figure: Figure, axes: Sequence[Axes], rows: int, label: str, *, each: float) -> None:
    """One name for the upright axes of all panels, each of which is so many inches high."""
    if rows == 1:
        axes[0].set_ylabel(fitted(label, each - 0.1))
    else:
        figure.supylabel(fitted(label, rows * each), size=PAPER["axes.labelsize"])


def fitted(label: str, inches: float) -> str:
    """The label in lines that are no longer than that."""
    width = max(14, int(inches * LABEL_LETTERS))
    return "\n".join(line for part in label.split("\n") for line in textwrap.wrap(part, width))


def encoded(figure: Figure, form: str) -> bytes:
    """The file of one of FORMATS. It holds no time and no path: the same figure gives the same bytes."""
    buffer = io.BytesIO()
    with look(PAPER):
        figure.savefig(buffer, format=form, dpi=DPI, metadata=UNDATED[form])
    return buffer.getvalue()
