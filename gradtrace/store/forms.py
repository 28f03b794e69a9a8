"""The arrays of a store: what they are called, their dimensions and types; in prose, `docs/reference/store.md`."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import NamedTuple

from gradtrace.store.rows import KINDS
from gradtrace.store.schema import (
    COMPONENT,
    GROUP,
    GROUP_OTHER,
    INNER_PRODUCT,
    KIND,
    METRIC,
    METRICS,
    OWNER_RESIDUAL,
    PARAMETER,
    PART,
    RESIDUAL,
    SCALAR,
    STATUS,
    STEP,
)


class Form(NamedTuple):
    """What an array is like, however long it is."""

    dims: tuple[str, ...]
    dtype: str


LABELS = (GROUP, GROUP_OTHER, KIND, METRIC, SCALAR, PART)
"""Coordinates of names, each along the dimension that is called like it, in the group of every stream."""

PER_STEP: Mapping[str, Form] = {
    STEP: Form((STEP,), "int64"),
    "loss": Form((STEP,), "float64"),
    "epoch": Form((STEP,), "float64"),
    "n_samples": Form((STEP, GROUP), "int64"),
    "scalars": Form((STEP, SCALAR), "float64"),
    "cost": Form((STEP, PART), "float64"),
}
"""In the group of every stream."""

WIDTH_CLASS = re.compile(r"w[0-9]{1,9}")
"""What the groups below a stream are called, each of which has a coordinate `parameter` of its own."""

ALWAYS: Mapping[str, Form] = {
    STATUS: Form((STEP, PARAMETER, GROUP, KIND), "uint8"),
    INNER_PRODUCT: Form((STEP, PARAMETER, GROUP, GROUP_OTHER), "float32"),
    RESIDUAL: Form((STEP, PARAMETER), "float32"),
    OWNER_RESIDUAL: Form((STEP, PARAMETER), "float32"),
}
"""In every width class."""

SOMETIMES: Mapping[str, Form] = {
    METRICS: Form((STEP, PARAMETER, GROUP, KIND, METRIC), "float32"),
    **dict.fromkeys(KINDS, Form((STEP, PARAMETER, GROUP, COMPONENT), "float32")),
}
"""In the width classes in which something was measured that belongs into them."""
