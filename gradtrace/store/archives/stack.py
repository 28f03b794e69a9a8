"""A stream of several runs as one, with a `run` axis first: what stands along its axes, and whose values where."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import zarr

from gradtrace.store.archives.archive import Content, contents_of
from gradtrace.store.archives.shards import Region
from gradtrace.store.metadata import ArraySpec, array_document
from gradtrace.store.reading.runs import RECORDED, WIDTHS, WIDTHS_OF_RUNS
from gradtrace.store.reading.taken import dims_of
from gradtrace.store.schema import COMPONENT, PARAMETER, RUN, STEP, STRING, width_class

Array = zarr.Array[Any]


class Series:
    """A stream of one run. name: how messages call the run."""

    def __init__(self, name: str, group: zarr.Group) -> None:
        self.name = name
        self.members = dict(group.groups())
        arrays = dict(group.arrays())
        self.steps = np.asarray(arrays[STEP][...])
        self.labels = {axis: _names(one) for axis, one in arrays.items() if dims_of(one) == (axis,) and axis != STEP}
        self.tables = {path: one for path, one in arrays.items() if path not in self.labels and path != STEP}
        self.places: dict[str, tuple[str, int, int]] = {}  # parameter -> width class, position, width
        for member, found in self.members.items():
            names, widths = _names(cast("Array", found[PARAMETER])), cast("list[int]", found.attrs[WIDTHS])
            self.places |= {name: (member, place, widths[place]) for place, name in enumerate(names)}

    def positions(self, known: Mapping[str, Sequence[str]]) -> dict[str, list[int]]:
        """Axis -> where the labels of this run stand among all that are known."""
        at = {axis: {label: place for place, label in enumerate(labels)} for axis, labels in known.items()}
        return {axis: [at[axis][label] for label in labels] for axis, labels in self.labels.items()}

    def arrays(self, parameters: Iterable[str]) -> dict[str, Array]:
        """Name -> an array of that name, in the width classes of these parameters."""
        members = sorted({self.places[name][0] for name in parameters if name in self.places})
        return {name: one for member in members for name, one in self.members[member].arrays() if name != PARAMETER}

    def stretches(self, parameters: Sequence[str]) -> Iterator[tuple[str, int, int, int]]:
        """Width class, position there, position among `parameters`, how many that lie side by side in both."""
        last = ("", 0, 0, 0)
        for at, name in enumerate(parameters):
            member, place, _ = self.places.get(name, ("", 0, 0))
            if (member, place, at) == (last[0], last[1] + last[3], last[2] + last[3]):
                last = (*last[:3], last[3] + 1)
                continue
            if last[0]:
                yield last
            last = (member, place, at, 1)
        if last[0]:
            yield last


@dataclass(frozen=True)
class Piece:
    """Values of one run: along each axis from `starts` on, and the places in the whole where they belong."""

    run: str
    array: Array
    starts: tuple[int, ...]
    places: tuple[np.ndarray, ...]

    def put(self, into: np.ndarray, region: Region) -> None:
        """Fill in what there is of a region of the whole. Axes whose places do not increase must not be cut."""
        source, target = [], []
        for start, places, axis in zip(self.starts, self.places, region, strict=True):
            first, last = 0, len(places)
            if (np.diff(places) > 0).all():
                first, last = (int(end) for end in np.searchsorted(places, [axis.start, axis.stop]))
            source.append(slice(start + first, start + last))
            target.append(places[first:last] - axis.start)
        if all(len(places) for places in target):
            into[_where(target)] = contents_of(self.run, self.array, tuple(source))


class Stack:
    """The same stream of several runs. series: a run's label -> its stream, None where it lacks it."""

    def __init__(self, path: str, series: Mapping[str, Series | None]) -> None:
        self.path, self.series = path, series
        there = [one for one in series.values() if one is not None]
        self.steps = np.unique(np.concatenate([one.steps for one in there]))
        self.labels: dict[str, list[str]] = {}  # axis -> what any run has there, in the order of the runs
        for axis in dict.fromkeys(axis for one in there for axis in one.labels):
            self.labels[axis] = list(dict.fromkeys(name for one in there for name in one.labels.get(axis, ())))
        self.widths: dict[str, int] = {}  # parameter -> the widest that any run has
        for one in there:
            for name, (_, _, width) in one.places.items():
                self.widths[name] = max(width, self.widths.get(name, 0))
        self.members: dict[str, list[str]] = {}  # width class -> parameters
        for name, width in self.widths.items():
            self.members.setdefault(f"w{width_class(width)}", []).append(name)

    def axes(self, label: str) -> dict[str, list[int]]:
        """Axis -> where the labels of one run stand along it, in the run's own order."""
        one = self.series[label]
        return one.positions(self.labels) if one else {}

    def groups(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """Every zarr group with its attributes."""
        yield self.path, {}
        for member, names in self.members.items():
            of_runs = {
                label: [one.places[name][2] if one and name in one.places else None for name in names]
                for label, one in self.series.items()
            }
            yield f"{self.path}/{member}", {WIDTHS: [self.widths[name] for name in names], WIDTHS_OF_RUNS: of_runs}

    def contents(self) -> Iterator[Content]:
        """Every array."""
        recorded = [np.isin(self.steps, one.steps if one else []) for one in self.series.values()]
        yield _constant(f"{self.path}/{STEP}", (STEP,), self.steps)
        yield _constant(f"{self.path}/{RECORDED}", (RUN, STEP), np.array(recorded, dtype=np.uint8))
        for axis, names in {RUN: list(self.series), **self.labels}.items():
            yield _labels(f"{self.path}/{axis}", axis, names)
        for name in _in_order(one.tables for one in self.series.values() if one):
            yield self._content(name, [self._table(one, name) for one in self.series.values()], {})
        for member, names in self.members.items():
            yield _labels(f"{self.path}/{member}/{PARAMETER}", PARAMETER, names)
            lengths = {PARAMETER: len(names), COMPONENT: max(self.widths[name] for name in names)}
            for name in _in_order(one.arrays(names) for one in self.series.values() if one):
                pieces = [list(self._of_parameters(one, name, names)) for one in self.series.values()]
                yield self._content(f"{member}/{name}", pieces, lengths)

    def _table(self, one: Series | None, name: str) -> list[Piece]:
        return [] if one is None or name not in one.tables else [self._piece(one, one.tables[name])]

    def _of_parameters(self, one: Series | None, name: str, parameters: Sequence[str]) -> Iterator[Piece]:
        """A run's values of some parameters, which may stand in several of its width classes."""
        for member, start, at, count in one.stretches(parameters) if one else ():
            if one and name in one.members[member]:
                yield self._piece(one, cast("Array", one.members[member][name]), start, np.arange(at, at + count))

    def _piece(self, one: Series, array: Array, start: int = 0, parameters: np.ndarray | None = None) -> Piece:
        known = {STEP: np.searchsorted(self.steps, one.steps)}
        known |= {axis: np.array(places, dtype=int) for axis, places in one.positions(self.labels).items()}
        known |= {} if parameters is None else {PARAMETER: parameters}
        sizes = zip(dims_of(array), array.shape, strict=True)
        places = [known[dim] if dim in (STEP, PARAMETER) else known.get(dim, np.arange(n))[:n] for dim, n in sizes]
        starts = tuple(start if dim == PARAMETER else 0 for dim in dims_of(array))
        return Piece(one.name, array, starts, tuple(places))

    def _content(self, name: str, pieces: Sequence[Sequence[Piece]], lengths: Mapping[str, int]) -> Content:
        """The array that these pieces make up, a list for each run."""
        like = next(piece.array for of_run in pieces for piece in of_run)
        known = {
            RUN: len(pieces),
            STEP: len(self.steps),
            **{axis: len(of) for axis, of in self.labels.items()},
            **lengths,
        }
        dims = (RUN, *dims_of(like))
        spec = ArraySpec(f"{self.path}/{name}", dims, str(like.dtype), (1,) * len(dims), like.attrs.asdict())
        shape = tuple(known[dim] for dim in dims)

        def read(region: Region) -> np.ndarray:
            values = np.full([axis.stop - axis.start for axis in region], like.fill_value, like.dtype)
            for at, of_run in enumerate(pieces[region[0]]):
                for piece in of_run:
                    piece.put(values[at], region[1:])
            return values

        return Content(spec.path, array_document(spec, shape), read)


def _labels(path: str, axis: str, names: Sequence[str]) -> Content:
    values = np.array(list(names), dtype=np.dtypes.StringDType())
    return Content(path, array_document(ArraySpec(path, (axis,), STRING, (1,)), values.shape), values.__getitem__)


def _constant(path: str, dims: tuple[str, ...], values: np.ndarray) -> Content:
    spec = ArraySpec(path, dims, str(values.dtype), (1,) * len(dims))
    return Content(path, array_document(spec, values.shape), values.__getitem__)


def _where(places: Sequence[np.ndarray]) -> Any:
    """An index for these places along each axis; slices, which are faster, where all are side by side."""
    if all(len(one) == one[-1] - one[0] + 1 and (np.diff(one) > 0).all() for one in places):
        return tuple(slice(int(one[0]), int(one[-1]) + 1) for one in places)
    return np.ix_(*places)


def _in_order(found: Iterable[Iterable[str]]) -> list[str]:
    return list(dict.fromkeys(name for names in found for name in names))


def _names(array: Array) -> list[str]:
    return [str(name) for name in np.asarray(array[...])]
