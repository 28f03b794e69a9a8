"""`gradtrace ls`: the parameters of a run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from gradtrace.cli import NOTHING_MATCHED
from gradtrace.cli.output import Output, note, output_options
from gradtrace.cli.selecting import run_option

COLUMNS = ("parameter", "shape", "rung", "kinds", "steps", "groups", "components", "ownership")


@click.command("ls")
@click.argument("run", type=click.Path())
@click.argument("patterns", nargs=-1, metavar="[PATTERN]...")
@click.option("--probe", help="Look at this probe instead of the training run.")
@run_option
@output_options
@click.pass_context
def command(
    ctx: click.Context,
    run: str,
    patterns: tuple[str, ...],
    probe: str | None,
    label: str | None,
    output_format: str,
    output_path: Path | None,
) -> None:
    """The parameters of RUN: shape, how each was measured (its rung), and how often.

    `steps` counts the steps in which any group was measured, `groups` the groups that ever were, `components` the
    singular values kept. PATTERN selects parameters, as in `gradtrace query`.
    """
    from gradtrace.store.patterns import matching
    from gradtrace.store.places.place import keys_at
    from gradtrace.store.queries.summary import parameter_rows
    from gradtrace.store.reading.snapshot import Snapshot, consistent

    def look(snapshot: Snapshot) -> list[dict[str, Any]]:
        wanted = set(matching("parameter", patterns, snapshot.run.parameters))
        rows = parameter_rows(snapshot.run, snapshot.run.stream(probe))
        return [row for row in rows if row["parameter"] in wanted]

    rows = consistent(keys_at(run), look, label)
    if not Output(output_format, output_path).write(COLUMNS, rows):
        note("Nothing matched.")
        ctx.exit(NOTHING_MATCHED)
