"""One series of rows as numpy arrays, read on demand: what queries and the tree view are made of."""

from __future__ import annotations

from collections.abc import Container, Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any, NamedTuple, cast

import numpy as np
import zarr

from gradtrace.errors import SelectionError, StoreError, nearest
from gradtrace.store.forms import LABELS, WIDTH_CLASS
from gradtrace.store.names import RESERVED
from gradtrace.store.reading.guard import check_room
from gradtrace.store.reading.taken import Taken, dims_of
from gradtrace.store.rows import Status
from gradtrace.store.schema import (
    COMPONENT,
    GROUP,
    KIND,
    METRIC,
    METRICS,
    PARAMETER,
    PART,
    SCALAR,
    STATUS,
    STEP,
    metric_variable,
    status_variable,
)

FIRST_BLOCK, BLOCK = 1 << 10, 1 << 20  # steps, or names, read at a time, first and at most


class Place(NamedTuple):
    """Where a parameter's values stand: the zarr group of its width class, its position there, its true width."""

    member: str
    position: int
    width: int


class Variable(NamedTuple):
    """One variable of the tree view: the array it stands in, its dimensions, its place on the array's last axes."""

    array: zarr.Array[Any]
    dims: tuple[str, ...]
    at: tuple[int, ...]


class Stream:
    """The training run ("steps") or one probe: its steps, groups and names at once, its values when asked for."""

    def __init__(
        self, group: zarr.Group, name: str, path: str, *, parameters: Container[str], kinds: Sequence[str]
    ) -> None:
        self.name = name
        self._group = group
        self._path = path
        self._parameters, self._kinds = parameters, tuple(kinds)  # which the run knows
        self._known: dict[str, tuple[str, ...]] = {}

    @cached_property
    def steps(self) -> np.ndarray:
        """The optimizer step of each row, increasing."""
        found = [np.zeros(0, dtype=np.int64)]
        for block in self._gradually(self._array(STEP)):
            if (np.diff(np.concatenate([found[-1][-1:], block])) <= 0).any():
                raise self._damaged(f"the steps of {self.name!r} do not increase: chunks are missing or overwritten")
            found.append(block)
        return np.concatenate(found)

    @cached_property
    def groups(self) -> tuple[str, ...]:
        """The names of the groups of samples, in the order in which they appeared."""
        return self._names(GROUP)

    @cached_property
    def scalar_names(self) -> tuple[str, ...]:
        """The names of the user's scalars."""
        return self._names(SCALAR)

    @cached_property
    def cost_parts(self) -> tuple[str, ...]:
        """The parts of the work whose seconds are kept."""
        return self._names(PART)

    @cached_property
    def places(self) -> dict[str, Place]:
        """Where each parameter that has been measured stands."""
        found: dict[str, Place] = {}
        for member in self._classes:
            widths = cast("list[int]", self._group[member].attrs["widths"])
            for position, name in enumerate(self._names(f"{member}/{PARAMETER}")):
                if name in found or name not in self._parameters:
                    raise self._damaged(f"{self.name!r} holds {name!r} twice, or the run does not know it")
                found[name] = Place(member, position, widths[position])
        return found

    def per_step(self, name: str) -> np.ndarray:
        """`loss`, `epoch` (steps,), `n_samples` (steps, groups), `scalars` (steps, names) or `cost` (steps, parts)."""
        return self._values(name)

    def variables(self, parameter: str) -> Mapping[str, Variable]:
        """What is stored for the parameter, by the names of the tree view; nothing when it was never measured."""
        place = self.places.get(parameter)
        return self._members[place.member] if place else {}

    def read(self, parameter: str, variable: str, rows: slice = slice(None)) -> np.ndarray:
        """The variable of one parameter, (rows, ...), without the padding of narrower spectra."""
        if parameter not in self.places:
            raise SelectionError(
                f"{self.name!r} has no measured parameter {parameter!r}. {nearest(parameter, self.places)}"
            )
        place, known = self.places[parameter], self.variables(parameter)
        if variable not in known:
            raise SelectionError(f"{parameter!r} has no variable {variable!r}. {nearest(variable, known)}")
        found = known[variable]
        values = self._coded(found, self.load(found.array, (rows, place.position, Ellipsis, *found.at)))
        return values[..., : place.width] if COMPONENT in found.dims else values

    def over_parameters(self, variable: str) -> Iterator[tuple[tuple[str, ...], np.ndarray]]:
        """(names, values) of a variable without components, one width class after another: (step, parameter, ...)."""
        for member, variables in self._members.items():
            if variable in variables:
                found, names = variables[variable], self._names(f"{member}/{PARAMETER}")
                yield names, self._coded(found, self.load(found.array, (Ellipsis, *found.at)))

    def load(self, array: zarr.Array[Any], key: Any) -> np.ndarray:
        """`array[key]`, or a StoreError that names the array whose bytes cannot be read."""
        self._check_axes(array)
        try:
            check_room(array, key)
            return np.asarray(array[key])
        except MemoryError as error:
            raise StoreError(
                f"{self._path!r}: what is asked for of {array.path!r} is too large to be read at a time ({error}). "
                "Read fewer steps at a time."
            ) from error
        except (PermissionError, ConnectionError, TimeoutError) as error:  # nothing is known of what is there
            raise StoreError(f"{array.path!r} of {self._path!r} cannot be read: {error.strerror}.") from error
        except (OSError, RuntimeError, ValueError) as error:
            raise StoreError(
                f"{self._path!r} is damaged: {array.path!r} cannot be read ({type(error).__name__}: {error}). "
                "Other parameters and steps may still be readable; restore the run from a copy."
            ) from error

    def _check_axes(self, array: zarr.Array[Any] | Taken) -> None:
        """A StoreError where an array of several axes has not as many steps, or names, as it says."""
        dims = dims_of(array)
        for dim in dims if len(dims) > 1 else ():
            _ = self.steps if dim == STEP else self._names(dim) if dim in LABELS else None

    def _damaged(self, what: str) -> StoreError:
        return StoreError(f"{self._path!r} is damaged: {what}. Restore the run from a copy.")

    def _coded(self, variable: Variable, values: np.ndarray) -> np.ndarray:
        """The values of a variable; where they are status codes, all of them known."""
        if values.dtype == np.uint8 and values.size and values.max() >= len(Status.NAMES):
            raise self._damaged(f"{variable.array.path!r} holds the status {values.max()}, which there is not")
        return values

    @cached_property
    def _members(self) -> dict[str, dict[str, Variable]]:
        if self._names(KIND) != self._kinds:
            raise self._damaged(f"the kinds of {self.name!r} are not {', '.join(self._kinds)}")
        return {member: self._variables(member) for member in self._classes}

    @property
    def _classes(self) -> list[str]:
        """The width classes; what else may be there, a later version has added."""
        return [member for member in self._group.group_keys() if WIDTH_CLASS.fullmatch(member)]

    def _variables(self, member: str) -> dict[str, Variable]:
        """The arrays of a width class, with metrics and status taken apart by kind."""
        kinds, metrics = self._names(KIND), self._names(METRIC)
        group = cast("zarr.Group", self._group[member])
        found: list[tuple[str, Variable]] = []
        for name, array in sorted(group.arrays()):
            dims = dims_of(array)
            rest = tuple(dim for dim in dims if dim not in (PARAMETER, KIND, METRIC))
            for k, kind in enumerate(kinds if KIND in dims else ()):
                if name == STATUS:
                    found.append((status_variable(kind), Variable(array, rest, (k,))))
                elif name == METRICS and kind in group:
                    own = enumerate(metrics[: array.shape[-1]])
                    found += [(metric_variable(kind, metric), Variable(array, rest, (k, i))) for i, metric in own]
            if PARAMETER in dims[1:] and KIND not in dims:
                found.append((name, Variable(array, rest, ())))
        variables = dict(found)
        if RESERVED & variables.keys() or len(variables) < len(found):
            raise self._damaged(f"a metric of {self.name!r} is called as something else is: {', '.join(metrics)}")
        return variables

    def _names(self, path: str) -> tuple[str, ...]:
        """A coordinate of names, each there once."""
        if path not in self._known:
            array, names = self._array(path), dict[str, None]()
            for block in self._gradually(array):
                expected = len(names) + len(block)
                names |= dict.fromkeys(map(str, block))
                if len(names) < expected:
                    raise self._damaged(f"the names in {array.path!r} are not all different")
            self._known[path] = tuple(names)
        return self._known[path]

    def _gradually(self, array: zarr.Array[Any]) -> Iterator[np.ndarray]:
        """The values of a coordinate, in growing blocks: where nothing stands behind its shape, the first ones tell."""
        start, size = 0, FIRST_BLOCK
        while start < array.shape[0]:
            yield self.load(array, slice(start, start + size))
            start, size = start + size, min(2 * size, BLOCK)

    def _values(self, path: str) -> np.ndarray:
        return self.load(self._array(path), Ellipsis)

    def _array(self, path: str) -> zarr.Array[Any]:
        found = self._group.get(path)
        if not isinstance(found, zarr.Array):
            raise StoreError(
                f"{self._path!r} is damaged: {self.name!r} lacks the array {path!r}. Restore it from a copy."
            )
        return found


def streams(root: zarr.Group, prefix: str) -> Iterator[str]:
    """The names of the groups below `prefix`."""
    below = root.get(prefix)
    if isinstance(below, zarr.Group):
        yield from below.group_keys()
