"""Opens a run for reading: lazily, without torch or dask, also while it is still being written."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from functools import cached_property
from typing import TYPE_CHECKING, Any

import zarr

from gradtrace.errors import SelectionError, StoreError, nearest
from gradtrace.store.chunks import shown
from gradtrace.store.names import node_name, original_name
from gradtrace.store.places.keys import ROOT_KEY, Directory, Keys
from gradtrace.store.places.place import zarr_store
from gradtrace.store.reading import guard
from gradtrace.store.reading.sanity import checked
from gradtrace.store.reading.stream import Stream, streams
from gradtrace.store.rows import ParameterInfo
from gradtrace.store.schema import MAIN_STREAM, PROBES, SCHEMA, probe_stream

if TYPE_CHECKING:
    from xarray import DataTree


def open_keys(keys: Keys) -> Run:
    """The run that these keys hold, as of its last commit; see `gradtrace.store.reading.opened`."""
    data, document = root_of(keys)
    sane = checked(document, keys.name)
    try:
        if sane != document or b"\\u" in data or not data.isascii():
            data = json.dumps(sane, ensure_ascii=False).encode()  # which lone surrogates do not survive
        folder = keys.root if isinstance(keys, Directory) else None
        packings = guard.packings(sane["consolidated_metadata"]["metadata"])
        guarded = guard.Guarded(zarr_store(keys), data, packings, folder)
        root = zarr.open_group(guarded, mode="r", zarr_format=3, use_consolidated=True)
    except (PermissionError, ConnectionError, TimeoutError) as error:
        raise StoreError(f"{keys.name!r} cannot be read: {error.strerror}.") from error
    except Exception as error:
        raise StoreError(
            f"{keys.name!r} is damaged: zarr cannot open it ({type(error).__name__}: {error}). Restore it from a copy."
        ) from error
    return Run(keys.name, root)


class Run:
    """A recorded run. Everything is as of one commit; values are read when they are looked at."""

    def __init__(self, path: str, root: zarr.Group) -> None:
        self.path = path
        self.group = root
        self._about: dict[str, Any] = root.attrs.asdict()

    def __repr__(self) -> str:
        state = "closed" if self.closed else "unfinished"
        return f"<Run {self.path!r}: {self.committed[MAIN_STREAM]} steps, {len(self.parameters)} parameters, {state}>"

    @property
    def runs(self) -> tuple[str, ...]:
        """The labels of the runs that were merged into this one; none for a run as it was recorded."""
        return ()

    def run(self, label: str) -> Run:
        """One of the runs that were merged."""
        raise SelectionError(f"{self.path!r} is a single run: there is no {label!r} to choose.")

    @property
    def attrs(self) -> dict[str, Any]:
        """What the recorder said about the run: versions, seed, dtype, tolerance, ..."""
        return dict(self._about["run"])

    @property
    def schema(self) -> str:
        """The version of the store's layout."""
        return str(self._about["gradtrace_schema"])

    @property
    def closed(self) -> bool:
        """Whether the run was ended by `close()`; False while it is being written, and for ever when it was killed."""
        return bool(self._about["closed"])

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kinds of spectra that were asked for."""
        return tuple(self._about["kinds"])

    @property
    def keep(self) -> int | None:
        """How many of the largest singular values are stored; None for all."""
        return self._about["keep"]

    @property
    def committed(self) -> dict[str, int]:
        """Stream -> number of rows."""
        return {
            ("steps" if path == MAIN_STREAM else probe_stream(_probe(path))): n
            for path, n in self._about["committed"].items()
        }

    @property
    def groups(self) -> tuple[str, ...]:
        """The groups of samples of the training run."""
        return self.stream().groups

    @cached_property
    def parameters(self) -> Mapping[str, ParameterInfo]:
        """Qualified name -> shape and how it was measured, for every parameter, measured or not."""
        return {
            entry["name"]: ParameterInfo(entry["name"], tuple(entry["shape"]), entry["attrs"])
            for entry in self._about["parameters"]
        }

    @cached_property
    def probe_names(self) -> tuple[str, ...]:
        """The names of the probes."""
        return tuple(map(original_name, streams(self.group, PROBES)))

    def stream(self, probe: str | None = None) -> Stream:
        """The training run, or the probe of that name, as numpy arrays."""
        if probe is None:
            return self._streams.setdefault(MAIN_STREAM, self._open(MAIN_STREAM, MAIN_STREAM))
        paths = {original_name(name): f"{PROBES}/{name}" for name in streams(self.group, PROBES)}
        if probe not in paths:
            raise SelectionError(f"{self.path!r} has no probe {probe!r}. {nearest(probe, paths)}")
        return self._streams.setdefault(paths[probe], self._open(paths[probe], probe_stream(probe)))

    @cached_property
    def tree(self) -> DataTree:
        """The training run as xarray: `loss`, `epoch`, ... at the root, one node per parameter below it."""
        from gradtrace.store.reading.tree import tree_of_stream

        return tree_of_stream(self, self.stream())

    @cached_property
    def probes(self) -> Mapping[str, DataTree]:
        """Probe name -> the probe as xarray, of the same form as `tree`."""
        from gradtrace.store.reading.tree import tree_of_stream

        return {name: tree_of_stream(self, self.stream(name)) for name in self.probe_names}

    def parameter(self, name: str) -> DataTree:
        """The tree node of one parameter, by its exact qualified name."""
        if name not in self.parameters:
            raise SelectionError(f"{self.path!r} has no parameter {name!r}. {nearest(name, self.parameters)}")
        return self.tree.children[node_name(name)]

    @cached_property
    def _streams(self) -> dict[str, Stream]:
        return {}

    def _open(self, path: str, name: str) -> Stream:
        group = self.group.get(path)
        if not isinstance(group, zarr.Group):
            raise StoreError(f"{self.path!r} is damaged: it lacks the group {path!r}. Restore it from a copy.")
        return Stream(group, name, self.path, parameters=self.parameters, kinds=self.kinds)


def _probe(path: str) -> str:
    return original_name(path.partition("/")[2])


def root_of(keys: Keys) -> tuple[bytes, dict[str, Any]]:
    """The root's zarr.json, of a schema that is known, or a StoreError saying what is there instead of a run."""
    here = repr(keys.name)
    if isinstance(keys, Directory) and keys.root.exists() and not keys.root.is_dir():
        raise StoreError(f"{here} is a file; a run is a directory. Unpack it first if it is an archive.")
    try:
        data = guard.get(keys, ROOT_KEY)
        if data is None:
            raise StoreError(_nothing(keys))
        document = json.loads(data)
    except OSError as error:
        hint = " Check its permissions." if isinstance(keys, Directory) else ""
        raise StoreError(f"{here} cannot be read: {error.strerror or error}.{hint}") from error
    except (ValueError, RecursionError) as error:
        raise StoreError(f"{here} is damaged: its zarr.json is no JSON ({error}). Restore it from a copy.") from error
    attributes = document.get("attributes", {}) if isinstance(document, dict) else {}
    if not isinstance(attributes, dict) or "gradtrace_schema" not in attributes:
        raise StoreError(f"{here} is a zarr store, but not a gradtrace run. Open it with zarr or xarray.")
    _check_schema(attributes, keys.name)
    return data, document


def _nothing(keys: Keys) -> str:
    """What to say of a place without a root."""
    if not keys.exists() and not (isinstance(keys, Directory) and keys.root.is_dir()):
        return f"There is no run at {keys.name!r}. Check the path; `gradtrace.record(model, path)` makes one."
    older = any(keys.get(name) is not None for name in (".zgroup", ".zattrs"))
    kind = "a zarr store of format 2; gradtrace writes format 3" if older else "not a zarr store: it has no zarr.json"
    return f"{keys.name!r} is {kind}. Give the directory that gradtrace.record() wrote."


def _check_schema(attributes: Mapping[str, Any], path: str) -> None:
    version = attributes["gradtrace_schema"]
    known = re.fullmatch(r"([0-9]{1,9})\.[0-9]{1,9}", version) if isinstance(version, str) else None
    if known is None:
        raise StoreError(f"{path!r} is damaged: its schema version reads {shown(version)}. Restore it from a copy.")
    if int(known[1]) > SCHEMA[0]:
        raise StoreError(
            f"{path!r} has schema {version}; this gradtrace reads up to {SCHEMA[0]}.x. Install a newer gradtrace."
        )
