"""From labels to groups: one label per sample and grouping, joint cells, and which cells make up which group."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NoReturn

import numpy as np
import torch
from torch import Tensor

from gradtrace.errors import GroupError

MISSING = "<missing>"
ALL = "all"
MOST_CELLS = 1024

Label = str | int | None


@dataclass(frozen=True)
class Labels:
    """The labels of one batch: `of[grouping]` has one entry per sample; None where it is missing."""

    of: Mapping[str, tuple[Label, ...]]
    n_samples: int

    @classmethod
    def read(cls, groups: Any) -> Labels | None:
        """Labels from what a user gives: a mapping of groupings, or one bare sequence; None for no groups."""
        if groups is None:
            return None
        if not isinstance(groups, Mapping):
            groups = {"group": groups}
        if not groups:
            return None
        of = {_grouping_name(name): _labels(name, values) for name, values in groups.items()}
        lengths = {name: len(values) for name, values in of.items()}
        if len(set(lengths.values())) > 1:
            raise GroupError(
                f"The groupings have different numbers of labels: {lengths}. Give one label per sample in each."
            )
        return cls(of, next(iter(lengths.values())))


def check_types(labels: Labels | None, known: dict[str, tuple[str, Label]]) -> None:
    """Raises where a grouping has strings and integers, in one batch or in two: 1 and "1" would be one group by name.

    known: per grouping the type met so far and a label of it; added to.
    """
    for grouping, values in labels.of.items() if labels else ():
        for label in dict.fromkeys(values):
            if label is None:
                continue
            kind = "integer" if isinstance(label, int) else "string"
            before, example = known.setdefault(grouping, (kind, label))
            if before != kind:
                raise GroupError(
                    f"Grouping {grouping!r} has the {kind} label {label!r} and, in this batch or an earlier one, the "
                    f"{before} label {example!r}. Give all labels of a grouping as strings or all as integers, in "
                    "every step and probe."
                )


def _grouping_name(name: Any) -> str:
    if not isinstance(name, str) or not name:
        raise GroupError(f"A grouping's name must be a non-empty string, not {name!r}.")
    return name


def _labels(name: str, values: Any) -> tuple[Label, ...]:
    if isinstance(values, (str, bytes)):
        raise GroupError(
            f"Grouping {name!r} got the text {values!r}; give one label per sample, as a list, array or tensor."
        )
    if isinstance(values, Tensor):
        values = values.detach().cpu().numpy()
    dimensions = np.ndim(values) if isinstance(values, np.ndarray) else None
    if dimensions is not None and dimensions != 1:
        raise GroupError(
            f"Grouping {name!r} has labels of shape {np.shape(values)}; labels belong to samples, one each. "
            "Labels per position are not groups of samples: reduce them to one label per sample."
        )
    try:
        items = values.tolist() if isinstance(values, np.ndarray) else [_plain(v) for v in values]
    except TypeError as error:
        raise GroupError(
            f"Grouping {name!r} is {type(values).__name__}; give one label per sample, as a sequence."
        ) from error
    plain = all(type(item) is str for item in items)
    return tuple(items if plain else (_label(name, item) for item in items))


def _plain(item: Any) -> Any:
    return item.item() if hasattr(item, "item") and getattr(item, "ndim", 1) == 0 else item


def _label(name: str, item: Any) -> Label:
    if item is None or (isinstance(item, float) and np.isnan(item)) or type(item).__name__ in ("NAType", "NaTType"):
        return None
    if isinstance(item, (bool, np.bool_)):
        return str(bool(item))
    if isinstance(item, float):
        if item.is_integer():
            return int(item)  # a column with missing entries turns integers into floats
        raise GroupError(
            f"Grouping {name!r} has the continuous label {item!r}; groups need strings or integers. "
            "Cut it into ranges first, for example with numpy.digitize or pandas.cut."
        )
    if isinstance(item, (int, np.integer)):
        return int(item)
    if isinstance(item, str):
        return item
    if isinstance(item, (list, tuple, np.ndarray, Tensor)):
        raise GroupError(
            f"Grouping {name!r} has several labels for one sample ({item!r}); labels belong to samples, one each. "
            "Reduce labels per position to one label per sample."
        )
    raise GroupError(
        f"Grouping {name!r} has the label {item!r} of type {type(item).__name__}; use strings or integers."
    )


@dataclass
class Cells:
    """The joint cells met in one step; grows as batches with new combinations of labels arrive."""

    groupings: tuple[str, ...] = ()
    _cells: dict[tuple[Label, ...], int] = field(default_factory=dict)
    counts: dict[int, int] = field(default_factory=dict)

    OWNERLESS = 0  # the cell of rows that belong to no sample: part of the whole, of no group

    def assign(self, labels: Labels | None, n_samples: int, *, count: bool = True) -> Tensor:
        """(samples + 1,) the cell of every sample; the last entry is that of ownerless rows."""
        if labels is None:
            joint: Sequence[tuple[Label, ...]] = [()] * n_samples
        else:
            if not self._cells:
                self.groupings = tuple(labels.of)
            if tuple(labels.of) != self.groupings:
                raise GroupError(
                    f"This batch has the groupings {list(labels.of)}, an earlier one of the same step had "
                    f"{list(self.groupings)}. Give every batch of a step the same groupings."
                )
            joint = list(zip(*labels.of.values(), strict=True))
        of_sample = [self._cells.setdefault(key, len(self._cells) + 1) for key in joint]
        if len(self._cells) > MOST_CELLS:
            refuse_cells({g: len({key[i] for key in self._cells}) for i, g in enumerate(self.groupings)})
        if count:
            for cell, number in Counter(of_sample).items():
                self.counts[cell] = self.counts.get(cell, 0) + number
        return torch.tensor([*of_sample, self.OWNERLESS])

    @property
    def n_cells(self) -> int:
        return len(self._cells) + 1

    def groups(self) -> dict[str, list[int]]:
        """Group name -> its cells: "all" first, then every grouping's labels in order."""
        found: dict[str, list[int]] = {ALL: [self.OWNERLESS, *self._cells.values()]}
        for place, grouping in enumerate(self.groupings):
            labels = sorted({key[place] for key in self._cells}, key=_order)
            for label in labels:
                cells = [c for key, c in self._cells.items() if key[place] == label and type(key[place]) is type(label)]
                found.setdefault(group_name(grouping, label), []).extend(cells)
        return found

    def n_samples(self, cells: Sequence[int]) -> int:
        return sum(self.counts.get(cell, 0) for cell in cells)


def refuse_cells(sizes: Mapping[str, int]) -> NoReturn:
    """Raises what there is to say of more than MOST_CELLS cells; `sizes`: per grouping its number of labels."""
    most = max(sizes, key=lambda grouping: sizes[grouping])
    raise GroupError(
        f"The groupings cut the samples into more than {MOST_CELLS} cells; numbers of labels: {dict(sizes)}. Leave out "
        f"{most!r}, which has the most labels, or merge its labels."
    )


def group_name(grouping: str, label: Label) -> str:
    """`"<grouping>=<label>"`, with `<missing>` for a label that is not there."""
    return f"{grouping}={MISSING if label is None else label}"


def _order(label: Label) -> tuple[int, int, str]:
    if label is None:
        return (2, 0, "")
    return (0, label, "") if isinstance(label, int) else (1, 0, label)
