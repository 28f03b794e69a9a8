"""What a model is called with."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Inputs:
    """Positional and keyword arguments of one forward call."""

    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, value: Any) -> Inputs:
        """`value` as inputs: itself, a tuple (positional), a mapping (keyword arguments), or one positional value."""
        if isinstance(value, Inputs):
            return value
        if isinstance(value, tuple) and not hasattr(
            value, "_fields"
        ):  # a namedtuple, or a packed sequence, is one value
            return cls(args=value)
        if isinstance(value, Mapping):
            return cls(kwargs=dict(value))
        return cls(args=(value,))
