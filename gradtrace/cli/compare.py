"""`gradtrace compare`: whether groups train differently, where, and whether it may be chance."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from gradtrace.cli import NOTHING_MATCHED
from gradtrace.cli.output import Output, note, output_options
from gradtrace.cli.selecting import SpanType, names

if TYPE_CHECKING:
    from gradtrace.inference.comparison import Comparison

TESTS = ("paired", "welch", "wilcoxon", "permutation", "resampled", "cluster")
CORRECTIONS = ("bh", "by", "max", "none")
SHOWN = ("group", "group_other", "parameter", "kind", "metric", "difference", "low", "high", "unit", "effect_g")
OF_CLUSTERS = ("first_step", "last_step")
TOP = 20
AT_LEAST_ONE = click.FloatRange(min=1)
MORE_THAN_ZERO = click.FloatRange(min=0, min_open=True)


@click.command("compare")
@click.argument("run", type=click.Path())
@click.argument("groups", nargs=-1, required=True, metavar="GROUP...")
@click.option("-p", "--parameter", "patterns", multiple=True, help="Name, glob or re:EXPRESSION; repeatable.")
@click.option("--kind", "kinds", multiple=True, help="gradient, activation or adjoint; repeatable.  [default: all]")
@click.option("--metric", "metrics", multiple=True, help="Of a spectrum, or sigma1, sigma2, ...; repeatable.")
@click.option("--step", "steps", type=SpanType(), help="One step, or first:last; both ends are included.")
@click.option("--epoch", "epochs", type=SpanType(), help="One epoch, or first:last; both ends are included.")
@click.option("--probe", help="Look at this probe.  [default: the only one that has the groups, if there is one]")
@click.option("--training", is_flag=True, help="Look at the training batches though a probe has the groups.")
@click.option("--run", "runs", multiple=True, metavar="PATTERN", help="Of merged runs, those to look at; repeatable.")
@click.option("--also", multiple=True, type=click.Path(), metavar="RUN", help="One more run; repeatable.")
@click.option("--test", type=click.Choice(TESTS), help="[default: paired, or cluster for a single run]")
@click.option("--correction", type=click.Choice(CORRECTIONS), default="bh", help="[default: bh]")
@click.option("--scale", type=click.Choice(("mean", "raw")), default="mean", help="[default: mean, each group's own]")
@click.option("--matched", type=AT_LEAST_ONE, metavar="TIMES", help="Largest ratio of the groups' sizes in a step.")
@click.option("--overlap", type=MORE_THAN_ZERO, help="Of --test resampled: test by training samples of a fold.")
@click.option("--draws", type=click.IntRange(min=100), default=2000, help="Permutations, if many.  [default: 2000]")
@click.option("--seed", type=int, default=0, help="Of the permutations.  [default: 0]")
@click.option("--all", "everything", is_flag=True, help="In a table all rows, not those with the smallest p.")
@click.option("--methods", "text", is_flag=True, help="Print a text for a methods section instead of rows.")
@output_options
@click.pass_context
def command(
    ctx: click.Context,
    run: str,
    groups: tuple[str, ...],
    patterns: tuple[str, ...],
    metrics: tuple[str, ...],
    probe: str | None,
    training: bool,
    also: tuple[str, ...],
    everything: bool,
    text: bool,
    output_format: str,
    output_path: Path | None,
    **asked: Any,
) -> None:
    """Compare GROUPs in RUN: do they train differently, in which parameters, when, and may it be chance?

    A GROUP is a name such as diagnosis=SZ, or a grouping, which stands for all its groups; all pairs are compared. RUN
    may be merged runs, or further ones are named by --also: then a run is the unit of inference. Of a single run only
    the cluster test over training is offered, as its steps depend on each other.

    Tables show the rows with the smallest p; other formats all rows in the order of the run. What the result speaks
    of, and what limits it, goes to stderr.

    \b
    gradtrace compare folds.zarr diagnosis=SZ diagnosis=HC
    gradtrace compare run.zarr site -p 'encoder.*' --metric effective_rank --csv
    gradtrace compare folds.zarr sex=F sex=M --test resampled --overlap 0.25 --methods
    """
    from gradtrace.inference.comparison import METRICS, NothingSelected, compare

    if probe is not None and training:
        raise click.UsageError("--probe names a probe and --training asks for none; give one of them.")
    output = Output(output_format, output_path)
    asked |= {"parameters": names(patterns), "metrics": metrics or METRICS}
    if probe is not None or training:
        asked["probe"] = probe
    try:
        found = compare([run, *also] if also else run, *groups, **asked)
    except NothingSelected as error:
        note(f"Nothing matched: {error}")
        ctx.exit(NOTHING_MATCHED)
    if text:
        click.echo(found.methods)
        return
    if not len(found):
        note("Nothing matched: nothing of what is selected was measured.")
        ctx.exit(NOTHING_MATCHED)
    _write(output, found, everything)


def _write(output: Output, found: Comparison, everything: bool) -> None:
    from gradtrace.inference.comparison import COLUMNS

    rows, columns = list(found.rows()), list(COLUMNS)
    if output.for_people:
        rows.sort(key=lambda row: (row["p"] is None, row["p"], -abs(row["statistic"] or 0.0)))
        rows, left = (rows, 0) if everything else (rows[:TOP], len(rows) - TOP)
        cluster = found.design.test == "cluster"
        noted = ["note"] if any(row["note"] for row in rows) else []
        columns = [*SHOWN, "p", "q", *(OF_CLUSTERS if cluster else ()), *noted]
        if found.design.runs == 1:
            columns.remove("effect_g")
        if left > 0:
            note(f"Showing the {TOP} rows with the smallest p of {len(found)}; --all shows all of them.")
    output.write(columns, rows)
    for sentence in _said(found):
        note(sentence)


def _said(found: Comparison) -> Iterator[str]:
    design = found.design
    if design.probe is not None:
        yield f"In the probe {design.probe!r}, at constant weights; --training compares in the training batches."
    yield from found.notes
    yield found.population
    yield "A grouping that is the training target differs by construction. --methods prints a text with all caveats."
