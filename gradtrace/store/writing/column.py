"""Arrays as they grow: the block of rows now being filled, and the whole chunks it becomes."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import numpy as np
from google_crc32c import value
from numcodecs.blosc import Blosc  # type: ignore[import-untyped]

from gradtrace.store.metadata import ArraySpec
from gradtrace.store.places.keys import Keys
from gradtrace.store.schema import FILLS, LABELS_CHUNK, STRING
from gradtrace.store.writing.past import Past

_BLOSC = Blosc(cname="lz4", clevel=5, shuffle=Blosc.BITSHUFFLE)


class Column:
    """One array with rows along its first axis.

    Only the current block of rows is in memory. `write` puts the block's chunks whole, so a chunk that readers already
    see is replaced by one that begins with the same rows. A chunk of nothing but fill values is not written.
    """

    def __init__(self, spec: ArraySpec, keys: Keys) -> None:
        self.spec = spec
        self.inner: tuple[int, ...] = (0,) * (len(spec.dims) - 1)
        self._fill = FILLS[spec.dtype]
        self._keys = keys
        self._block = 0
        self._dirty = False
        self._old = False  # whether chunks of this block may be there from before
        self._rows = self._empty()
        keys.make(spec.path)

    def resume(self, past: Past, rows: int) -> None:
        """Go on after `rows` rows of an array that is there already.

        The chunks of the current block may hold rows that were never committed, or that are given up: they are written
        anew, all of them.
        """
        self.grow(past.inner(self.spec.path))
        self._block, offset = divmod(rows, self.spec.chunks[0])
        self._old = offset > 0
        if offset:
            inner = tuple(slice(0, size) for size in self.inner)
            self._rows[(slice(0, offset), *inner)] = past.array(self.spec.path, rows - offset, rows)
            self._dirty = True

    def grow(self, inner: Sequence[int]) -> None:
        """Make room for at least `inner` entries along the axes after the first."""
        if all(new <= old for new, old in zip(inner, self.inner, strict=True)):
            return
        self.inner = tuple(max(pair) for pair in zip(inner, self.inner, strict=True))
        before, self._rows = self._rows, self._empty()
        self._rows[tuple(slice(0, size) for size in before.shape)] = before

    def row(self, index: int) -> np.ndarray:
        """A view of row `index`, to be filled in. Rows of an earlier block are gone: it must not come before it."""
        block, offset = divmod(index, self.spec.chunks[0])
        if block != self._block:
            self.write()
            self._rows[...] = self._fill
            self._block, self._old = block, False
        self._dirty = True
        return self._rows[offset, ...]

    def write(self) -> None:
        """Put the chunks of the current block, if it has changed since they were last put."""
        if not self._dirty:
            return
        inner = self.spec.chunks[1:]
        grid = tuple(size // chunk for size, chunk in zip(self._rows.shape[1:], inner, strict=True))
        with self._keys.together():
            for index in np.ndindex(grid):
                where = tuple(slice(i * chunk, (i + 1) * chunk) for i, chunk in zip(index, inner, strict=True))
                chunk = np.ascontiguousarray(self._rows[(slice(None), *where)])
                if not self._is_fill(chunk):
                    put(self._keys, self.spec, (self._block, *index), _BLOSC.encode(chunk))
                elif self._old:
                    self._keys.delete(self.spec.key((self._block, *index)))
        self._dirty = False

    def shape(self, rows: int) -> tuple[int, ...]:
        """The array's shape when it has `rows` rows."""
        return (rows, *self.inner)

    def _empty(self) -> np.ndarray:
        chunks = self.spec.chunks
        room = tuple(math.ceil(size / chunk) * chunk for size, chunk in zip(self.inner, chunks[1:], strict=True))
        return np.full((chunks[0], *room), self._fill, dtype=self.spec.dtype)

    def _is_fill(self, chunk: np.ndarray) -> bool:
        if math.isnan(self._fill):
            return bool(np.isnan(chunk).all())
        return self.spec.dtype == "uint8" and not chunk.any()


class Labels:
    """A coordinate of strings that only ever grows at its end, so that a reader's shorter snapshot stays right."""

    def __init__(self, path: str, dim: str, keys: Keys, past: Past | None = None) -> None:
        known = past.names(path) if past else ()
        there = past.spec(path) if past else None
        self.spec = there or ArraySpec(path, (dim,), STRING, (LABELS_CHUNK,))
        self.positions = {name: place for place, name in enumerate(known)}
        self._keys = keys
        self._unwritten = len(known)
        keys.make(path)

    def __len__(self) -> int:
        return len(self.positions)

    def find(self, names: Iterable[str]) -> list[int]:
        """The positions of `names`, which are added where they are new."""
        return [self.positions.setdefault(name, len(self.positions)) for name in names]

    def write(self) -> None:
        """Put the chunks that hold labels added since the last time."""
        names = list(self.positions)
        for chunk in range(self._unwritten // LABELS_CHUNK, math.ceil(len(names) / LABELS_CHUNK)):
            if self._unwritten < len(names):
                part = names[chunk * LABELS_CHUNK : (chunk + 1) * LABELS_CHUNK]
                put(self._keys, self.spec, (chunk,), _encode_strings(part + [""] * (LABELS_CHUNK - len(part))))
        self._unwritten = len(names)


def put(keys: Keys, spec: ArraySpec, index: tuple[int, ...], data: bytes) -> None:
    """Put the chunk at an index of the chunk grid, packed, with its checksum."""
    keys.put(spec.key(index), data + value(data).to_bytes(4, "little") if spec.checksum else data)


def _encode_strings(strings: Sequence[str]) -> bytes:
    """The zarr codec vlen-utf8: a count, then each string's length and bytes, lengths as little-endian uint32."""
    texts = [text.encode() for text in strings]
    return b"".join((len(texts).to_bytes(4, "little"), *(len(t).to_bytes(4, "little") + t for t in texts)))
