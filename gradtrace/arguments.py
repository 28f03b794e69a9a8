"""What a call is given, taken apart: arguments stand by themselves, or in lists, tuples and dictionaries."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import Tensor

from gradtrace.calls import Path


def changed(value: Any, change: Callable[[Any], Any]) -> Any:
    """Arguments with what `change` makes of each; what holds them is made anew."""
    if isinstance(value, (tuple, list)) and not hasattr(value, "_fields"):
        return type(value)(changed(item, change) for item in value)
    if isinstance(value, dict):
        return {key: changed(item, change) for key, item in value.items()}
    return change(value)


def put(value: Any, old: Any, new: Any) -> Any:
    """Arguments with `new` in place of `old`."""
    return changed(value, lambda one: new if one is old else one)


def detached(value: Any) -> Any:
    """Arguments whose tensors have no history."""
    return changed(value, lambda one: one.detach() if isinstance(one, Tensor) else one)


def paths(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Iterator[tuple[Path, Tensor]]:
    """Every tensor among the arguments, with where it stands."""
    items: list[tuple[int | str, Any]] = [*enumerate(args), *kwargs.items()]
    for key, value in items:
        if isinstance(value, Tensor):
            yield (key,), value
        elif isinstance(value, (tuple, list)):
            yield from (((key, place), item) for place, item in enumerate(value) if isinstance(item, Tensor))
