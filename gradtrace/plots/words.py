"""What axes, legends and captions call things."""

from __future__ import annotations

from collections.abc import Sequence
from os.path import commonprefix

from gradtrace.metrics import METRICS
from gradtrace.store.queries.selection import COSINE, SHARE

METRIC_WORDS = {
    "sigma1": "largest singular value",
    "frobenius": "Frobenius norm",
    "nuclear": "nuclear norm",
    "stable_rank": "stable rank",
    "effective_rank": "effective rank",
    "participation_ratio": "participation ratio",
    "numerical_rank": "numerical rank",
    "condition": "condition number",
    COSINE: "cosine",
    SHARE: "share",
}
SCALED = ("sigma1", "frobenius", "nuclear")  # those that grow with the matrix
LOGARITHMIC = (*SCALED, "condition")  # those that are compared by ratios
ALL = "all"
LEAST_END = 8  # letters of the end of a name that is cut


def metric_words(metric: str) -> str:
    """What a metric is called; one of somebody's own, by its name."""
    return METRIC_WORDS.get(metric, metric.replace("_", " "))


def matrix(kind: str, *, own_mean: bool, groups: Sequence[str]) -> str:
    """The matrix whose singular values are shown, at the scale at which they are shown."""
    if not own_mean:
        return f"{kind}, as stored"
    if kind != "gradient":
        return f"{kind}, per sample"
    return "mean gradient" if list(groups) == [ALL] else "group's mean gradient"


def quantity(metric: str, kind: str, *, own_mean: bool, groups: Sequence[str]) -> str:
    """The name of an axis that shows a metric."""
    if metric == COSINE:
        return "cosine of the gradients"
    if metric == SHARE:
        return "share of the batch's gradient"
    what = matrix(kind, own_mean=own_mean, groups=groups) if metric in SCALED or metric not in METRICS else kind
    return f"{metric_words(metric)} ({what})"


UNITS = {
    "gradient": "loss per unit of the parameter",
    "activation": "units of the op's input",
    "adjoint": "loss per unit of the op's output",
}


def scale_note(kind: str, *, own_mean: bool, groups: Sequence[str]) -> str:
    """A sentence on the scale and unit of singular values and norms."""
    if not own_mean:
        return f"As stored: sums that grow with the number of a group's samples, in {UNITS[kind]}."
    if kind == "gradient":
        whose = "Of the batch's mean gradient" if list(groups) == [ALL] else "Of each group's own mean gradient (× N/n)"
        return f"{whose}, in {UNITS[kind]}."
    factor = {"activation": "1/√n", "adjoint": "N/√n"}[kind]
    return f"Of a sample, by root mean square over the group (× {factor}), in {UNITS[kind]}."


def group_words(groups: Sequence[str]) -> tuple[str, list[str]]:
    """The grouping, where all groups are of one, and how they are then called; else no word, and their names."""
    pairs = [group.partition("=") for group in groups]
    groupings = {grouping for grouping, equals, _ in pairs if equals}
    if len(groupings) == 1 and all(equals for _, equals, _ in pairs):
        return groupings.pop(), [label for _, _, label in pairs]
    return "", list(groups)


def between(groups: Sequence[str], sign: str) -> str:
    """Two groups with a sign between them: `diagnosis: HC ÷ SZ`."""
    title, (first, second) = group_words(groups)
    return f"{title}: {first} {sign} {second}" if title else f"{first} {sign} {second}"


def short_names(names: Sequence[str], most: int) -> list[str]:
    """The names in at most so many letters, told apart where that can be; `…` stands for what was left out."""
    if all(len(name) <= most for name in names):
        return list(names)
    shared = commonprefix(names).rpartition(".")[0] + "."  # noqa: RUF071 (dots, not slashes)
    bare = [name if shared == "." else f"…{name.removeprefix(shared)}" for name in names]
    tries = [[_by_words(name, most) for name in own] for own in (names, bare)]
    tries += [[_by_letters(name, most, head) for name in bare] for head in range(most // 2, 1, -1)]
    fitting = [cut for cut in tries if all(len(name) <= most for name in cut)]
    return next((cut for cut in fitting if len(set(cut)) == len(cut)), fitting[-1])


def _by_words(name: str, most: int) -> str:
    """The first word and as many of the last ones as fit, unless these are few letters."""
    first, *rest = name.split(".")
    ends = (".".join(rest[at:]) for at in range(1, len(rest)))
    cut = (f"{first}…{end}" for end in ends if len(end) >= LEAST_END)
    return name if len(name) <= most else next((each for each in cut if len(each) <= most), name)


def _by_letters(name: str, most: int, head: int) -> str:
    return name if len(name) <= most else f"{name[:head]}…{name[-(most - head - 1) :]}"


def ordinal(number: int) -> str:
    """`2nd`, `13th`."""
    ending = "th" if number % 100 in (11, 12, 13) else {1: "st", 2: "nd", 3: "rd"}.get(number % 10, "th")
    return f"{number}{ending}"


def listed(names: Sequence[str], most: int = 3) -> str:
    """The first few names, and how many more there are."""
    more = len(names) - most
    return ", ".join(names[:most]) + (f" and {more} more" if more > 0 else "")
