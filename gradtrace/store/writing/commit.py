"""What makes rows visible: one atomic PUT of the root's zarr.json, with the shapes as they are at that moment."""

from __future__ import annotations

import time
import uuid
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

from gradtrace.errors import StoreError
from gradtrace.store.metadata import ArraySpec, array_document, group_document, plain, root_document, to_bytes
from gradtrace.store.names import check_names
from gradtrace.store.places.keys import ROOT_KEY, Keys
from gradtrace.store.places.orphans import orphans
from gradtrace.store.rows import ParameterInfo, StepRow
from gradtrace.store.schema import MAIN_STREAM, PROBES, SCHEMA
from gradtrace.store.writing.past import Past
from gradtrace.store.writing.stream_writer import StreamWriter


class Commit:
    """The streams of a run being written, what is said about the run, and how much of it readers may see."""

    def __init__(
        self,
        *,
        attrs: Mapping[str, Any],
        kinds: Sequence[str],
        keep: int | None,
        parameters: Sequence[ParameterInfo],
        flush_every: int,
        past: Past | None = None,
        changed: bool = False,
    ) -> None:
        self.pending = 0
        self._may_change = past is None or changed
        self.kinds, self._keep, self._flush_every = tuple(kinds), keep, flush_every
        self._run: dict[str, Any] = {}
        self._parameters: dict[str, dict[str, Any]] = {}
        self._streams: dict[str, StreamWriter] = {}
        self._committed: dict[str, int] = {}
        self._capacity: dict[str, tuple[int, ...]] = {}
        self._oldest: float | None = None
        self._past = past
        self._id = (past.attributes.get("id") if past else None) or uuid.uuid4().hex
        if past is None:
            self.tell(attrs)
        else:
            self._go_on(past, plain(attrs, "attrs"))
        for info in parameters:
            self.describe(info)

    def _go_on(self, past: Past, attrs: Mapping[str, Any]) -> None:
        """Take over what is said about the run; what is said otherwise now is kept with the new segment of it."""
        self._run = dict(past.attributes["run"])
        self._parameters = {entry["name"]: entry for entry in past.attributes["parameters"]}
        self._committed = past.rows
        new = {key: value for key, value in attrs.items() if key not in self._run or self._run[key] != value}
        segment = {"step": past.next_step, "row": past.rows[MAIN_STREAM], "rewound": past.is_rewound, **new}
        self._run["segments"] = [*self._run.get("segments", []), segment]
        self._touch()

    @property
    def known(self) -> Mapping[str, Any]:
        """The parameters that rows may name."""
        return self._parameters

    def describe(self, info: ParameterInfo) -> None:
        """Add a parameter, or replace what is said about it."""
        check_names("parameter name", [info.name])
        attrs, shape = plain(info.attrs, f"parameters[{info.name!r}]"), [int(size) for size in info.shape]
        before = self._parameters.get(info.name, {}).get("shape", shape)
        if before != shape and not self._may_change:
            raise StoreError(
                f"{info.name!r} has shape {tuple(shape)} and had {tuple(before)} when this run was recorded. Record "
                "the changed model into another path, or say changed=True: what follows is a new segment of this run."
            )
        self._parameters[info.name] = {"name": info.name, "shape": shape, "attrs": attrs}
        self._touch()

    def tell(self, attrs: Mapping[str, Any]) -> None:
        """Add to what is said about the run, or replace it."""
        self._run.update(plain(attrs, "attrs"))
        self._touch()

    def summary(self) -> str:
        """How much readers can see, in a sentence."""
        rows = self._committed.get(MAIN_STREAM, 0)
        return f"the {rows} steps committed before stay readable."

    def due_in(self, seconds: float) -> float | None:
        """The time until what waits should be committed, or None when nothing does."""
        return None if self._oldest is None else max(0.0, self._oldest + seconds - time.monotonic())

    def open(self, keys: Keys) -> None:
        """Make the store: readable, and empty; or as it was, up to the row after which it goes on."""
        if self._past is None:
            clean(keys, {})  # after a kill before the first commit
            self._streams[MAIN_STREAM] = self._stream(MAIN_STREAM, keys)
            self._put(keys, self._attributes(closed=False), exact=False)
            return
        past, self._past = self._past, None
        for path in past.rows:
            self._streams[path] = self._stream(path, keys, past)
        # First the root, which gives rows up: a chunk must not lose any that a reader may still see.
        clean(keys, self._put_root(keys, self._attributes(closed=False)))

    def place(self, stream: str, row: StepRow, keys: Keys) -> None:
        """Take one row into memory."""
        if stream not in self._streams:
            self._streams[stream] = self._stream(stream, keys)
        self._streams[stream].place(row)
        self.pending += 1
        self._touch()

    def commit(self, keys: Keys, *, lock: AbstractContextManager[Any]) -> None:
        """Make everything placed so far visible."""
        with lock:
            attributes, self._oldest = self._attributes(closed=False), None
        try:
            self._put(keys, attributes, exact=False)
        except BaseException:
            self._touch()  # it still is to be committed
            raise

    def close(self, keys: Keys) -> None:
        """Make everything visible, also to readers that look at each array by itself, and say that this was all."""
        self._put(keys, self._attributes(closed=True), exact=True)

    def _put(self, keys: Keys, attributes: dict[str, Any], *, exact: bool) -> None:
        with keys.together():  # nothing of it shows before the root says so
            self._put_members(keys, exact=exact)
        self._put_root(keys, attributes)
        self.pending = 0

    def _put_members(self, keys: Keys, *, exact: bool) -> None:
        for stream in self._streams.values():
            stream.write()
        arrays = {spec.path: (spec, shape) for stream in self._streams.values() for spec, shape in stream.arrays()}
        for path, (spec, shape) in arrays.items():
            self._put_array(keys, path, spec, shape, exact=exact)
        for path, document in self._groups().items():
            if exact or path not in self._capacity:
                keys.put(f"{path}/{ROOT_KEY}", to_bytes(document))
                self._capacity[path] = ()

    def _put_root(self, keys: Keys, attributes: dict[str, Any]) -> Mapping[str, Mapping[str, Any]]:
        """The commit itself; the metadata of all that it makes visible."""
        arrays = [pair for stream in self._streams.values() for pair in stream.arrays()]
        members = self._groups() | {spec.path: array_document(spec, shape) for spec, shape in arrays}
        keys.put(ROOT_KEY, to_bytes(root_document(attributes, members)))
        self._committed = dict(attributes["committed"])
        return members

    def _put_array(self, keys: Keys, path: str, spec: ArraySpec, shape: tuple[int, ...], *, exact: bool) -> None:
        """The array's own metadata: a shape with room to spare, so that it need not be touched at every commit."""
        known = self._capacity.get(path, (-1,) * len(shape))
        if not exact and all(size <= room for size, room in zip(shape, known, strict=True)):
            return
        room = shape if exact else tuple(_room(size, chunk) for size, chunk in zip(shape, spec.chunks, strict=True))
        keys.put(f"{path}/{ROOT_KEY}", to_bytes(array_document(spec, room)))
        self._capacity[path] = room

    def _groups(self) -> dict[str, dict[str, Any]]:
        found = {path: group_document(attrs) for stream in self._streams.values() for path, attrs in stream.groups()}
        return ({PROBES: group_document({})} if len(self._streams) > 1 else {}) | found

    def _attributes(self, *, closed: bool) -> dict[str, Any]:
        return {
            "gradtrace_schema": ".".join(map(str, SCHEMA)),
            "id": self._id,
            "committed": {path: stream.rows for path, stream in self._streams.items()},
            "closed": closed,
            "kinds": list(self.kinds),
            "keep": self._keep,
            "parameters": list(self._parameters.values()),
            "run": dict(self._run),
        }

    def _stream(self, path: str, keys: Keys, past: Past | None = None) -> StreamWriter:
        return StreamWriter(path, keys, flush_every=self._flush_every, kinds=self.kinds, keep=self._keep, past=past)

    def _touch(self) -> None:
        if self._oldest is None:
            self._oldest = time.monotonic()


def clean(keys: Keys, members: Mapping[str, Mapping[str, Any]]) -> None:
    """Removes what a kill left behind: chunks of rows never committed would show when the run grows again."""
    for key in list(orphans(keys.list(), members)):
        keys.delete(key)


def _room(size: int, chunk: int) -> int:
    """The smallest chunk, doubled as often as needed, that holds `size`."""
    room = chunk
    while room < size:
        room *= 2
    return room
