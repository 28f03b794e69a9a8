"""Opens merged runs: all of them along a `run` dimension, or each as it was by itself."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import zarr

from gradtrace.errors import SelectionError, nearest
from gradtrace.store.names import directory_name, node_name, original_name
from gradtrace.store.places.keys import Directory, Keys
from gradtrace.store.places.place import zarr_store
from gradtrace.store.reading import guard
from gradtrace.store.reading.reader import Run, root_of
from gradtrace.store.reading.runs import AXES, RECORDED, RUNS, WIDTHS_OF_RUNS, checked_runs
from gradtrace.store.reading.stream import Place, Stream, Variable
from gradtrace.store.reading.taken import Taken
from gradtrace.store.rows import KINDS
from gradtrace.store.schema import COMPONENT, MAIN_STREAM, PARAMETER, PROBES, RUN, STEP, probe_stream

if TYPE_CHECKING:
    from xarray import DataTree


class MergedRun(Run):
    """Several runs in one store: `tree` and `probes` have a `run` dimension first, `run(label)` is one of them.

    Steps, groups and parameters are those of all runs; where a run lacks one, values are NaN and its status is 0.
    """

    def __repr__(self) -> str:
        return f"<Run {self.path!r}: the runs {', '.join(self.runs)}; {len(self.parameters)} parameters>"

    @property
    def runs(self) -> tuple[str, ...]:
        """The labels of the runs."""
        return tuple(self._about[RUNS])

    def run(self, label: str) -> Run:
        """One of the runs, with the steps, groups and parameters that it had by itself."""
        if label not in self.runs:
            raise SelectionError(f"{self.path!r} holds no run {label!r}. {nearest(label, self.runs)}")
        return OneRun(self.path, self.group, label)

    @property
    def groups(self) -> tuple[str, ...]:
        """The groups of samples that any of the runs has."""
        return self._open(MAIN_STREAM, MAIN_STREAM).groups

    def stream(self, probe: str | None = None) -> Stream:
        """A SelectionError: a stream is that of one run."""
        raise SelectionError(
            f"{self.path!r} holds several runs, and this can only be asked of one: choose it by run(label), or in a "
            f"command by --run LABEL, or look at all of them in `tree`. {nearest('', self.runs)}"
        )

    @cached_property
    def tree(self) -> DataTree:
        """The training runs as xarray: as the tree of a run, with the dimension `run` before all others."""
        return self._tree(MAIN_STREAM, MAIN_STREAM)

    @cached_property
    def probes(self) -> Mapping[str, DataTree]:
        """Probe name -> the probe as xarray, of the same form as `tree`."""
        return {name: self._tree(f"{PROBES}/{directory_name(name)}", probe_stream(name)) for name in self.probe_names}

    def parameter(self, name: str) -> DataTree:
        """The tree node of one parameter, by its exact qualified name."""
        if name not in self.parameters:
            raise SelectionError(f"{self.path!r} has no parameter {name!r}. {nearest(name, self.parameters)}")
        return self.tree.children[node_name(name)]

    def _tree(self, path: str, name: str) -> DataTree:
        from gradtrace.store.reading.merged_tree import tree_of_runs

        return tree_of_runs(self, self._open(path, name))


class OneRun(Run):
    """One of several merged runs, as it was by itself. group: the root of all of them."""

    def __init__(self, path: str, root: zarr.Group, label: str) -> None:
        super().__init__(f"{path} (run {label})", root)
        self.label, self._number = label, list(self._about[RUNS]).index(label)
        self._about = self._about[RUNS][label]

    @property
    def axes(self) -> Mapping[str, Mapping[str, Sequence[int]]]:
        """Stream -> axis -> where the names of this run stand along it, among those of all runs."""
        found: dict[str, dict[str, list[int]]] = self._about[AXES]
        return found

    @cached_property
    def probe_names(self) -> tuple[str, ...]:
        """The names of the probes."""
        return tuple(original_name(path.partition("/")[2]) for path in self._about["committed"] if path != MAIN_STREAM)

    def stream(self, probe: str | None = None) -> Stream:
        """The training run, or the probe of that name, as numpy arrays."""
        if probe is not None and probe not in self.probe_names:
            raise SelectionError(f"{self.path!r} has no probe {probe!r}. {nearest(probe, self.probe_names)}")
        path = MAIN_STREAM if probe is None else f"{PROBES}/{directory_name(probe)}"
        name = MAIN_STREAM if probe is None else probe_stream(probe)
        return self._streams.setdefault(path, self._open(path, name))

    def _open(self, path: str, name: str) -> Stream:
        return OneStream(self, self._number, path, name)


class OneStream(Stream):
    """A stream of one of several merged runs, the `number`-th of them. path: of its group in the store."""

    def __init__(self, run: OneRun, number: int, path: str, name: str) -> None:
        group = cast("zarr.Group", run.group[path])
        super().__init__(group, name, run.path, parameters=run.parameters, kinds=run.kinds)
        self._number, self._label, self._count = number, run.label, run.committed[name]
        self._axes = {axis: np.array(places, dtype=int) for axis, places in run.axes[path].items()}

    @cached_property
    def places(self) -> dict[str, Place]:
        """Where each parameter that has been measured stands."""
        found: dict[str, Place] = {}
        for member in self._members:
            widths = self._own(member).values()
            for position, (name, width) in enumerate(zip(self._names(f"{member}/{PARAMETER}"), widths, strict=True)):
                if name in found or name not in self._parameters:
                    raise self._damaged(f"{self.name!r} holds {name!r} twice, or the run does not know it")
                found[name] = Place(member, position, width)
        return found

    @cached_property
    def _rows(self) -> np.ndarray:
        """Which of the steps of all runs are steps of this one."""
        recorded = super()._array(RECORDED)
        try:
            found = np.flatnonzero(np.asarray(recorded[self._number]))
        except (OSError, RuntimeError, ValueError) as error:
            raise self._damaged(f"{recorded.path!r} cannot be read ({type(error).__name__}: {error})") from error
        if len(found) != self._count:
            raise self._damaged(f"{recorded.path!r} names {len(found)} rows, and {self._count} were committed")
        return found

    def _own(self, member: str) -> dict[int, int]:
        """Place among the parameters of all runs -> width, of the parameters that this run has."""
        widths = cast("dict[str, list[int | None]]", self._group[member].attrs[WIDTHS_OF_RUNS])[self._label]
        return {place: width for place, width in enumerate(widths) if width is not None}

    def _taken(self, array: zarr.Array[Any], member: str) -> Any:
        """What of an array is this run's."""
        chosen: dict[str, Any] = {RUN: self._number, STEP: self._rows, **self._axes}
        if member:
            own = self._own(member)
            chosen |= {PARAMETER: np.array(list(own), dtype=int), COMPONENT: np.arange(max(own.values(), default=0))}
        return Taken(array, chosen)

    def _array(self, path: str) -> Any:
        return self._taken(super()._array(path), path.rpartition("/")[0])

    def _variables(self, member: str) -> dict[str, Variable]:
        return {
            name: Variable(self._taken(found.array, member), tuple(dim for dim in found.dims if dim != RUN), found.at)
            for name, found in super()._variables(member).items()
            if name not in KINDS or name in self._kinds
        }


def open_merged(keys: Keys) -> MergedRun:
    """The merged runs that these keys hold."""
    _, document = root_of(keys)
    sane = checked_runs(document, keys.name)
    packings = guard.packings(sane["consolidated_metadata"]["metadata"])
    folder = keys.root if isinstance(keys, Directory) else None
    guarded = guard.Guarded(zarr_store(keys), json.dumps(sane, ensure_ascii=False).encode(), packings, folder)
    return MergedRun(keys.name, zarr.open_group(guarded, mode="r", zarr_format=3, use_consolidated=True))
