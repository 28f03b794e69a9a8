"""`gradtrace export`: a run as tables in Parquet or CSV files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from gradtrace.cli import NOTHING_MATCHED
from gradtrace.cli.output import note
from gradtrace.cli.selecting import names, run_option, selection_options

TABLES = ("spectra", "metrics", "products", "audits", "steps", "parameters")
FORMATS = ("parquet", "csv", "csv.gz")


@click.command("export")
@click.argument("run", type=click.Path())
@click.argument("out", type=click.Path(path_type=Path))
@selection_options
@click.option("--components", type=click.IntRange(min=1), help="How many singular values.  [default: all]")
@click.option(
    "--table", "tables", type=click.Choice(TABLES), multiple=True, help="Only this table; repeatable.  [default: all]"
)
@click.option("--format", "form", type=click.Choice(FORMATS), help="[default: as OUT ends, or parquet]")
@click.option("--force", is_flag=True, help="Replace a former export.")
@run_option
@click.pass_context
def command(
    ctx: click.Context,
    run: str,
    out: Path,
    patterns: tuple[str, ...],
    tables: tuple[str, ...],
    form: str | None,
    force: bool,
    label: str | None,
    **asked: Any,
) -> None:
    """Write RUN as tidy tables: into the directory OUT, or one --table into the file OUT.

    PATTERN, --kind, --group, --step, --epoch and --probe select as in `gradtrace query`; --metric chooses columns of
    the table `metrics`. A run that is being written is exported as of its last commit.

    \b
    gradtrace export run.zarr tables
    gradtrace export run.zarr metrics.parquet --table metrics --group 'diagnosis=*'
    gradtrace export run.zarr spectra.csv.gz 'fc1.*' --table spectra --kind gradient --components 10
    """
    from gradtrace.store.places.place import keys_at
    from gradtrace.store.queries.selection import Query
    from gradtrace.store.tables.export import Export, format_of

    chosen, named = tuple(dict.fromkeys(tables)) or TABLES, format_of(out)
    single = len(chosen) == 1
    if named and form and named != form:
        raise click.UsageError(f"OUT ends in .{named} and --format says {form}; leave --format out.")
    if named and not single:
        raise click.UsageError(f"{out} is one file for {len(chosen)} tables. Choose a --table, or name a directory.")
    export = Export(Query(patterns=names(patterns), **asked), chosen, form or named or "parquet", single, force)
    done = export.write(keys_at(run), out, label)
    if not any(done.rows.values()):
        note(f"Nothing matched{f': no {done.selected.empty} is selected' if done.selected.empty else ''}.")
        ctx.exit(NOTHING_MATCHED)
    for name, rows in done.rows.items():
        note(f"{name}: {rows:,} rows")
    note(f"Written to {out}.")
