"""Recordings cut into windows: what the demo's three networks learn from, and the groups it watches.

Every network gets the same question: *the right half from the left half*. For brains, the right hemisphere's activity
(or connectivity) from the left hemisphere's; for digits, the right half of the picture from the left half. The target
is a signal, never a group: a label that is also the grouping would make the groups' gradients differ by construction.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Windows:
    """Windows of several people: the left half, the right half, who, and the labels of two crossed groupings.

    left, right: (windows, time, regions) float32. labels: grouping -> one string per window.
    """

    left: np.ndarray
    right: np.ndarray
    person: np.ndarray
    labels: Mapping[str, np.ndarray]

    def __len__(self) -> int:
        return len(self.person)

    def take(self, chosen: np.ndarray) -> Windows:
        labels = {name: values[chosen] for name, values in self.labels.items()}
        return Windows(self.left[chosen], self.right[chosen], self.person[chosen], labels)

    @property
    def cells(self) -> np.ndarray:
        """Which combination of the groupings' labels each window belongs to, as (windows,) integers."""
        joined = [" ".join(row) for row in zip(*self.labels.values(), strict=True)]
        return np.unique(joined, return_inverse=True)[1]


@dataclass(frozen=True)
class Recordings:
    """A demo's data, and the words in which it is described."""

    windows: Windows
    title: str  # for the picture
    story: str  # what the data are and what was done to them
    caveat: str  # what a difference between the groups may come from
    features: Callable[[np.ndarray], np.ndarray]  # half windows -> (windows, features), for a network without time


def split_people(windows: Windows, *, held_out: int, seed: int) -> tuple[Windows, Windows]:
    """Training and held-out windows: of each cohort (the first grouping), `held_out` people drawn at random.

    Windows of one person never sit on both sides: overlapping windows of one scan are nearly copies.
    """
    rng = np.random.default_rng(seed)
    cohort = next(iter(windows.labels.values()))
    people: list[str] = []
    for label in np.unique(cohort):
        members = np.unique(windows.person[cohort == label])
        people.extend(rng.choice(members, size=min(held_out, len(members) - 1), replace=False))
    side = np.isin(windows.person, people)
    return windows.take(~side), windows.take(side)


def balanced_batches(windows: Windows, *, per_cell: int, rng: np.random.Generator) -> Iterator[np.ndarray]:
    """One epoch of index arrays, each with `per_cell` windows of every cell (cohort and half), none drawn twice.

    Equal numbers keep the size of a group out of the comparison: the mean gradient of fewer samples is noisier, hence
    longer and of higher rank. Windows of the larger cohort that an epoch leaves out are drawn in others.
    """
    cells = windows.cells
    shuffled = [rng.permutation(np.flatnonzero(cells == cell)) for cell in np.unique(cells)]
    for start in range(0, min(map(len, shuffled)) - per_cell + 1, per_cell):
        yield np.concatenate([members[start : start + per_cell] for members in shuffled])
