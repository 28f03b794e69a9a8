"""`gradtrace plot`: pictures of a run, as papers need them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from gradtrace.cli import NOTHING_MATCHED
from gradtrace.cli.output import note
from gradtrace.cli.selecting import SpanType, names
from gradtrace.cli.tracing import graph_of_study

if TYPE_CHECKING:
    from gradtrace.store.queries.selection import Span

WHAT = ("map", "trajectory", "difference", "spectra", "scree", "cosine", "conflict", "graph")
KINDS = ("gradient", "activation", "adjoint")
FORMATS = ("png", "svg", "pdf")
ONLY = {
    "metric": ("map", "trajectory", "difference", "graph"),
    "kind": ("map", "trajectory", "difference", "spectra", "scree", "graph"),
    "components": ("spectra", "scree"),
    "smooth": ("trajectory", "difference"),
    "study": ("graph",),
}


@click.command("plot")
@click.argument("run", type=click.Path())
@click.argument("what", type=click.Choice(WHAT), metavar="WHAT")
@click.argument("patterns", nargs=-1, metavar="[PATTERN]...")
@click.option(
    "-o", "output", type=click.Path(dir_okay=False, path_type=Path), required=True, metavar="FILE",
    help="The picture to write: .png, .svg or .pdf.",
)  # fmt: skip
@click.option("--metric", help="sigma1, stable_rank, cosine, ...  [default: effective_rank]")
@click.option("--kind", type=click.Choice(KINDS), help="[default: gradient]")
@click.option("--group", "groups", multiple=True, help="Name or glob of groups; repeatable.  [default: see above]")
@click.option("--step", "steps", type=SpanType(), help="One step, or first:last; both ends are included.")
@click.option("--epoch", "epochs", type=SpanType(), help="One epoch, or first:last; both ends are included.")
@click.option("--probe", help="Look at this probe instead of the training run.")
@click.option("--run", "runs", multiple=True, metavar="PATTERN", help="Of merged runs, those to look at; repeatable.")
@click.option("--components", type=click.IntRange(min=1), help="How many singular values.  [default: 32]")
@click.option(
    "--smooth", type=click.IntRange(min=1), metavar="STEPS",
    help="Running median over so many of the shown steps; 1 for none.  [default: a 15th of them]",
)  # fmt: skip
@click.option("--scale", type=click.Choice(("mean", "raw")), default="mean", help="[default: mean, each group's own]")
@click.option("--width", type=click.Choice(["column", "page"]), default="column", show_default=True,
    help="Of a journal: 3.5 or 7.2 inches.",
)  # fmt: skip
@click.option("--note/--no-note", "noted", default=True, help="Whether the caption is written below.  [default: it is]")
@click.option("--study", metavar="STUDY", help="Of the graph: the study that was trained, a file or a module.")
@click.pass_context
def command(
    ctx: click.Context,
    run: str,
    what: str,
    patterns: tuple[str, ...],
    output: Path,
    kind: str | None,
    groups: tuple[str, ...],
    steps: Span | None,
    epochs: Span | None,
    probe: str | None,
    metric: str | None,
    scale: str,
    noted: bool,
    study: str | None,
    **asked: Any,
) -> None:
    """Draw WHAT of RUN, for the parameters that PATTERN matches, into FILE. WHAT is one of:

    \b
    map         a metric of every parameter over training
    trajectory  a metric over training per group; of merged runs, a band over them
    difference  one group's metric beside the other's: their ratio, or, of ranks, the
                difference
    spectra     singular values over training, as a heat map
    scree       singular values by size, early and late in training
    cosine      median cosine between the gradients of the groups
    conflict    share of steps in which these point against each other
    graph       the ops of STUDY's model, coloured by a metric

    Groups, unless told otherwise: `all` for map, spectra and graph, those of the first grouping for the others. A
    caption that says what is shown, at what scale, and what was left out goes to stderr.

    \b
    gradtrace plot run.zarr map -o map.png
    gradtrace plot run.zarr trajectory 'fc*.weight' --metric sigma1 -o sigma1.pdf --width page
    gradtrace plot folds.zarr difference '*.weight' --group 'diagnosis=*' -o difference.svg
    gradtrace plot run.zarr graph --study study.py -o graph.pdf
    """
    form = _format(output)
    _check(what, {"metric": metric, "kind": kind, "study": study, **asked})
    from gradtrace.plots.look import require_matplotlib

    require_matplotlib()  # before the run is read
    from gradtrace.plots.pictures import PICTURES
    from gradtrace.plots.reading import NothingToDraw
    from gradtrace.plots.request import Request
    from gradtrace.plots.sheet import encoded
    from gradtrace.store.places.place import keys_at
    from gradtrace.store.queries.selection import Query

    query = Query(
        names(patterns), (kind or "gradient",), groups, steps, epochs, probe=probe, metrics=(metric,) if metric else ()
    )
    given = {name: value for name, value in asked.items() if value is not None}
    graph = None if study is None else graph_of_study(study).nx
    request = Request(query, own_mean=scale == "mean", note=noted, graph=graph, **given)
    try:
        picture = PICTURES[what](keys_at(run), request)
    except NothingToDraw as error:
        note(f"Nothing matched: {error}.")
        ctx.exit(NOTHING_MATCHED)
    _write(output, encoded(picture.figure, form))
    note(picture.caption)


def _check(what: str, asked: dict[str, Any]) -> None:
    for option, pictures in ONLY.items():
        if asked[option] is not None and what not in pictures:
            raise click.UsageError(f"--{option} is of {', '.join(pictures)}. Leave it out for {what}.")
    if what == "graph" and asked["study"] is None:
        raise click.UsageError("A store holds no edges between ops. Add --study STUDY: the study that was trained.")


def _format(output: Path) -> str:
    form = output.suffix.lower().removeprefix(".")
    if form not in FORMATS:
        raise click.UsageError(f"{output.name!r} does not say in which format: end FILE in {', '.join(FORMATS)}.")
    return form


def _write(output: Path, data: bytes) -> None:
    try:
        output.write_bytes(data)
    except OSError as error:
        raise click.FileError(str(output), hint=error.strerror or str(error)) from error
