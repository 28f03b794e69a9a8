"""`gradtrace plugins`: the adapters that are installed, ours and others'."""

from __future__ import annotations

from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any

import click

from gradtrace.cli import NOTHING_MATCHED
from gradtrace.cli.output import Output, note, output_options

ENTRY_POINTS = "gradtrace.adapters"
COLUMNS = ("adapter", "distribution", "version", "object", "ops", "error")


@click.command("plugins")
@output_options
@click.pass_context
def command(ctx: click.Context, output_format: str, output_path: Path | None) -> None:
    """The installed adapters: name, the distribution and version they come from, and the ops they say they claim.

    One that cannot be imported is listed with its error; the others go on.
    """
    points = sorted(entry_points(group=ENTRY_POINTS), key=lambda point: (point.name, point.value))
    rows = [_row(point) for point in points]
    for row in rows:
        if row["error"]:
            origin = row["distribution"] or row["object"]
            note(f"The adapter {row['adapter']!r} of {origin} cannot be used: {row['error']}")
    if not Output(output_format, output_path).write(COLUMNS, rows):
        note(f"No distribution offers an adapter (entry-point group {ENTRY_POINTS!r}). Install gradtrace again.")
        ctx.exit(NOTHING_MATCHED)


def _row(point: EntryPoint) -> dict[str, Any]:
    row: dict[str, Any] = {
        "adapter": point.name,
        "distribution": point.dist.name if point.dist else None,
        "version": point.dist.version if point.dist else None,
        "object": point.value,
        "ops": None,
        "error": None,
    }
    try:
        ops = getattr(point.load(), "ops", None)
    except Exception as error:  # somebody else's code: it must not take the others down
        return row | {"error": f"{type(error).__name__}: {error}"}
    ops = [ops] if isinstance(ops, str) else ops
    return row | {"ops": sorted(map(_op_name, ops)) if isinstance(ops, list | tuple | set | frozenset | dict) else None}


def _op_name(op: Any) -> str:
    return op if isinstance(op, str) else str(getattr(op, "__qualname__", op))
