"""One series of rows as numpy arrays, read on demand: what queries and the tree view are made of."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from typing import Any, NamedTuple, cast

import numpy as np
import zarr

from gradtrace.errors import SelectionError, StoreError, nearest
from gradtrace.store.schema import GROUP, PARAMETER, PART, SCALAR, STEP


class Place(NamedTuple):
    """Where a parameter's values stand: the zarr group of its width class, its position there, its true width."""

    member: str
    position: int
    width: int


class Stream:
    """The training run ("steps") or one probe: its steps, groups and names at once, its values when asked for."""

    def __init__(self, group: zarr.Group, name: str, path: str) -> None:
        self.name = name
        self._group = group
        self._path = path

    @cached_property
    def steps(self) -> np.ndarray:
        """The optimizer step of each row, increasing."""
        steps = self._values(STEP)
        if (np.diff(steps) <= 0).any():
            raise StoreError(
                f"{self._path!r} is damaged: the steps of {self.name!r} do not increase, so chunks of {STEP!r} are "
                "missing or overwritten. Restore the run from a copy."
            )
        return steps

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
        for member, group in self._group.groups():
            widths = cast("list[int]", group.attrs["widths"])
            for position, name in enumerate(self._names(f"{member}/{PARAMETER}")):
                found[name] = Place(member, position, widths[position])
        return found

    def per_step(self, name: str) -> np.ndarray:
        """`loss`, `epoch` (steps,), `n_samples` (steps, groups), `scalars` (steps, names) or `cost` (steps, parts)."""
        return self._values(name)

    def variables(self, parameter: str) -> tuple[str, ...]:
        """The names of what is stored for the parameter; none when it was never measured."""
        place = self.places.get(parameter)
        return self._members[place.member] if place else ()

    def array(self, parameter: str, variable: str) -> zarr.Array[Any]:
        """The zarr array that holds the variable, of this parameter and its neighbours: (step, parameter, ...)."""
        return self._array(f"{self._place(parameter).member}/{variable}")

    def read(self, parameter: str, variable: str, rows: slice = slice(None)) -> np.ndarray:
        """The variable of one parameter, (rows, ...), without the padding of narrower spectra."""
        place = self._place(parameter)
        key = (rows, place.position, Ellipsis)
        values = self.load(self.array(parameter, variable), key)
        return values[..., : place.width] if values.ndim == 3 and variable != "inner_product" else values

    def over_parameters(self, variable: str) -> Iterator[tuple[tuple[str, ...], np.ndarray]]:
        """(names, values) of a variable without components, one width class after another: (step, parameter, ...)."""
        for member, variables in self._members.items():
            if variable in variables:
                yield self._names(f"{member}/{PARAMETER}"), self._values(f"{member}/{variable}")

    def load(self, array: zarr.Array[Any], key: Any) -> np.ndarray:
        """`array[key]`, or a StoreError that names the array whose bytes cannot be read."""
        try:
            return np.asarray(array[key])
        except (OSError, RuntimeError, ValueError) as error:
            raise StoreError(
                f"{self._path!r} is damaged: {array.path!r} cannot be read ({type(error).__name__}: {error}). "
                "Other parameters and steps may still be readable; restore the run from a copy."
            ) from error

    def _place(self, parameter: str) -> Place:
        if parameter not in self.places:
            raise SelectionError(
                f"{self.name!r} has no measured parameter {parameter!r}. {nearest(parameter, self.places)}"
            )
        return self.places[parameter]

    @cached_property
    def _members(self) -> dict[str, tuple[str, ...]]:
        return {
            member: tuple(name for name in group.array_keys() if name != PARAMETER)
            for member, group in self._group.groups()
        }

    def _names(self, path: str) -> tuple[str, ...]:
        return tuple(map(str, self._values(path)))

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
