"""The formats in which rows are written: each takes rows as they come, and puts them out at the latest at its end."""

from __future__ import annotations

import csv
import json
import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from typing import IO, Any, Literal

Row = Mapping[str, Any]


class Format(ABC):
    """Rows of these columns on their way into a file."""

    def __init__(self, file: IO[str], columns: Sequence[str]) -> None:
        self.file, self.columns = file, columns
        self.begin()

    def begin(self) -> None:  # noqa: B027 - not every format has a head
        """Write what comes before all rows."""

    @abstractmethod
    def write(self, rows: Iterable[Row]) -> None:
        """Take these rows."""

    def flush(self) -> None:
        """Put out what was taken so far."""
        self.file.flush()

    def close(self) -> None:  # noqa: B027
        """Put out what is left, and what comes after all rows."""


class Table(Format):
    """Columns side by side, held back until they are asked for: their widths follow from the rows."""

    def begin(self) -> None:
        self._held: list[Row] = []
        self._widths: list[int] | None = None

    def write(self, rows: Iterable[Row]) -> None:
        self._held.extend(rows)

    def flush(self) -> None:
        """Rows that come after the first ones are as wide as those."""
        if self._held:
            self._print()
        super().flush()

    def close(self) -> None:
        if self._held or self._widths is None:
            self._print()

    def _print(self) -> None:
        from rich.cells import cell_len
        from rich.console import Console
        from rich.table import Table as RichTable
        from rich.text import Text

        cells = [[text_of(row.get(column)) for column in self.columns] for row in self._held]
        first, self._widths = (
            self._widths,
            self._widths or [max(map(cell_len, column)) for column in zip(self.columns, *cells, strict=True)],
        )
        table = RichTable(box=None, pad_edge=False, header_style="bold", show_header=first is None)
        for column, width in zip(self.columns, first or [0] * len(self.columns), strict=True):
            numeric = all(isinstance(row.get(column), int | float | None) for row in self._held)
            justify: Literal["right", "left"] = "right" if numeric else "left"
            table.add_column(Text(column), justify=justify, overflow="fold", min_width=width)
        for row in cells:
            table.add_row(*map(Text, row))
        wide = None if self.file.isatty() else 100_000  # a pipe or file has no width to fit into
        Console(file=self.file, width=wide, highlight=False).print(table)
        self._held = []


class Separated(Format):
    """Values between commas."""

    delimiter = ","

    def begin(self) -> None:
        self._writer = csv.writer(self.file, delimiter=self.delimiter, lineterminator="\n")
        self._writer.writerow(self.columns)

    def write(self, rows: Iterable[Row]) -> None:
        self._writer.writerows([_cell(row.get(column)) for column in self.columns] for row in rows)


class TabSeparated(Separated):
    """Values between tabs."""

    delimiter = "\t"


class Json(Format):
    """One array of objects."""

    def begin(self) -> None:
        self._separator = "[\n"

    def write(self, rows: Iterable[Row]) -> None:
        for row in rows:
            self.file.write(self._separator + json_line(self.columns, row))
            self._separator = ",\n"

    def close(self) -> None:
        self.file.write("[]\n" if self._separator == "[\n" else "\n]\n")


class JsonLines(Format):
    """One object a line."""

    def write(self, rows: Iterable[Row]) -> None:
        for row in rows:
            self.file.write(json_line(self.columns, row) + "\n")


class Markdown(Format):
    """A table for a page."""

    def begin(self) -> None:
        self.file.write(f"| {' | '.join(self.columns)} |\n|{' --- |' * len(self.columns)}\n")

    def write(self, rows: Iterable[Row]) -> None:
        for row in rows:
            cells = (text_of(row.get(column)).replace("|", "\\|").replace("\n", " ") for column in self.columns)
            self.file.write(f"| {' | '.join(cells)} |\n")


TEXT: dict[str, type[Format]] = {
    "table": Table,
    "csv": Separated,
    "tsv": TabSeparated,
    "json": Json,
    "jsonl": JsonLines,
    "md": Markdown,
}


def text_of(value: Any) -> str:
    """A value as people read it."""
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, list | tuple):
        return ", ".join(map(text_of, value))
    return str(value)


def json_of(value: Any) -> Any:
    """A value as JSON has it: NaN becomes null, infinity a string."""
    if isinstance(value, float) and not math.isfinite(value):
        return None if math.isnan(value) else str(value)
    if isinstance(value, Mapping):
        return {str(key): json_of(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [json_of(item) for item in value]
    return value


def json_line(columns: Sequence[str], row: Row) -> str:
    """A row as a JSON object on one line."""
    return json.dumps({column: json_of(row.get(column)) for column in columns}, ensure_ascii=False, allow_nan=False)


def _cell(value: Any) -> Any:
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    if isinstance(value, list | tuple):
        return ";".join(map(str, value))
    return value
