"""The parameters among a function's arguments: which tensors, what they are called, where they belong."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.utils import _pytree as pytree

from gradtrace.errors import CaptureError

Argnums = int | tuple[int, ...]


@dataclass(frozen=True)
class Variables:
    """The tensors to differentiate by, their names, and where they belong among the arguments."""

    names: tuple[str, ...]
    tensors: tuple[Tensor, ...]
    places: tuple[int, ...]
    specs: tuple[Any, ...]
    single: bool

    @classmethod
    def of(cls, f: Callable[..., Any], argnums: Argnums, args: tuple[Any, ...]) -> Variables:
        places = _places(f, argnums, len(args))
        several, known = isinstance(argnums, tuple), _argument_names(f)
        found: list[tuple[str, Tensor]] = []
        specs = []
        for place in places:
            paths, spec = pytree.tree_flatten_with_path(args[place])
            name = known[place] if place < len(known) else str(place)
            found += [(_name(path, name, several), _checked(value, name, path)) for path, value in paths]
            specs.append(spec)
        names = [name for name, _ in found]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise CaptureError(f"Two parameters have the path {twice[0]!r}. Rename a key: dots join nested keys.")
        if not found:
            raise CaptureError(f"Argument {places[0]} of {name_of(f)} holds no tensor to differentiate by.")
        return cls(tuple(names), tuple(tensor for _, tensor in found), places, tuple(specs), not several)

    def without(self, args: tuple[Any, ...]) -> list[Any]:
        """The arguments with None in the parameters' places."""
        return [None if place in self.places else value for place, value in enumerate(args)]

    def put(self, tensors: Sequence[Tensor], rest: list[Any]) -> list[Any]:
        """The arguments with `tensors` in the parameters' places."""
        full = list(rest)
        for place, value in zip(self.places, self._trees(tensors), strict=True):
            full[place] = value
        return full

    def structured(self, tensors: Sequence[Tensor]) -> Any:
        """`tensors` in the structure of the parameters; a tuple of structures for several arguments."""
        trees = self._trees(tensors)
        return trees[0] if self.single else tuple(trees)

    def _trees(self, tensors: Sequence[Tensor]) -> list[Any]:
        trees, rest = [], list(tensors)
        for spec in self.specs:
            trees.append(pytree.tree_unflatten(rest[: spec.num_leaves], spec))
            rest = rest[spec.num_leaves :]
        return trees


def name_of(f: Callable[..., Any]) -> str:
    """What a function is called in messages."""
    return str(getattr(f, "__name__", type(f).__name__))


def _places(f: Callable[..., Any], argnums: Argnums, count: int) -> tuple[int, ...]:
    asked = argnums if isinstance(argnums, tuple) else (argnums,)
    for number in asked:
        if isinstance(number, bool) or not isinstance(number, int) or not -count <= number < count:
            raise CaptureError(
                f"argnums={argnums!r} does not fit: {name_of(f)} was called with {count} positional arguments. Give "
                "the parameters by position."
            )
    places = tuple(number % count for number in asked)
    if not places or len(set(places)) < len(places):
        raise CaptureError(f"argnums={argnums!r} must name at least one argument, and none twice.")
    return places


def _argument_names(f: Callable[..., Any]) -> list[str]:
    """The names of f's positional arguments, as far as it tells."""
    try:
        found = inspect.signature(f).parameters.values()
    except (TypeError, ValueError):
        return []
    return [p.name for p in found if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]


def _name(path: Sequence[Any], argument: str, several: bool) -> str:
    keys = [str(getattr(key, "key", getattr(key, "idx", getattr(key, "name", key)))) for key in path]
    return ".".join([argument, *keys] if several or not keys else keys)


def _checked(value: Any, argument: str, path: Sequence[Any]) -> Tensor:
    if isinstance(value, Tensor) and (value.is_floating_point() or value.is_complex()):
        return value
    found = f"{value.dtype} tensor" if isinstance(value, Tensor) else type(value).__name__
    raise CaptureError(
        f"`{_name(path, argument, True)}` is a {found}; parameters are tensors of floating-point or complex numbers, "
        "in dicts, lists and tuples (of a module: dict(module.named_parameters())). Give what is no parameter in "
        "another argument."
    )
