"""How a hand-written architecture is declared."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tests.case import Problem
from tests.zoo.model import Architecture, architecture

SOURCE = "hand-written"


def written(title: str, **facts: Any) -> Callable[[Callable[[], Problem]], Architecture]:
    """Decorator: a function that makes a problem becomes the architecture of that name, under what people call it."""
    return lambda make: architecture(make, title, SOURCE, **facts)
