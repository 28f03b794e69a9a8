"""Rows to stdout or a file, in the format asked for."""

from __future__ import annotations

import csv
import json
import math
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import click

FORMATS = ("table", "csv", "tsv", "json", "jsonl", "md")
Row = Mapping[str, Any]


@dataclass(frozen=True)
class Output:
    """Where rows go and how they look."""

    format: str
    path: Path | None

    @property
    def for_people(self) -> bool:
        """Whether rows are to be looked at rather than read by a program."""
        return self.format in ("table", "md")

    def write(self, columns: Sequence[str], rows: Iterable[Row]) -> int:
        """The number of rows written."""
        counted = _Counted(rows)
        with self.open() as file:
            _WRITERS[self.format](file, columns, counted)
        return counted.number

    @contextmanager
    def open(self) -> Iterator[IO[str]]:
        """The file, or stdout."""
        if self.path is None:
            yield sys.stdout
            return
        with ExitStack() as stack:
            try:
                file = stack.enter_context(open(self.path, "w", encoding="utf-8", newline=""))
            except OSError as error:
                raise click.FileError(str(self.path), hint=error.strerror or str(error)) from error
            yield file


class _Counted:
    def __init__(self, rows: Iterable[Row]) -> None:
        self._rows, self.number = rows, 0

    def __iter__(self) -> Iterator[Row]:
        for row in self._rows:
            self.number += 1
            yield row


def output_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Adds --format, --json, --csv and -o; they arrive as `output_format` and `output_path`."""
    for option in (
        click.option("-o", "output_path", type=click.Path(dir_okay=False, path_type=Path), help="Write to FILE."),
        click.option("--csv", "output_format", flag_value="csv", help="Short for --format csv."),
        click.option("--json", "output_format", flag_value="json", help="Short for --format json."),
        click.option("--format", "output_format", type=click.Choice(FORMATS), default="table", show_default=True),
    ):
        command = option(command)
    return command


def note(text: str) -> None:
    """Tell people something that is not data."""
    click.echo(text, err=True)


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


def _cell(value: Any) -> Any:
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    if isinstance(value, list | tuple):
        return ";".join(map(str, value))
    return value


def _write_table(file: IO[str], columns: Sequence[str], rows: Iterable[Row]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, header_style="bold")
    held = list(rows)
    for column in columns:
        numeric = all(isinstance(row.get(column), int | float | None) for row in held)
        table.add_column(Text(column), justify="right" if numeric else "left", overflow="fold")
    for row in held:
        table.add_row(*(Text(text_of(row.get(column))) for column in columns))
    wide = None if file.isatty() else 100_000  # a pipe or file has no width to fit into
    Console(file=file, width=wide, highlight=False).print(table)


def _separated(delimiter: str) -> Callable[[IO[str], Sequence[str], Iterable[Row]], None]:
    def write(file: IO[str], columns: Sequence[str], rows: Iterable[Row]) -> None:
        writer = csv.writer(file, delimiter=delimiter, lineterminator="\n")
        writer.writerow(columns)
        writer.writerows([_cell(row.get(column)) for column in columns] for row in rows)

    return write


def _write_json(file: IO[str], columns: Sequence[str], rows: Iterable[Row]) -> None:
    separator = "[\n"
    for row in rows:
        file.write(separator + _json_line(columns, row))
        separator = ",\n"
    file.write("[]\n" if separator == "[\n" else "\n]\n")


def _write_jsonl(file: IO[str], columns: Sequence[str], rows: Iterable[Row]) -> None:
    for row in rows:
        file.write(_json_line(columns, row) + "\n")


def _json_line(columns: Sequence[str], row: Row) -> str:
    return json.dumps({column: json_of(row.get(column)) for column in columns}, ensure_ascii=False, allow_nan=False)


def _write_md(file: IO[str], columns: Sequence[str], rows: Iterable[Row]) -> None:
    file.write(f"| {' | '.join(columns)} |\n|{' --- |' * len(columns)}\n")
    for row in rows:
        cells = (text_of(row.get(column)).replace("|", "\\|").replace("\n", " ") for column in columns)
        file.write(f"| {' | '.join(cells)} |\n")


_WRITERS: dict[str, Callable[[IO[str], Sequence[str], Iterable[Row]], None]] = {
    "table": _write_table,
    "csv": _separated(","),
    "tsv": _separated("\t"),
    "json": _write_json,
    "jsonl": _write_jsonl,
    "md": _write_md,
}
