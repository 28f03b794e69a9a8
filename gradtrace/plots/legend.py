"""The groups' colours, and the legend that names them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from gradtrace.plots.look import PALETTE
from gradtrace.plots.words import ALL, group_words

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MOST_GROUPS = len(PALETTE)
DASHES = ("-", (0, (4, 1.5)), (0, (1, 1)))  # of the groupings
WHOLE = "#404040"


def style(group: str, groups: Sequence[str]) -> dict[str, Any]:
    """Colour and dashes of one of the groups: a colour for each, dashes for each grouping."""
    others = [each for each in groups if each != ALL]
    if group == ALL:
        return {"color": WHOLE, "ls": "-"}
    groupings = list(dict.fromkeys(each.partition("=")[0] for each in others))
    dashes = DASHES[groupings.index(group.partition("=")[0]) % len(DASHES)]
    return {"color": PALETTE[others.index(group) % len(PALETTE)], "ls": dashes}


def legend(figure: Figure, groups: Sequence[str]) -> None:
    """Above everything, in as many columns as fit."""
    from matplotlib.lines import Line2D

    title, names = group_words(groups)
    letters = max(map(len, [*names, title])) + 6
    columns = max(1, min(len(names), int(figure.get_size_inches()[0] * 17 / letters)))
    handles = [Line2D([], [], label=name, **style(group, groups)) for group, name in zip(groups, names, strict=True)]
    made = figure.legend(
        handles=handles, loc="outside upper left", ncols=columns, title=title or None, borderaxespad=0.2,
        handlelength=1.8, columnspacing=1.2, title_fontsize=6.5, alignment="left",
    )  # fmt: skip
    made.set_in_layout(True)
