"""Rows of activations or adjoints that are formed when they are needed: some at a time, by any thread.

What a convolution multiplies by its weight, the matrix of patches, is many times larger than the input. So an adapter
can say how rows are made instead of making them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Hashable, Iterator
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from gradtrace.decompose.dense import double_of
from gradtrace.decompose.lapack import squared
from gradtrace.hosted import picked

MOST_NUMBERS = 2**19  # of rows that one thread forms at once
FEWEST_ROWS = 1024  # unless that is more: products of fewer are slow


@dataclass(frozen=True)
class Source(ABC):
    """Where rows come from.

    values: the tensor that they are made of, with one unit after the other along its first axis: a row, or a sample
    with all of its positions. owners: (units,) the sample that owns each, -1 for none; on the host, as are units.
    """

    values: Tensor
    owners: Tensor

    @property
    @abstractmethod
    def width(self) -> int:
        """Numbers in a row."""

    @property
    @abstractmethod
    def height(self) -> int:
        """Rows of a unit."""

    @abstractmethod
    def blocks(self, units: Tensor) -> Iterator[Tensor]:
        """(rows, width) in double precision: all rows of these units (number,), in any order."""

    def square(self, units: Tensor) -> Tensor:
        """(width, width) the Gram matrix of all rows of these units, of which there is one at least."""
        blocks = self.blocks(units)
        total = squared(next(blocks))
        for block in blocks:
            total += squared(block)
        return total

    @property
    def key(self) -> Hashable:
        """Equal for sources of the same rows, as long as the storage of `values` lives."""
        values = self.values
        return type(self), values.data_ptr(), tuple(values.shape), values.stride(), values.dtype, values.is_conj()

    @property
    def wide(self) -> torch.dtype:
        """The dtype of double precision that rows are formed in."""
        return double_of(self.values.dtype)

    @property
    def most_rows(self) -> int:
        """Rows that are formed at once."""
        return max(MOST_NUMBERS // max(self.width, 1), FEWEST_ROWS)


@dataclass(frozen=True)
class MatrixSource(Source):
    """The rows of a matrix, `values` (rows, width)."""

    @property
    def width(self) -> int:
        return self.values.shape[1]

    @property
    def height(self) -> int:
        return 1

    def blocks(self, units: Tensor) -> Iterator[Tensor]:
        for some in units.split(self.most_rows):
            yield picked(self.values, some).to(self.wide)


@dataclass(frozen=True)
class ChannelSource(Source):
    """One row per sample and position, one column per channel: `values` (samples, channels, positions...).

    groups: of channels, which give rows of their own.
    """

    groups: int = 1

    @property
    def width(self) -> int:
        return self.values.shape[1] // self.groups

    @property
    def height(self) -> int:
        return self.groups * prod(self.values.shape[2:])

    def blocks(self, units: Tensor) -> Iterator[Tensor]:
        for some in units.split(max(self.most_rows // max(self.height, 1), 1)):
            here = picked(self.values, some).flatten(2).unflatten(1, (self.groups, self.width))
            ordered = here.permute(2, 1, 0, 3)
            columns = torch.empty(ordered.shape, dtype=self.wide, device=here.device).copy_(ordered)
            yield columns.flatten(1).T

    @property
    def key(self) -> Hashable:
        return super().key, self.groups
