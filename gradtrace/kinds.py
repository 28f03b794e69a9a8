"""The rows of activations and adjoints that one parameter gathers during one recorded step, per cell.

A *cell* is a set of samples that no grouping tells apart (a diagnosis and a sex, say); groups are unions of cells.
"""

from __future__ import annotations

import functools
import math
from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from gradtrace.decompose.dense import is_exact
from gradtrace.decompose.few import Few, Places
from gradtrace.decompose.gram import Gram
from gradtrace.decompose.problem import Problem
from gradtrace.decompose.tall import Tall
from gradtrace.decompose.triangle import Triangle
from gradtrace.hosted import is_here, picked, places_of
from gradtrace.schedule import beside
from gradtrace.sources import Source

MOST_PENDING = 2**18  # numbers in the rows that wait to be folded, unless two squares have more
MOST_SQUARES = 2**21  # numbers in the Gram matrices that are made beside each other, unless one for each cell has more


class KindRows:
    """The rows of one kind (activation or adjoint): kept while they are few, else folded, cell by cell.

    Never added to in place: parameters whose uses have the same rows (a layer's weight and its bias) share one, and
    what is computed of it.
    """

    def __init__(
        self,
        width: int,
        parts: Sequence[tuple[Tensor, Tensor]] = (),
        folded: Mapping[int, Tall] | None = None,
        heights: Mapping[int, int] | None = None,
    ) -> None:
        self.width, self.parts = width, tuple(parts)
        self.folded, self._heights = dict(folded or {}), Counter(heights or {})
        self._few: tuple[Few, Places] | None = None
        self._problems: dict[tuple[int, ...], Problem | None] = {}
        self._parted = False

    def plus(self, rows: Tensor, cells: Tensor) -> KindRows:
        """These and more rows (m, width), of `cells` (m,), which lie on the host."""
        most = rows_pending(self.width)
        found = KindRows(self.width, self.parts, self.folded, self._heights)
        for start in range(0, len(rows), most):
            some = rows[start : start + most].detach()
            if some.untyped_storage().nbytes() > 2 * some.numel() * some.element_size():
                some = some.clone()  # a part that waits must not hold the whole
            waiting = (*found.parts, (some, cells[start : start + most]))
            found = KindRows(self.width, waiting, found.folded, found._heights)
            if sum(len(part) for part, _ in waiting) >= most:
                found._fold()
        return found

    def part(self) -> None:
        """Copies the rows that wait, once: they are those of the model, and training may write over them."""
        if not self._parted:
            self.parts = tuple((rows.clone(), cells) for rows, cells in self.parts)
        self._parted = True

    def takes(self, source: Source) -> bool:
        """Whether rows can be folded as they are formed: more of them than columns, and squared on the CPU."""
        squared = not is_exact(source.values.dtype) and all(isinstance(one, Gram) for one in self.folded.values())
        many = len(source.owners) * source.height >= self.width
        return squared and many and is_here(source.values) and source.width == self.width

    def plus_source(self, source: Source, cells: Tensor) -> KindRows:
        """These and all rows of a source, whose units are of `cells` (units,); the rows are never all formed."""
        found = KindRows(self.width, self.parts, self.folded, self._heights)
        found._fold()
        tasks = list(_tasks(source, cells))
        flops = len(cells) * source.height * self.width**2
        squares = beside(lambda task: source.square(task[1]), tasks, flops=flops)
        for (cell, units), square in zip(tasks, squares, strict=True):
            have = found.folded.get(cell)
            assert have is None or isinstance(have, Gram)
            found.folded[cell] = Gram.of_square(square) if have is None else have.plus_square(square)
            found._heights[cell] += len(units) * source.height
        return found

    @property
    def _waiting(self) -> int:
        return sum(len(part) for part, _ in self.parts)

    @property
    def flops(self) -> float:
        """About what `reduce` takes."""
        return float(self._waiting * self.width * min(self._waiting, self.width)) if self._few is None else 0.0

    def reduce(self) -> None:
        """Makes them ready for `problem`."""
        if self.folded or self._waiting >= self.width:
            self._fold()
        elif self.parts and self._few is None:
            parts, cells = zip(*self.parts, strict=True)
            self._few = Few(_together(parts)), Places(_together(cells))

    def _fold(self) -> None:
        """Takes what waits to the cells, of which each is worked on by itself."""
        for rows, cells in self.parts:
            present = torch.unique(cells).tolist()
            added = functools.partial(self._added, rows, cells, len(present) == 1)
            on_cpu = is_here(rows)
            found = beside(added, present, flops=len(rows) * self.width**2) if on_cpu else list(map(added, present))
            for cell, (height, folded) in zip(present, found, strict=True):
                self._heights[cell] += height
                self.folded[cell] = folded
        self.parts = ()

    def _added(self, rows: Tensor, cells: Tensor, alone: bool, cell: int) -> tuple[int, Tall]:
        """The number of rows that a cell has among these, and what is kept of it with them."""
        own = rows if alone else picked(rows, places_of(cells == cell))
        have = self.folded.get(cell)
        return len(own), (_none(self.width, rows) if have is None else have).plus(own)

    def is_finite(self, cells: Sequence[int]) -> bool:
        """Whether every row of `cells` is, once they are reduced."""
        if self._few is not None:
            few, places = self._few
            return few.is_finite(places.of(cells))
        return all(self.folded[c].finite for c in cells if c in self.folded)

    def problem(self, cells: Sequence[int]) -> Problem | None:
        """The singular values of the rows that belong to `cells`, once they are reduced; None if there are no rows.

        One and the same every time, so that what is shared is decomposed once.
        """
        key = tuple(cells)
        if key not in self._problems:
            self._problems[key] = self._posed(cells)
        return self._problems[key]

    def _posed(self, cells: Sequence[int]) -> Problem | None:
        if self._few is not None:
            few, places = self._few
            index = places.of(cells)
            return few.problem(index) if index is None or len(index) else None
        found = [self.folded[c] for c in cells if c in self.folded]
        most = sum(self._heights[c] for c in cells)
        return type(found[0]).problem(found, most=most) if found else None


def _tasks(source: Source, cells: Tensor) -> Iterator[tuple[int, Tensor]]:
    """The units of every cell, in a few parts each: the same, whoever works on them."""
    index = {cell: places_of(cells == cell) for cell in torch.unique(cells).tolist()}
    parts = max(MOST_SQUARES // (source.width**2 * len(index)), 1)
    fewest = max(math.ceil(16 * source.most_rows / max(source.height, 1)), 1)
    for cell, units in index.items():
        yield from ((cell, some) for some in units.split(max(math.ceil(len(units) / parts), fewest)))


def rows_pending(width: int) -> int:
    """How many rows wait to be folded."""
    return max(2 * width, MOST_PENDING // max(width, 1))


def _none(width: int, like: Tensor) -> Tall:
    return Triangle.none(width, like) if is_exact(like.dtype) else Gram.none(width, like)


def _together(parts: Sequence[Tensor]) -> Tensor:
    return torch.cat(list(parts)) if len(parts) > 1 else parts[0]


@dataclass
class Shared:
    """What several weights of one call have in common: the same rows added to the same rows are computed once.

    alive: the storages that outlive the call's share in the step, so that an address stands for one tensor.
    """

    alive: frozenset[int]
    _found: dict[Hashable, tuple[Tensor, KindRows]] = field(default_factory=dict)

    def plus(self, have: KindRows | None, rows: Tensor, cells: Tensor) -> KindRows:
        """`have` and more rows; None stands for no rows yet."""
        before = KindRows(rows.shape[1]) if have is None else have
        key = rows.data_ptr(), tuple(rows.shape), rows.stride(), rows.dtype, rows.is_conj()
        return self._once(rows, (id(have), *key), cells, lambda: before.plus(rows, cells))

    def plus_source(self, have: KindRows | None, source: Source, cells: Tensor) -> KindRows:
        """`have` and all rows of a source that it `takes`."""
        before = KindRows(source.width) if have is None else have
        return self._once(source.values, (id(have), source.key), cells, lambda: before.plus_source(source, cells))

    def _once(self, values: Tensor, key: Hashable, cells: Tensor, add: Callable[[], KindRows]) -> KindRows:
        if values.untyped_storage().data_ptr() not in self.alive:
            return add()
        if key not in self._found or not torch.equal(self._found[key][0], cells):
            self._found[key] = (cells, add())
        return self._found[key][1]


@dataclass
class LookupRows:
    """One-hot rows, never formed: their singular values are the square roots of how often each index was used."""

    height: int
    counts: dict[int, Tensor] = field(default_factory=dict)

    def add(self, indices: Tensor, cells: Tensor, padding: int | None = None) -> None:
        """Counts indices; what looks up `padding` is a row of zeros."""
        for cell in torch.unique(cells).tolist():
            own = picked(indices, places_of(cells == cell))
            count = torch.zeros(self.height, dtype=torch.int64, device=own.device)
            count.index_add_(0, own, torch.ones_like(own))  # unlike bincount it need not look for the largest
            if padding is not None:
                count[padding] = 0
            self.counts[cell] = self.counts[cell] + count if cell in self.counts else count

    def spectrum(self, cells: Sequence[int]) -> Tensor:
        """Singular values of the rows that belong to `cells`, descending."""
        counts = [self.counts[c] for c in cells if c in self.counts]
        if not counts:
            return torch.zeros(0, dtype=torch.float64)
        return sum(counts[1:], counts[0]).double().sqrt().sort(descending=True).values
