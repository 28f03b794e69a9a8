"""`gradtrace plugins`: the adapters that are installed, ours and others', and the package of a new one."""

from __future__ import annotations

from collections import Counter
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any

import click

from gradtrace.cli import NOTHING_MATCHED
from gradtrace.cli.output import Output, note, output_options
from gradtrace.errors import AdapterError
from gradtrace.scaffold import ENTRY_POINTS, Names, checked_name, write_package

COLUMNS = ("name", "distribution", "version", "origin", "ops", "error")


@click.group("plugins")
def command() -> None:
    """Adapters: which are installed (`list`), and the package of a new one (`new`)."""


@command.command("list")
@output_options
@click.pass_context
def list_adapters(ctx: click.Context, output_format: str, output_path: Path | None) -> None:
    """The installed adapters, where they come from, and what they claim.

    Name, distribution, version, the class, and the ops that it says it claims. One that cannot be used is listed with
    its error; the others go on.
    """
    points = sorted(entry_points(group=ENTRY_POINTS), key=lambda point: (point.name, point.value))
    rows = [_row(point) for point in points]
    for row in rows:
        if row["error"]:
            origin = row["distribution"] or row["origin"]
            note(f"The adapter {row['name']!r} of {origin} cannot be used: {row['error']}")
    for name, number in Counter(row["name"] for row in rows).items():
        if number > 1:
            note(f"{number} adapters are named {name!r}: where both claim a call, no choice can settle it.")
    if not Output(output_format, output_path).write(COLUMNS, rows):
        note(f"No distribution offers an adapter (entry-point group {ENTRY_POINTS!r}). Install gradtrace again.")
        ctx.exit(NOTHING_MATCHED)


def _row(point: EntryPoint) -> dict[str, Any]:
    row: dict[str, Any] = {
        "name": point.name,
        "distribution": point.dist.name if point.dist else None,
        "version": point.dist.version if point.dist else None,
        "origin": point.value,
        "ops": None,
        "error": None,
    }
    try:
        adapter = point.load()()
    except (Exception, SystemExit) as error:  # somebody else's code: it must not take the others down
        return row | {"error": f"{type(error).__name__}: {error}"}
    missing = [name for name in ("name", "claims", "factors") if not hasattr(adapter, name)]
    if missing:
        return row | {"error": f"It is no adapter: `{type(adapter).__name__}` has no {' and no '.join(missing)}."}
    return row | {"name": adapter.name, "ops": _op_names(getattr(adapter, "ops", None))}


def _op_names(ops: Any) -> list[str] | None:
    """The ops that an adapter says it claims: one text, or names and functions."""
    if isinstance(ops, str):
        return [ops]
    known = isinstance(ops, list | tuple | set | frozenset | dict)
    return sorted(op if isinstance(op, str) else str(getattr(op, "__qualname__", op)) for op in ops) if known else None


def _names(ctx: click.Context, parameter: click.Parameter, value: str) -> Names:
    try:
        return checked_name(value)
    except AdapterError as error:
        raise click.BadParameter(str(error), ctx, parameter) from None


@command.command("new")
@click.argument("names", metavar="NAME", callback=_names)
@click.option(
    "--into",
    "parent",
    metavar="DIR",
    type=click.Path(file_okay=False, path_type=Path),
    default=Path(),
    help="Where the package's folder is made; the current folder if not given.",
)
def new_package(names: Names, parent: Path) -> None:
    """Write the package of a new adapter into ./NAME.

    It has an adapter that works, the tests of its contract, and the entry point by which gradtrace finds it: install
    it, run its tests, and change it into yours. The files' paths go to stdout.
    """
    folder = parent / names.name
    try:
        written = write_package(names, folder)
    except OSError as error:
        raise click.FileError(str(error.filename or folder), hint=error.strerror or str(error)) from error
    for path in written:
        click.echo(path)
    note(f"Next: cd {folder} && pip install -e '.[test]' && pytest. Then change what is marked CHANGE.")
