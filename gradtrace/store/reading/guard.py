"""What may be read of a store: files, no larger than its arrays say, that unpack to what they should."""

from __future__ import annotations

import math
import os
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

from zarr.abc.store import ByteRequest, RangeByteRequest, Store
from zarr.core.buffer import Buffer, BufferPrototype
from zarr.storage import WrapperStore

from gradtrace.store.chunks import Packing
from gradtrace.store.places.keys import ROOT_KEY, Directory, Keys

MOST_JSON = 1 << 28  # bytes of a document
AWAY = (PermissionError, ConnectionError, TimeoutError)  # what says nothing about what is there
MOST_READ, MOST_CHUNKS = 1 << 32, 1 << 18  # bytes, and chunks, at a time


class Guarded(WrapperStore[Store]):
    """A store for zarr, whose root is a document that was looked at, and whose chunks are before they are unpacked.

    root: the bytes of that document. packings: path of an array -> how its chunks are packed. folder: where the files
    are, if they are files.
    """

    def __init__(self, store: Store, root: bytes, packings: Mapping[str, Packing], folder: Path | None) -> None:
        super().__init__(store)
        self._root, self._packings, self._folder = root, packings, folder

    def _with_store(self, store: Store) -> Self:
        return type(self)(store, self._root, self._packings, self._folder)

    async def get(self, key: str, prototype: BufferPrototype, byte_range: ByteRequest | None = None) -> Buffer | None:
        if key == ROOT_KEY:
            return prototype.buffer.from_bytes(self._root)
        path, _, name = key.rpartition("/")
        packing = self._packings.get(path)
        if self._folder is not None:
            check_file(self._folder, key, MOST_JSON if packing is None else packing.most)
        if packing is not None and byte_range is not None:
            return await self._part(key, prototype, byte_range, packing)
        found = await self._store.get(key, prototype, byte_range)
        if found is not None and packing is not None:
            check_chunk(name, packing, found.to_bytes())
        return found

    async def _part(self, key: str, prototype: BufferPrototype, part: ByteRequest, packing: Packing) -> Buffer | None:
        """The part of a shard that zarr asks for: its index, or a chunk in it."""
        name = key.rpartition("/")[2]
        if packing.inner is None:
            raise ValueError(f"{name}: a part of it is asked for, and it is no shard")
        if isinstance(part, RangeByteRequest) and not (packing.index_first and part.end == packing.index_size):
            if part.end - part.start > packing.inner.most or (packing.index_first and part.start < packing.index_size):
                raise ValueError(f"{name}: its index says that a chunk is at {part.start}:{part.end}")
            found = await self._store.get(key, prototype, part)
            if found is not None:
                check_chunk(name, packing.inner, found.to_bytes())
            return found
        found = await self._store.get(key, prototype, part)
        if found is not None:
            size = None if self._folder is None else (self._folder / key).stat().st_size
            packing.check_index(found.to_bytes(), packing.most if size is None else size)
        return found


def check_chunk(name: str, packing: Packing, data: bytes) -> None:
    """None, or a ValueError that names the chunk that must not be unpacked."""
    try:
        packing.check(data)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None


def get(keys: Keys, key: str, most: int = MOST_JSON) -> bytes | None:
    """The bytes under a key, or a ValueError where something else is there than the bytes of a run."""
    if isinstance(keys, Directory):
        check_file(keys.root, key, most)
    return keys.get(key)


def check_file(folder: Path, key: str, most: int) -> None:
    """None, or a ValueError where what is under a key is no file, or too large. A link to a file is a file."""
    try:
        found = os.stat(folder / key)
    except (FileNotFoundError, NotADirectoryError):
        return
    except OSError as error:  # links that lead to each other
        raise ValueError(f"{key} is no file ({error.strerror})") from error
    if not stat.S_ISREG(found.st_mode):
        raise ValueError(f"{key} is no file")
    if found.st_size > most:
        raise ValueError(f"{key} has {found.st_size} bytes; what belongs there has at most {most}")


def check_room(array: Any, key: Any) -> None:
    """None, or a MemoryError where `array[key]` is more than is read at a time. `array`: of zarr."""
    parts = list(key) if isinstance(key, tuple) else [key]
    if Ellipsis in parts:
        place = parts.index(Ellipsis)
        parts[place : place + 1] = [slice(None)] * (len(array.shape) - len(parts) + 1)
    spans = [
        range(*p.indices(n)) if isinstance(p, slice) else range(1) for p, n in zip(parts, array.shape, strict=False)
    ]
    size = math.prod(map(len, spans)) * array.dtype.itemsize
    chunks = math.prod(1 + (len(s) and abs(s[-1] - s[0]) // n) for s, n in zip(spans, array.chunks, strict=False))
    check_size(size, chunks)


def check_size(size: int, chunks: int) -> None:
    """None, or a MemoryError where so many bytes, or so many chunks, are more than is read at a time."""
    if size > MOST_READ or chunks > MOST_CHUNKS:
        raise MemoryError(f"{size} bytes in {chunks} chunks")


def packings(members: Mapping[str, Mapping[str, Any]]) -> dict[str, Packing]:
    """How the chunks of each array are packed."""
    return {path: Packing.of(one) for path, one in members.items() if one["node_type"] == "array"}
