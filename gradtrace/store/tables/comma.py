"""CSV files of columns that come block by block, gzipped where the name says so."""

from __future__ import annotations

import csv
import gzip
import io
from collections.abc import Iterable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

from gradtrace.store.tables.columns import Block, Coded, Column, length

ROWS = 1 << 16  # turned into text at a time
LEVEL = 5


class CommaFile:
    """A file of these columns; NaN and None are empty."""

    def __init__(self, path: Path, columns: Iterable[str], *, zipped: bool) -> None:
        self._columns = list(columns)
        self._stack = ExitStack()
        file: Any = self._stack.enter_context(path.open("wb"))
        if zipped:  # without name and time: the same rows make the same bytes
            file = self._stack.enter_context(gzip.GzipFile("", "wb", LEVEL, file, mtime=0))
        self._file = self._stack.enter_context(io.TextIOWrapper(file, encoding="utf-8", newline=""))
        self._file.write(_line(self._columns))
        self._known: dict[int, tuple[np.ndarray, np.ndarray]] = {}  # names, by identity, and what they are as cells

    def write(self, block: Block) -> None:
        """Append rows."""
        for start in range(0, length(block), ROWS):
            cells = [self._cells(block[name], slice(start, start + ROWS)) for name in self._columns]
            self._file.write("\n".join(map(",".join, zip(*cells, strict=True))) + "\n")

    def close(self) -> None:
        """Write what is left."""
        self._stack.close()

    def _cells(self, column: Column, rows: slice) -> list[str]:
        if not isinstance(column, Coded):
            return _texts(column[rows]).tolist()
        if column.values.dtype != object:
            return _texts(column.values)[column.codes[rows]].tolist()
        if id(column.values) not in self._known:
            self._known[id(column.values)] = (column.values, _texts(column.values))
        return self._known[id(column.values)][1][column.codes[rows]].tolist()


def _texts(values: np.ndarray) -> np.ndarray:
    """The values as cells: floats in the fewest digits that tell them apart."""
    found = np.empty(len(values), dtype=object)
    if values.dtype == object:
        found[:] = ["" if value is None else _cell(value) for value in values]
    else:
        found[:] = values.astype("U32").tolist()
        if values.dtype.kind == "f":
            found[np.isnan(values)] = ""
    return found


def _cell(value: str) -> str:
    return _line([value]).removesuffix("\n")


def _line(cells: list[str]) -> str:
    line = io.StringIO()
    csv.writer(line, lineterminator="\n").writerow(cells)
    return line.getvalue()
