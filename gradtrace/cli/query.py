"""`gradtrace query`: values of a run, selected by name."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from gradtrace.cli import NOTHING_MATCHED
from gradtrace.cli.output import Output, note, output_options

if TYPE_CHECKING:
    from gradtrace.store.query import Record
    from gradtrace.store.reader import Run
    from gradtrace.store.selection import Selected, Span

TABLE_COMPONENTS = 5


class SpanType(click.ParamType):
    """`7`, `3:9`, `3:`, `:9`: both ends included."""

    name = "first:last"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Span:
        from gradtrace.store.selection import Span

        first, colon, last = str(value).partition(":")
        try:
            ends = (int(first) if first else None, int(last) if last else None)
        except ValueError:
            self.fail(f"{value!r} is neither a number nor first:last, with both ends included", param, ctx)
        if not colon and ends[0] is None:
            self.fail("it is empty; give a number, or first:last with both ends included", param, ctx)
        return Span(*ends) if colon else Span(ends[0], ends[0])


@click.command("query")
@click.argument("run", type=click.Path(path_type=Path))
@click.argument("patterns", nargs=-1, metavar="[PATTERN]...")
@click.option("--kind", "kinds", multiple=True, help="gradient, activation or adjoint; repeatable.  [default: all]")
@click.option("--group", "groups", multiple=True, help="Name or glob of groups; repeatable.  [default: all]")
@click.option("--step", "steps", type=SpanType(), help="One step, or first:last; both ends are included.")
@click.option("--epoch", "epochs", type=SpanType(), help="One epoch, or first:last; both ends are included.")
@click.option("--probe", help="Look at this probe instead of the training run.")
@click.option("--metric", "metrics", multiple=True, help="sigma1, stable_rank, cosine, ...; repeatable.")
@click.option(
    "--components", type=click.IntRange(min=1), help="How many singular values.  [default: 5 in tables, or all]"
)
@output_options
@click.pass_context
def command(
    ctx: click.Context, run: Path, patterns: tuple[str, ...], output_format: str, output_path: Path | None, **asked: Any
) -> None:
    """Singular values or metrics of RUN, for the parameters that PATTERN matches.

    A PATTERN is a parameter's name, a glob such as 'encoder.*', or a regular expression after 're:'; '-' reads names
    from stdin. Rows are long (one value each) except in tables, which by default show the last step only.

    \b
    gradtrace query run.zarr 'fc1.*' --kind gradient --step 0:100 --csv
    gradtrace query run.zarr --metric effective_rank --group 'diagnosis=*'
    gradtrace query run.zarr --metric cosine --json
    """
    from gradtrace.store.reader import open_run
    from gradtrace.store.selection import Query, select

    if asked["metrics"] and asked["components"]:
        raise click.UsageError("--components counts singular values and --metric asks for metrics; give one of them.")
    output = Output(output_format, output_path)
    last = output.for_people and asked["steps"] is None and asked["epochs"] is None
    if output.for_people and not asked["components"]:
        asked["components"] = TABLE_COMPONENTS
    opened = open_run(run)
    selected = select(opened, Query(patterns=_names(patterns), last_step_only=last, **asked))
    _explain(opened, selected, last)
    if not _write(output, selected):
        note(f"Nothing matched{f': no {selected.empty} is selected' if selected.empty else ''}.")
        ctx.exit(NOTHING_MATCHED)


def _write(output: Output, selected: Selected) -> int:
    """The number of rows written: side by side for people, one value a row for programs."""
    from gradtrace.store.query import records

    found = records(selected) if selected.empty is None else iter(())
    rows = _wide(found) if output.for_people else _long(found, selected)
    return output.write(_columns(selected, wide=output.for_people), rows)


def _names(patterns: Sequence[str]) -> list[str]:
    if "-" not in patterns:
        return list(patterns)
    piped = [line.strip() for line in sys.stdin if line.strip()]
    return [name for pattern in patterns for name in (piped if pattern == "-" else [pattern])] or ["re:(?!)"]


def _explain(run: Run, selected: Selected, last: bool) -> None:
    from gradtrace.metrics import RANK_RULE

    if selected.unmeasured:
        reasons = [(name, run.parameters[name].attrs.get("reason")) for name in selected.unmeasured]
        note(f"Never measured: {', '.join(f'{name} ({why})' if why else name for name, why in reasons)}.")

    if last and len(selected.stream.steps) > 1:
        step = selected.stream.steps[-1]
        note(f"Showing the last of {len(selected.stream.steps)} steps, {step}; choose others by --step first:last.")
    if "numerical_rank" in selected.metrics:
        note(f"numerical_rank counts {RANK_RULE}.")


def _columns(selected: Selected, *, wide: bool) -> list[str]:
    pair = ["group_other"] if "cosine" in selected.metrics else []
    keys = ["step", "epoch", "parameter", "kind", "group", *pair]
    if not wide:
        return [*keys, "metric" if selected.metrics else "component", "value", "status"]
    if selected.metrics:
        return [*keys, *selected.metrics, "status"]
    widest = max((selected.stream.places[name].width for name in selected.parameters), default=0)
    shown = range(1, min(widest, selected.components or widest) + 1)
    return [*keys, *(f"sigma{place}" for place in shown), "status"]


def _keys(record: Record) -> dict[str, Any]:
    return {
        "step": record.step,
        "epoch": record.epoch,
        "parameter": record.parameter,
        "kind": record.kind,
        "group": record.group,
        "group_other": record.group_other,
        "status": record.status,
    }


def _wide(found: Iterator[Record]) -> Iterator[dict[str, Any]]:
    for record in found:
        values = {(f"sigma{name}" if name.isdecimal() else name): value for name, value in record.values.items()}
        yield _keys(record) | {name: None if value != value else value for name, value in values.items()}


def _long(found: Iterator[Record], selected: Selected) -> Iterator[dict[str, Any]]:
    for record in found:
        keys = _keys(record)
        if selected.metrics:
            yield from (keys | {"metric": name, "value": value} for name, value in record.values.items())
        elif record.status != "measured":
            yield keys | {"component": None, "value": None}
        else:
            for place, value in record.values.items():
                if value == value:  # the rest is padding
                    yield keys | {"component": int(place), "value": value}
