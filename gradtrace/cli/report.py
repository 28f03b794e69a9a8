"""`gradtrace report`: a run as one page that opens anywhere."""

from __future__ import annotations

from pathlib import Path

import click

from gradtrace.cli.output import note
from gradtrace.cli.selecting import run_option


@click.command("report")
@click.argument("run", type=click.Path())
@click.option(
    "-o", "output", type=click.Path(dir_okay=False, path_type=Path), required=True, metavar="FILE",
    help="The page to write.",
)  # fmt: skip
@run_option
@click.option("--metric", help="That the map shows at first.  [default: effective_rank]")
@click.option("--group", "groups", multiple=True, help="Show and compare this group, or grouping; repeatable.")
@click.option("--title", default="", help="Of the page.  [default: the run's name]")
def command(run: str, output: Path, label: str | None, metric: str | None, groups: tuple[str, ...], title: str) -> None:
    """Write what is to be said of RUN into one HTML file, which needs no network and no server.

    What was run, how each parameter was measured and audited, a map of all parameters over training, the strongest
    differences between groups with their statistics, each parameter's spectra, a text on the methods, and provenance.
    A run that is still being written is shown as of its last commit.

    \b
    gradtrace report run.zarr -o report.html
    gradtrace report run.zarr -o report.html --metric stable_rank --group diagnosis
    gradtrace report folds.zarr --run fold3 -o fold3.html
    """
    from gradtrace.report.data import report_of
    from gradtrace.report.page import page_of, plotly_script
    from gradtrace.store.places.place import keys_at

    plotly_script()  # before anything is read
    data = report_of(keys_at(run), label=label, metric=metric, groups=groups, title=title)
    text = page_of(data)
    try:
        output.write_text(text, encoding="utf-8", newline="\n")
    except OSError as error:
        raise click.FileError(str(output), hint=error.strerror or str(error)) from error
    for sentence in data["notes"]:
        note(sentence)
    note(f"Wrote {output} ({len(text) / 1e6:.1f} MB).")
