"""Writes stores that are written once: shard by shard, compared with what they were made of, the root last of all."""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import zarr

from gradtrace.errors import StoreError
from gradtrace.store.archives.shards import Encoder, Region, regions, sharded
from gradtrace.store.metadata import group_document, root_document, to_bytes
from gradtrace.store.places.keys import ROOT_KEY, Directory, Keys, Memory
from gradtrace.store.places.lock import Lock, writer_of
from gradtrace.store.places.place import explain, zarr_store
from gradtrace.store.reading.snapshot import Rewound, Snapshot
from gradtrace.store.schema import SCHEMA, STRING
from gradtrace.store.writing.commit import clean
from gradtrace.store.writing.entry import ARCHIVE, is_stump

Progress = Callable[[str, int, int], None]  # what is being done, and how many bytes of how many


class Size(NamedTuple):
    """What a store takes up."""

    files: int
    bytes: int


@dataclass(frozen=True)
class Content:
    """An array to be written: its zarr.json, except for how it is cut and packed, and how to get at a region of it."""

    path: str
    document: Mapping[str, Any]
    read: Callable[[Region], np.ndarray]

    @property
    def bytes(self) -> int:
        """Of all its values; labels count as one each."""
        kind = str(self.document["data_type"])
        return math.prod(self.document["shape"]) * (1 if kind == STRING else np.dtype(kind).itemsize)


@dataclass(frozen=True)
class Archive:
    """What is to be written. groups: path -> attributes. sources: the runs that it is made of."""

    made_by: str
    attributes: Mapping[str, Any]
    groups: Mapping[str, Mapping[str, Any]]
    arrays: Sequence[Content]
    sources: Sequence[Snapshot]

    def write(self, keys: Keys, progress: Progress) -> Size:
        """What it takes up there.

        A StoreError where it cannot be written, or does not read back as what it was made of; then, as after Ctrl-C,
        nothing of it is left.
        """
        lock = _enter(keys)
        try:
            size = _Writing(self, keys, lock, progress).run()
        except BaseException as error:
            _remove(keys, lock)
            if isinstance(error, OSError):
                raise StoreError(f"Writing {keys.name!r} failed: {explain(error)} Nothing of it is left.") from error
            raise
        lock.release()
        return size


class _Writing:
    """The writing of an archive to one place, which this process has locked."""

    def __init__(self, archive: Archive, keys: Keys, lock: Lock, progress: Progress) -> None:
        self._archive, self._keys, self._lock, self._progress = archive, keys, lock, progress
        self._arrays = {array.path: sharded(array.document) for array in archive.arrays}
        self._size = Size(0, 0)

    def run(self) -> Size:
        members = {path: group_document(attributes) for path, attributes in self._archive.groups.items()} | self._arrays
        root = to_bytes(root_document({**self._archive.attributes, ARCHIVE: self._archive.made_by}, members))
        clean(self._keys, {})
        with self._keys.together():
            for path, document in sorted(members.items()):
                self._keys.make(path)
                self._put(f"{path}/{ROOT_KEY}", to_bytes(document))
        for array, steps in self._each("Writing"):
            self._write(array, steps)
        for path, document in members.items():
            self._check(f"{path}/{ROOT_KEY}", to_bytes(document))
        store = zarr_store(self._keys)
        for array, steps in self._each("Comparing"):
            self._compare(array, steps, zarr.open_array(store, path=array.path, mode="r", zarr_format=3))
        self._finish(root)
        return self._size

    def _each(self, what: str) -> Iterator[tuple[Content, Iterator[Region]]]:
        """Every array with its shards, telling how far it has come, and that we live."""
        total, before = sum(array.bytes for array in self._archive.arrays), 0

        def steps(array: Content) -> Iterator[Region]:
            found = list(regions(self._arrays[array.path]))
            for number, region in enumerate(found):
                self._progress(what, before + array.bytes * number // len(found), total)
                if self._lock.due_in == 0:
                    self._lock.beat()
                yield region

        for array in self._archive.arrays:
            yield array, steps(array)
            before += array.bytes
        self._progress(what, total, total)

    def _write(self, array: Content, steps: Iterator[Region]) -> None:
        encoder = Encoder(self._arrays[array.path])
        for region in steps:
            for name, data in encoder.encode(region, array.read(region)).items():
                self._put(f"{array.path}/{name}", data)

    def _compare(self, array: Content, steps: Iterator[Region], written: zarr.Array[Any]) -> None:
        for region in steps:
            try:
                found = np.asarray(written[region])
            except (OSError, RuntimeError, ValueError) as error:
                raise self._differs(f"{array.path!r} cannot be read ({error})") from error
            if not is_same(array.read(region), found):
                where = ", ".join(f"{axis.start}:{axis.stop}" for axis in region)
                raise self._differs(f"{array.path!r} has other values at [{where}]")

    def _finish(self, root: bytes) -> None:
        """Put the root, which makes a run of it, where nothing has come in between."""
        self._lock.check()
        for source in self._archive.sources:
            if not source.holds:
                raise Rewound(
                    f"{source.run.path!r} was rewound to an earlier step, or deleted, while it was read. Nothing is "
                    f"left of {self._keys.name!r}: wait until the run's writer has ended, then try again."
                )
        self._put(ROOT_KEY, root)
        self._check(ROOT_KEY, root)

    def _put(self, key: str, data: bytes) -> None:
        self._keys.put(key, data)
        self._size = Size(self._size.files + 1, self._size.bytes + len(data))

    def _check(self, key: str, data: bytes) -> None:
        if self._keys.get(key) != data:
            raise self._differs(f"{key!r} is not what was put there")

    def _differs(self, how: str) -> StoreError:
        return StoreError(
            f"{self._keys.name!r} does not read back as it was written: {how}. Nothing of it is left, and what it was "
            "made of is as before. Disk or memory may be failing: check them, or write to another place."
        )


def contents_of(name: str, array: zarr.Array[Any], region: Region) -> np.ndarray:
    """A region of an array of the run called `name`, or a StoreError that says which array cannot be read."""
    try:
        return np.asarray(array[region])
    except (OSError, RuntimeError, ValueError) as error:
        raise StoreError(
            f"{name!r} is damaged: {array.path!r} cannot be read ({type(error).__name__}: {error}). Restore it from a "
            "copy."
        ) from error


def is_same(one: np.ndarray, other: np.ndarray) -> bool:
    """Whether two arrays hold the same, to the last bit; one NaN is as good as another."""
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    if one.dtype.kind != "f":
        return bool((one == other).all())
    bits = f"u{one.dtype.itemsize}"
    equal = np.ascontiguousarray(one).view(bits) == np.ascontiguousarray(other).view(bits)
    return bool((equal | (np.isnan(one) & np.isnan(other))).all())


def source_of(keys: Keys) -> Snapshot:
    """A run to make an archive of; a StoreError where the archive would lack something of it: what is still to come, or
    what a newer gradtrace has added."""
    holder = writer_of(keys)
    if holder is not None:
        raise StoreError(
            f"{keys.name!r} is being written by {holder}: an archive of it would lack what is still to come. Wait for "
            "its end, or end it."
        )
    snapshot = Snapshot(keys)
    if int(snapshot.run.schema.split(".")[1]) > SCHEMA[1]:
        raise StoreError(
            f"{keys.name!r} has schema {snapshot.run.schema}, and this gradtrace writes {'.'.join(map(str, SCHEMA))}: "
            "an archive would lack what is new there. Install a newer gradtrace."
        )
    return snapshot


def check_apart(sources: Sequence[Keys], target: Keys) -> None:
    """None, or a StoreError where the target lies inside one of the sources."""
    for keys in sources:
        if isinstance(keys, Directory) and isinstance(target, Directory):
            inside = target.root.resolve().is_relative_to(keys.root.resolve())
        else:
            inside = f"{target.name}/".startswith(f"{keys.name}/")
        if inside:
            raise StoreError(f"{target.name!r} lies inside the run {keys.name!r}. Choose a path outside of it.")


def size_of(keys: Keys) -> Size | None:
    """What a store takes up, or None where that would mean to read it all."""
    if isinstance(keys, Directory):
        sizes = [(keys.root / key).stat().st_size for key in keys.list()]
    elif isinstance(keys, Memory):
        sizes = [len(keys.get(key) or b"") for key in keys.list()]
    else:
        return None
    return Size(len(sizes), sum(sizes))


def _enter(keys: Keys) -> Lock:
    """The lock of a place where nothing is, but for what a kill left behind."""
    taken = StoreError(
        f"Cannot write to {keys.name!r}: something is there already, and nothing is overwritten. Choose another path, "
        "or move or delete it first."
    )
    try:
        if (isinstance(keys, Directory) and keys.root.is_file()) or not is_stump(keys):
            raise taken
        keys.begin()
        lock = Lock.acquire(keys)
        if not is_stump(keys):  # it came in between
            lock.release()
            raise taken
    except OSError as error:
        raise StoreError(f"Cannot create {keys.name!r}: {explain(error)}") from error
    return lock


def _remove(keys: Keys, lock: Lock) -> None:
    """Takes away what was written. What cannot be, a later writer to the place takes for what a kill left behind."""
    with contextlib.suppress(OSError, StoreError):
        lock.check()  # else it is somebody else's by now
        keys.delete(ROOT_KEY)
        clean(keys, {})
    lock.release()
    if isinstance(keys, Directory):
        for folder, _, _ in os.walk(keys.root, topdown=False):
            with contextlib.suppress(OSError):  # of folders with something in them
                os.rmdir(folder)
