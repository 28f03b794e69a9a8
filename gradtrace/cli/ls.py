"""`gradtrace ls`: the parameters of a run."""

from __future__ import annotations

from pathlib import Path

import click

from gradtrace.cli import NOTHING_MATCHED
from gradtrace.cli.output import Output, note, output_options

COLUMNS = ("parameter", "shape", "rung", "kinds", "steps", "groups", "components", "ownership")


@click.command("ls")
@click.argument("run", type=click.Path(path_type=Path))
@click.argument("patterns", nargs=-1, metavar="[PATTERN]...")
@click.option("--probe", help="Look at this probe instead of the training run.")
@output_options
@click.pass_context
def command(
    ctx: click.Context,
    run: Path,
    patterns: tuple[str, ...],
    probe: str | None,
    output_format: str,
    output_path: Path | None,
) -> None:
    """The parameters of RUN: shape, how each was measured (its rung), and how often.

    `steps` counts the steps in which any group was measured, `groups` the groups that ever were, `components` the
    singular values kept. PATTERN selects parameters, as in `gradtrace query`.
    """
    from gradtrace.store.reader import open_run
    from gradtrace.store.selection import matching
    from gradtrace.store.summary import parameter_rows

    opened = open_run(run)
    wanted = set(matching("parameter", patterns, opened.parameters))
    rows = [row for row in parameter_rows(opened, opened.stream(probe)) if row["parameter"] in wanted]
    if not Output(output_format, output_path).write(COLUMNS, rows):
        note("Nothing matched.")
        ctx.exit(NOTHING_MATCHED)
