"""The values of an array, some rows at a time, decoded chunk by chunk so that a bad one takes no other with it."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import numpy as np

from gradtrace.store.chunks import Packing
from gradtrace.store.places.keys import Keys
from gradtrace.store.reading import guard
from gradtrace.store.schema import FILLS, STRING

AT_ONCE = 8  # chunks fetched and decoded together
Index = tuple[int, ...]


@contextmanager
def _together(count: int) -> Iterator[Callable[..., Iterable[Any]]]:
    """What maps a function over so many things: several at once, where there are several."""
    if count == 1:
        yield map
        return
    with ThreadPoolExecutor(AT_ONCE) as pool:
        yield pool.map


class Blocks:
    """An array of a store. Each row of chunks is decoded once, if rows are asked for in order, and one is held.

    bad: index of a chunk that cannot be read -> why. lost: indices of chunks that are not there.
    """

    def __init__(self, keys: Keys, path: str, member: Mapping[str, Any]) -> None:
        self.path = path
        self.shape: tuple[int, ...] = tuple(member["shape"])
        self.chunks = Packing.of(member).shape
        self.bad: dict[Index, str] = {}
        self.lost: set[Index] = set()
        self._keys, self._packing = keys, Packing.of(member)
        self._held: tuple[int, np.ndarray] | None = None

    def key(self, index: Index) -> str:
        """The key of a chunk."""
        return f"{self.path}/c.{'.'.join(map(str, index))}"

    def rows(self, start: int, stop: int) -> np.ndarray:
        """Rows of the array; fill values where a chunk is not there or cannot be read."""
        size = self.chunks[0]
        parts = [
            self._row_of_chunks(number)[max(0, start - number * size) : max(0, stop - number * size)]
            for number in range(start // size, math.ceil(stop / size))
        ]
        return np.concatenate(parts) if parts else np.empty((0, *self.shape[1:]), self._dtype)

    def until_lost(self) -> np.ndarray:
        """The rows before the first row of chunks that lacks one, of an array that has all of them."""
        found: list[np.ndarray] = []
        for start in range(0, self.shape[0], self.chunks[0]):
            rows = self.rows(start, min(start + self.chunks[0], self.shape[0]))
            if self.lost:
                break
            found.append(rows)
        return np.concatenate(found) if found else self.rows(0, 0)

    def read(self) -> None:
        """Reads every chunk and keeps none: what is wrong with them is then in `bad` and `lost`."""
        grid = [range(math.ceil(size / chunk)) for size, chunk in zip(self.shape, self.chunks, strict=True)]
        indices = itertools.product(*grid)
        with ThreadPoolExecutor(AT_ONCE) as pool:
            while some := list(itertools.islice(indices, AT_ONCE)):
                list(pool.map(self._chunk, some))

    def is_bad(self, start: int, stop: int) -> bool:
        """Whether a chunk of these rows cannot be read."""
        return any(start < (i[0] + 1) * self.chunks[0] and i[0] * self.chunks[0] < stop for i in self.bad)

    def lacks(self, place: Index) -> str | None:
        """The key of the chunk that holds this place, the leading axes of it, where that is not there."""
        found = tuple(at // size for at, size in zip(place, self.chunks, strict=False))
        lost = next((index for index in self.lost if index[: len(found)] == found), None)
        return None if lost is None else self.key(lost)

    @property
    def _dtype(self) -> np.dtype[Any]:
        return np.dtype(object if self._packing.dtype == STRING else self._packing.dtype)

    def _row_of_chunks(self, number: int) -> np.ndarray:
        """The rows that the chunks of this number along the first axis hold."""
        if self._held is None or self._held[0] != number:
            rows = min(self.chunks[0], self.shape[0] - number * self.chunks[0])
            block = np.full((rows, *self.shape[1:]), FILLS[self._packing.dtype], self._dtype)
            indices = list(self._indices(number))
            with _together(len(indices)) as each:
                for index, chunk in zip(indices, each(self._chunk, indices), strict=True):
                    if chunk is not None:
                        self._place(block, index, chunk)
            self._held = (number, block)
        return self._held[1]

    def _indices(self, number: int) -> Iterator[Index]:
        grid = (math.ceil(size / chunk) for size, chunk in zip(self.shape[1:], self.chunks[1:], strict=True))
        yield from ((number, *rest) for rest in np.ndindex(*grid))

    def _place(self, block: np.ndarray, index: Index, chunk: np.ndarray) -> None:
        begin = [0, *(at * size for at, size in zip(index[1:], self.chunks[1:], strict=True))]
        where = tuple(slice(at, at + size) for at, size in zip(begin, chunk.shape, strict=True))
        inside = block[where]
        inside[...] = chunk[tuple(map(slice, inside.shape))]

    def _chunk(self, index: Index) -> np.ndarray | None:
        """A chunk; None where there is none, or it cannot be read, which is noted."""
        try:
            data = guard.get(self._keys, self.key(index), self._packing.most)
            if data is not None:
                return self._packing.unpack(data)
            self.lost.add(index)
        except (OSError, RuntimeError, ValueError) as error:
            self.bad[index] = str(error)
        return None
