"""Numbers as a page holds them: few digits, and nothing that JSON has no word for."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

DIGITS = 4


def number(value: float | None) -> float | int | None:
    """The value with DIGITS significant digits; None where it is no finite number."""
    if value is None or not math.isfinite(value):
        return None
    rounded = float(f"{value:.{DIGITS}g}")
    return int(rounded) if rounded.is_integer() and abs(rounded) < 10**DIGITS else rounded


def numbers(values: np.ndarray) -> list[float | int | None] | None:
    """A curve; None where nothing of it is there."""
    return [number(value) for value in values.tolist()] if np.isfinite(values).any() else None


def plain(value: Any) -> Any:
    """What was stored as people read it: numbers rounded, everything else as text."""
    if value is None or isinstance(value, bool | int):
        return value
    if isinstance(value, float):
        return number(value) if math.isfinite(value) else str(value)
    if isinstance(value, list | tuple):
        return ", ".join(str(plain(one)) for one in value)
    return str(value)
