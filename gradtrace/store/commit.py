"""What makes rows visible: one atomic PUT of the root's zarr.json, with the shapes as they are at that moment."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

from gradtrace.store.files import ROOT_KEY, Files
from gradtrace.store.metadata import ArraySpec, array_document, group_document, plain, root_document, to_bytes
from gradtrace.store.names import check_names
from gradtrace.store.rows import ParameterInfo, StepRow
from gradtrace.store.schema import MAIN_STREAM, PROBES, SCHEMA
from gradtrace.store.stream_writer import StreamWriter


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
    ) -> None:
        self.pending = 0
        self.kinds, self._keep, self._flush_every = tuple(kinds), keep, flush_every
        self._run: dict[str, Any] = {}
        self._parameters: dict[str, dict[str, Any]] = {}
        self._streams: dict[str, StreamWriter] = {}
        self._committed: dict[str, int] = {}
        self._capacity: dict[str, tuple[int, ...]] = {}
        self._oldest: float | None = None
        self.tell(attrs)
        for info in parameters:
            self.describe(info)

    @property
    def known(self) -> Mapping[str, Any]:
        """The parameters that rows may name."""
        return self._parameters

    def describe(self, info: ParameterInfo) -> None:
        """Add a parameter, or replace what is said about it."""
        check_names("parameter name", [info.name])
        attrs = plain(info.attrs, f"parameters[{info.name!r}]")
        self._parameters[info.name] = {"name": info.name, "shape": [int(size) for size in info.shape], "attrs": attrs}
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

    def open(self, files: Files) -> None:
        """Make the store: readable, and empty."""
        self._streams[MAIN_STREAM] = self._stream(MAIN_STREAM, files)
        self._put(files, self._attributes(closed=False), exact=False)

    def place(self, stream: str, row: StepRow, files: Files) -> None:
        """Take one row into memory."""
        if stream not in self._streams:
            self._streams[stream] = self._stream(stream, files)
        self._streams[stream].place(row)
        self.pending += 1
        self._touch()

    def commit(self, files: Files, *, lock: AbstractContextManager[Any]) -> None:
        """Make everything placed so far visible."""
        with lock:
            attributes, self._oldest = self._attributes(closed=False), None
        self._put(files, attributes, exact=False)

    def close(self, files: Files) -> None:
        """Make everything visible, also to readers that look at each array by itself, and say that this was all."""
        self._put(files, self._attributes(closed=True), exact=True)

    def _put(self, files: Files, attributes: dict[str, Any], *, exact: bool) -> None:
        for stream in self._streams.values():
            stream.write()
        arrays = {spec.path: (spec, shape) for stream in self._streams.values() for spec, shape in stream.arrays()}
        for path, (spec, shape) in arrays.items():
            self._put_array(files, path, spec, shape, exact=exact)
        groups = self._groups()
        for path, document in groups.items():
            if exact or path not in self._capacity:
                files.put(f"{path}/{ROOT_KEY}", to_bytes(document))
                self._capacity[path] = ()
        members = groups | {path: array_document(spec, shape) for path, (spec, shape) in arrays.items()}
        files.put(ROOT_KEY, to_bytes(root_document(attributes, members)))
        self._committed = dict(attributes["committed"])
        self.pending = 0

    def _put_array(self, files: Files, path: str, spec: ArraySpec, shape: tuple[int, ...], *, exact: bool) -> None:
        """The array's own metadata: a shape with room to spare, so that it need not be touched at every commit."""
        known = self._capacity.get(path, (-1,) * len(shape))
        if not exact and all(size <= room for size, room in zip(shape, known, strict=True)):
            return
        room = shape if exact else tuple(_room(size, chunk) for size, chunk in zip(shape, spec.chunks, strict=True))
        files.put(f"{path}/{ROOT_KEY}", to_bytes(array_document(spec, room)))
        self._capacity[path] = room

    def _groups(self) -> dict[str, dict[str, Any]]:
        found = {path: group_document(attrs) for stream in self._streams.values() for path, attrs in stream.groups()}
        return ({PROBES: group_document({})} if len(self._streams) > 1 else {}) | found

    def _attributes(self, *, closed: bool) -> dict[str, Any]:
        return {
            "gradtrace_schema": ".".join(map(str, SCHEMA)),
            "committed": {path: stream.rows for path, stream in self._streams.items()},
            "closed": closed,
            "kinds": list(self.kinds),
            "keep": self._keep,
            "parameters": list(self._parameters.values()),
            "run": dict(self._run),
        }

    def _stream(self, path: str, files: Files) -> StreamWriter:
        return StreamWriter(path, files, flush_every=self._flush_every, kinds=self.kinds, keep=self._keep)

    def _touch(self) -> None:
        if self._oldest is None:
            self._oldest = time.monotonic()


def _room(size: int, chunk: int) -> int:
    """The smallest chunk, doubled as often as needed, that holds `size`."""
    room = chunk
    while room < size:
        room *= 2
    return room
