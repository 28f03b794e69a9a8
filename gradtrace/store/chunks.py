"""How the bytes of a chunk are packed, and whether they can be unpacked without harm: they say themselves how long
they will be, and a decoder believes them."""

from __future__ import annotations

import math
import reprlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from gradtrace.store.metadata import CHECKSUM
from gradtrace.store.schema import FILLS, STRING

MOST_CHUNK = 1 << 29  # bytes of a chunk, unpacked
MOST_TEXT = 1 << 26  # bytes of a chunk of names
MOST_AXES, MOST_SIZE = 8, 1 << 48
BLOSC_HEADER, CRC = 16, 4
NOWHERE = 2**64 - 1  # where a chunk is that a shard lacks
COMPRESSORS = ("blosclz", "lz4", "lz4hc", "snappy", "zlib", "zstd")
SHUFFLES = ("noshuffle", "shuffle", "bitshuffle")
NUMBERS = ("float32", "float64", "int64", "uint8")


@dataclass(frozen=True)
class Packing:
    """What the bytes of a chunk are: numbers, compressed, or strings; perhaps followed by their checksum.

    inner: of a shard, how the chunks in it are packed; index_first: whether it begins with their index.
    """

    dtype: str
    shape: tuple[int, ...]
    checksum: bool = False
    inner: Packing | None = None
    index_first: bool = False

    @classmethod
    def of(cls, document: Mapping[str, Any]) -> Packing:
        """That of an array's chunks, or a ValueError that says what of it is not understood."""
        dtype, shape = document.get("data_type"), _shape(document.get("chunk_grid"))
        if dtype != STRING and dtype not in NUMBERS:
            raise ValueError(f"its type is {shown(dtype)}, not one of {', '.join(NUMBERS)}, {STRING}")
        return _packing(str(dtype), shape, document.get("codecs"))

    @property
    def size(self) -> int:
        """Bytes of a chunk of numbers, unpacked."""
        return math.prod(self.shape) * np.dtype(self.dtype).itemsize

    @property
    def most(self) -> int:
        """The most bytes that can stand for a chunk."""
        if self.inner is not None:
            return self._grid_size * self.inner.most + self.index_size
        return (MOST_TEXT if self.dtype == STRING else self.size) + BLOSC_HEADER + CRC

    @property
    def index_size(self) -> int:
        """Bytes of a shard's index."""
        return 16 * self._grid_size + CRC

    def check(self, data: bytes) -> None:
        """None, or a ValueError where unpacking would fail, or would take more memory than the chunk has."""
        if self.inner is not None:
            for start, stop in self._places(data):
                self.inner.check(data[start:stop])
            return
        body = self._body(data)
        if self.dtype == STRING:
            _check_strings(body, math.prod(self.shape))
            return
        if len(body) < BLOSC_HEADER:
            raise ValueError(f"it has {len(data)} bytes, which is not even a header")
        length, packed = int.from_bytes(body[4:8], "little"), int.from_bytes(body[12:16], "little")
        if packed != len(body):
            raise ValueError(f"its header says that it has {packed} bytes, and it has {len(body)}")
        if length != self.size:
            raise ValueError(f"it holds {length} bytes of numbers, and a chunk of this array has {self.size}")

    def unpack(self, data: bytes) -> np.ndarray:
        """The chunk, of this shape; strings as objects. A ValueError or RuntimeError where it cannot be had."""
        self.check(data)
        if self.inner is not None:
            return self._unpack_shard(data, self.inner)
        body = self._body(data)
        if self.dtype == STRING:
            return np.array(_strings(body), dtype=object).reshape(self.shape)
        from numcodecs.blosc import Blosc  # type: ignore[import-untyped]

        return np.frombuffer(Blosc().decode(body), np.dtype(self.dtype).newbyteorder("<")).reshape(self.shape)

    def _body(self, data: bytes) -> bytes:
        """The bytes without their checksum, which is right."""
        if not self.checksum:
            return data
        from google_crc32c import value

        body = data[:-CRC]
        if value(bytes(body)) != int.from_bytes(data[-CRC:], "little"):
            raise ValueError("its checksum is wrong: some of its bytes have changed")
        return body

    @property
    def _grid(self) -> tuple[int, ...]:
        assert self.inner is not None
        return tuple(size // part for size, part in zip(self.shape, self.inner.shape, strict=True))

    @property
    def _grid_size(self) -> int:
        return math.prod(self._grid)

    def _places(self, data: bytes) -> list[tuple[int, int]]:
        """Of a shard, where each chunk begins and ends that is there."""
        return [(start, start + length) for start, length in self._index(data).tolist() if start != NOWHERE]

    def _index(self, data: bytes) -> np.ndarray:
        part = data[: self.index_size] if self.index_first else data[-self.index_size :]
        return self.check_index(part, len(data))

    def check_index(self, part: bytes, size: int) -> np.ndarray:
        """(chunks, 2): where each of a shard's chunks begins, and its length; a ValueError where there it has no
        place. part: the bytes of the index. size: of the shard, or the most that it may have."""
        if len(part) != self.index_size:
            raise ValueError("it is too short to hold its index")
        body = Packing("uint8", (len(part) - CRC,), checksum=True)._body(part)
        index = np.frombuffer(body, "<u8").reshape(-1, 2)
        starts, lengths = index[(index != NOWHERE).any(axis=1)].T
        first = self.index_size if self.index_first else 0
        if (starts < first).any() or (starts > size).any() or (lengths > size - np.minimum(starts, size)).any():
            raise ValueError("its index points beyond its chunks")
        return index

    def _unpack_shard(self, data: bytes, inner: Packing) -> np.ndarray:
        whole = np.full(self.shape, FILLS[self.dtype], self.dtype)
        for place, (start, length) in zip(np.ndindex(self._grid), self._index(data).tolist(), strict=True):
            if start != NOWHERE:
                where = tuple(slice(i * size, (i + 1) * size) for i, size in zip(place, inner.shape, strict=True))
                whole[where] = inner.unpack(data[start : start + length])
        return whole


def _shape(grid: Any) -> tuple[int, ...]:
    """The shape of a chunk, if it is one."""
    if not isinstance(grid, Mapping) or grid.get("name") != "regular":
        raise ValueError("its chunks form no regular grid")
    found = grid.get("configuration")
    return _sizes(found.get("chunk_shape") if isinstance(found, Mapping) else None, "its chunk shape")


def _sizes(found: Any, what: str) -> tuple[int, ...]:
    if not is_sizes(found) or 0 in found:
        raise ValueError(f"{what} is {shown(found)}, which is none")
    return tuple(found)


def is_sizes(found: Any) -> bool:
    """Whether something is the shape of an array."""
    few = isinstance(found, list) and len(found) <= MOST_AXES
    return few and all(type(size) is int and 0 <= size <= MOST_SIZE for size in found)


def _packing(dtype: str, shape: tuple[int, ...], codecs: Any) -> Packing:
    """What these codecs make of a chunk."""
    names, settings = _named(codecs)
    if names == ["sharding_indexed"]:
        return _sharded(dtype, shape, settings[0])
    checksum = names[-1] == CHECKSUM
    usual = ["vlen-utf8"] if dtype == STRING else ["bytes", "blosc"]
    if names != usual + [CHECKSUM] * checksum:
        raise ValueError(f"its codecs are {', '.join(names)}, which is not how a run is written")
    item = 1 if dtype == STRING else np.dtype(dtype).itemsize
    if dtype != STRING:
        _check_settings(settings[0], settings[1], item)
    if math.prod(shape) * item > MOST_CHUNK:
        raise ValueError(f"its chunks are of shape {shape}, which is more than {MOST_CHUNK >> 20} MB")
    return Packing(dtype, shape, checksum)


def _named(codecs: Any) -> tuple[list[str], list[Mapping[str, Any]]]:
    """The names of codecs, and their settings."""
    if not isinstance(codecs, list) or not 0 < len(codecs) < 4 or not all(isinstance(one, Mapping) for one in codecs):
        raise ValueError(f"its codecs are {shown(codecs)}, which is not how a run is written")
    settings = [codec.get("configuration", {}) for codec in codecs]
    if not all(isinstance(setting, Mapping) for setting in settings):
        raise ValueError(f"the settings of its codecs are none: {shown(codecs)}")
    return [shown(codec.get("name")).strip("'") for codec in codecs], settings


def _check_settings(packed: Mapping[str, Any], blosc: Mapping[str, Any], item: int) -> None:
    if item > 1 and packed.get("endian") != "little":
        raise ValueError("its numbers are not little-endian")
    fine = (
        blosc.get("typesize") == item
        and blosc.get("cname") in COMPRESSORS
        and blosc.get("shuffle") in SHUFFLES
        and type(blosc.get("clevel")) is int
        and type(blosc.get("blocksize")) is int
    )
    if not fine:
        raise ValueError(f"its codec blosc has settings that are none: {shown(dict(blosc))}")


def _sharded(dtype: str, shape: tuple[int, ...], settings: Mapping[str, Any]) -> Packing:
    inside = _sizes(settings.get("chunk_shape"), "the shape of a shard's chunks")
    inner, ending = _packing(dtype, inside, settings.get("codecs")), _named(settings.get("index_codecs"))[0]
    location = settings.get("index_location", "end")
    fits = len(shape) == len(inside) and all(size % part == 0 for size, part in zip(shape, inside, strict=False))
    found = Packing(dtype, shape, inner=inner, index_first=location == "start")
    known = dtype != STRING and inner.inner is None and ending == ["bytes", CHECKSUM] and location in ("start", "end")
    if not known or not fits or found.most > 2 * MOST_CHUNK:
        raise ValueError(f"its shards, of shape {shown(list(shape))}, are not made up of chunks as a run's are")
    return found


def _check_strings(data: bytes, count: int) -> None:
    if int.from_bytes(data[:4], "little") != count:
        raise ValueError(f"it says that it holds {int.from_bytes(data[:4], 'little')} names, and a chunk has {count}")
    _strings(data)


def _strings(data: bytes) -> Sequence[str]:
    """What the codec vlen-utf8 wrote: a count, then each string's length and bytes."""
    found, place = [], 4
    for _ in range(int.from_bytes(data[:4], "little")):
        start = place + 4
        place = start + int.from_bytes(data[place:start], "little")
        if place > len(data):
            raise ValueError("its last names are cut off")
        found.append(str(data[start:place], "utf-8"))
    if place != len(data):
        raise ValueError(f"{len(data) - place} bytes follow its last name")
    return found


def shown(value: Any) -> str:
    """A value as messages show it: short, whatever it is."""
    return reprlib.repr(value)
