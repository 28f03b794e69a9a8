"""Columns of tables, as blocks of rows: what is read of a store on its way into a file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

TEXT, STRING = "text", "string"  # text: few different strings, always `Coded`; string: objects, str or None


class Coded(NamedTuple):
    """A column with few different values: `values[codes]`. The values of a text column stay the same in all blocks."""

    codes: np.ndarray
    values: np.ndarray


Column = Coded | np.ndarray
Block = Mapping[str, Column]  # all of one length


def text(names: Sequence[str | None]) -> np.ndarray:
    """Strings as objects: a column, or the values of a coded one."""
    found = np.empty(len(names), dtype=object)
    found[:] = names
    return found


def length(block: Block) -> int:
    """The number of rows of a block."""
    first = next(iter(block.values()))
    return len(first.codes if isinstance(first, Coded) else first)
