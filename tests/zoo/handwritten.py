"""Architectures that people train, written the way people write them."""

from __future__ import annotations

from tests.case import Case
from tests.zoo import (
    handwritten_graphs,
    handwritten_images,
    handwritten_language,
    handwritten_pairs,
    handwritten_signals,
    handwritten_solvers,
    handwritten_unets,
    handwritten_unusual,
)

_FAMILIES = (
    *(handwritten_images, handwritten_unets, handwritten_signals, handwritten_language, handwritten_graphs),
    *(handwritten_solvers, handwritten_pairs, handwritten_unusual),
)


def _gather() -> list[Case]:
    found = [value for family in _FAMILIES for value in vars(family).values() if isinstance(value, Case)]
    names = [case.name for case in found]
    assert len(names) == len(set(names)), "two models share a name"
    return found


MODELS = _gather()
