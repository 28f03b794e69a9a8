"""The groups of a step as a plan sees them: what share of the samples each has, and of how many cells it is made."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from gradtrace.errors import GroupError
from gradtrace.groups import ALL, MOST_CELLS, Cells, Labels, group_name, refuse_cells


@dataclass(frozen=True)
class Share:
    """One group: its part of all samples, and how many cells it is made of."""

    group: str
    samples: float
    cells: int


@dataclass(frozen=True)
class Partition:
    """The groups that are in a step, "all" first, and the occupied cells. stored: groups that the run will have."""

    shares: tuple[Share, ...]
    cells: int
    stored: int

    @classmethod
    def of(cls, groups: Any, n_samples: int | None) -> Partition:
        """From labels as `spectra` takes them, or from a mapping: grouping -> how many labels it has.

        Raises GroupError where there are too many cells, or as many labels as no batch of `n_samples` has.
        """
        if isinstance(groups, Mapping) and groups and all(_is_count(value) for value in groups.values()):
            return _of_counts(groups, n_samples)
        labels = Labels.read(groups)
        if labels is None:
            return cls((Share(ALL, 1.0, 1),), 1, 1)
        if n_samples is not None and labels.n_samples != n_samples:
            raise GroupError(
                f"There are {labels.n_samples} labels per grouping, and {n_samples} samples in the batch that the "
                "graph was traced with. Give that batch's labels, or per grouping the number of its labels."
            )
        cells = Cells()
        cells.assign(labels, labels.n_samples)
        shares = tuple(
            Share(name, cells.n_samples(of) / labels.n_samples, len(set(of) - {Cells.OWNERLESS}))
            for name, of in cells.groups().items()
        )
        return cls(shares, cells.n_cells - 1, len(shares))


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _of_counts(counts: Mapping[str, int], n_samples: int | None) -> Partition:
    """Groups of equal size, and every cell occupied as far as the samples reach."""
    for grouping, count in counts.items():
        if count < 1:
            raise GroupError(f"Grouping {grouping!r} cannot have {count} labels; give how many it has, 1 or more.")
    most = math.inf if n_samples is None else n_samples
    cells = int(min(math.prod(counts.values()), most))
    if cells > MOST_CELLS:
        refuse_cells(counts)
    shares = [Share(ALL, 1.0, cells)]
    for grouping, count in counts.items():
        present = int(min(count, most))
        shares += [Share(group_name(grouping, i), 1 / present, max(1, cells // present)) for i in range(present)]
    return Partition(tuple(shares), cells, 1 + sum(counts.values()))
