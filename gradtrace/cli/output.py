"""Rows to stdout or a file, in the format asked for."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import click

from gradtrace.cli.formats import TEXT, json_of

FORMATS = tuple(TEXT)
PARQUET = "parquet"
ENDLESS = ("table", "csv", "tsv", "jsonl", "md")  # what a reader can make sense of before its end
Row = Mapping[str, Any]

__all__ = ["ENDLESS", "FORMATS", "PARQUET", "Output", "json_of", "note", "output_options"]


@dataclass(frozen=True)
class Output:
    """Where rows go and how they look."""

    format: str
    path: Path | None

    def __post_init__(self) -> None:
        if self.format == PARQUET and self.path is None:
            raise click.UsageError("Parquet is no text for a terminal or a pipe; say where to with -o FILE.")

    @property
    def for_people(self) -> bool:
        """Whether rows are to be looked at rather than read by a program."""
        return self.format in ("table", "md")

    def write(self, columns: Sequence[str], rows: Iterable[Row]) -> int:
        """The number of rows written."""
        if self.format != PARQUET:
            return self.follow(columns, [rows])
        from gradtrace.store.tables.parquet import write_rows

        counted = _Counted(rows)
        with self._refusals():
            write_rows(Path(str(self.path)), columns, counted)
        return counted.number

    def follow(self, columns: Sequence[str], batches: Iterable[Iterable[Row]]) -> int:
        """The number of rows written, each batch put out before the next is asked for."""
        total = 0
        with self.open() as file:
            form = TEXT[self.format](file, columns)
            for batch in batches:
                counted = _Counted(batch)
                form.write(counted)
                form.flush()
                total += counted.number
            form.close()
        return total

    @contextmanager
    def open(self) -> Iterator[IO[str]]:
        """The file, or stdout."""
        if self.path is None:
            yield sys.stdout
            return
        with ExitStack() as stack:
            with self._refusals():
                file = stack.enter_context(open(self.path, "w", encoding="utf-8", newline=""))
            yield file

    @contextmanager
    def _refusals(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise click.FileError(str(self.path), hint=error.strerror or str(error)) from error


class _Counted:
    def __init__(self, rows: Iterable[Row]) -> None:
        self._rows, self.number = rows, 0

    def __iter__(self) -> Iterator[Row]:
        for row in self._rows:
            self.number += 1
            yield row


def output_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Adds --format, --json, --csv and -o; they arrive as `output_format` and `output_path`."""
    formats = click.Choice((*FORMATS, PARQUET))
    for option in (
        click.option("-o", "output_path", type=click.Path(dir_okay=False, path_type=Path), help="Write to FILE."),
        click.option("--csv", "output_format", flag_value="csv", help="Short for --format csv."),
        click.option("--json", "output_format", flag_value="json", help="Short for --format json."),
        click.option("--format", "output_format", type=formats, default="table", show_default=True),
    ):
        command = option(command)
    return command


def note(text: str) -> None:
    """Tell people something that is not data."""
    click.echo(text, err=True)
