"""Every case that the tests of whole models run over."""

from __future__ import annotations

from tests.case import Case
from tests.families import attention, convolution, dense, pieces, recurrent, structured


def _gather() -> tuple[Case, ...]:
    found: list[Case] = []
    for family in (dense, convolution, recurrent, attention, structured, pieces):
        found += getattr(family, "FAMILY", [])
        found += [value for value in vars(family).values() if isinstance(value, Case)]
    names = [case.name for case in found]
    assert len(names) == len(set(names)), "two cases share a name"
    return tuple(found)


CASES = _gather()
BY_NAME = {case.name: case for case in CASES}
