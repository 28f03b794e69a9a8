"""`gradtrace info`: what was run, how it was measured, and what tracing cost."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import click

from gradtrace.cli.output import Output, json_of, output_options
from gradtrace.cli.selecting import run_option

COLUMNS = ("section", "name", "value")


@click.command("info")
@click.argument("run", type=click.Path())
@run_option
@output_options
def command(run: str, label: str | None, output_format: str, output_path: Path | None) -> None:
    """What RUN is: versions, seed, dtype, how parameters were measured, the worst audits, and the cost of tracing.

    With --json one nested object, otherwise rows of section, name and value.
    """
    from gradtrace.store.places.place import keys_at
    from gradtrace.store.queries.summary import run_summary
    from gradtrace.store.reading.snapshot import consistent

    summary = consistent(keys_at(run), lambda snapshot: run_summary(snapshot.run), label)
    output = Output(output_format, output_path)
    if output_format in ("json", "jsonl"):
        with output.open() as file:
            indent = 2 if output_format == "json" else None
            file.write(json.dumps(json_of(summary), ensure_ascii=False, indent=indent, allow_nan=False) + "\n")
        return
    output.write(COLUMNS, _without_repeats(summary) if output.for_people else _rows(summary))


def _rows(summary: Mapping[str, Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
    for section, entries in summary.items():
        for name, value in _flat(entries):
            yield {"section": section, "name": name, "value": value}


def _without_repeats(summary: Mapping[str, Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
    last = ""
    for row in _rows(summary):
        yield row if row["section"] != last else row | {"section": ""}
        last = row["section"]


def _flat(entries: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in entries.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value
