"""`gradtrace query`: values of a run, selected by name."""

from __future__ import annotations

import functools
import operator
import time
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from gradtrace.cli import NOTHING_MATCHED
from gradtrace.cli.output import ENDLESS, Output, note, output_options
from gradtrace.cli.selecting import names, selection_options
from gradtrace.errors import SelectionError

if TYPE_CHECKING:
    from gradtrace.store.places.keys import Keys
    from gradtrace.store.queries.follow import Follower
    from gradtrace.store.queries.query import Record
    from gradtrace.store.queries.selection import Query, Selected
    from gradtrace.store.reading.reader import Run
    from gradtrace.store.reading.snapshot import Snapshot

TABLE_COMPONENTS = 5
HELD = 4096  # records that are read before the first is written: up to there, a run that is rewound is read again


@click.command("query")
@click.argument("run", type=click.Path())
@selection_options
@click.option(
    "--components", type=click.IntRange(min=1), help="How many singular values.  [default: 5 in tables, or all]"
)
@click.option("--run", "runs", multiple=True, metavar="PATTERN", help="Of merged runs, those to look at; repeatable.")
@click.option("-f", "--follow", is_flag=True, help="Go on with the rows of a run that is being written, as they come.")
@click.option(
    "--timeout", type=click.FloatRange(min=0), metavar="SECONDS", help="Follow no longer when nothing came for so long."
)
@output_options
@click.pass_context
def command(
    ctx: click.Context,
    run: str,
    patterns: tuple[str, ...],
    runs: tuple[str, ...],
    follow: bool,
    timeout: float | None,
    output_format: str,
    output_path: Path | None,
    **asked: Any,
) -> None:
    """Singular values or metrics of RUN, for the parameters that PATTERN matches.

    A PATTERN is a parameter's name, a glob such as 'encoder.*', or a regular expression after 're:'; '-' reads names
    from stdin. Rows are long (one value each) except in tables, which by default show the last step only.

    \b
    gradtrace query run.zarr 'fc1.*' --kind gradient --step 0:100 --csv
    gradtrace query run.zarr --metric effective_rank --group 'diagnosis=*'
    gradtrace query run.zarr --metric cosine --json
    gradtrace query run.zarr --metric frobenius --follow --format jsonl
    """
    from gradtrace.store.places.place import keys_at
    from gradtrace.store.queries.selection import Query

    if asked["metrics"] and asked["components"]:
        raise click.UsageError("--components counts singular values and --metric asks for metrics; give one of them.")
    output = Output(output_format, output_path)
    if follow and output_format not in ENDLESS:
        raise click.UsageError(f"A run has no end while it is followed. Choose one of {', '.join(ENDLESS)}.")
    if timeout is not None and not follow:
        raise click.UsageError("--timeout says when to end --follow; give both.")
    last = output.for_people and asked["steps"] is None and asked["epochs"] is None
    if output.for_people and not asked["components"]:
        asked["components"] = TABLE_COMPONENTS
    query = Query(patterns=names(patterns), last_step_only=last, **asked)
    keys = keys_at(run)
    if not (_follow(output, keys, query, timeout) if follow else _print(output, keys, query, runs)):
        ctx.exit(NOTHING_MATCHED)


def _print(output: Output, keys: Keys, query: Query, runs: Sequence[str]) -> int:
    """The number of rows written: side by side for people, one value a row for programs; of merged runs, of each."""
    from gradtrace.store.reading.opened import labels
    from gradtrace.store.reading.snapshot import consistent

    columns, rows, empty = dict[str, None](), list[Iterator[dict[str, Any]]](), list[str | None]()
    failures, said = list[SelectionError](), dict[str, None]()
    for label in labels(keys, runs):
        begin = functools.partial(_begin, query=query, whole=output.for_people)
        try:
            run, selected, found = consistent(keys, begin, label)
        except SelectionError as error:  # of merged runs another may have what this one lacks
            failures.append(error)
            continue
        said |= dict.fromkeys(_said(run, selected, query))
        widest = max((selected.stream.places[name].width for name in selected.parameters), default=0)
        about = {} if label is None else {"run": label}
        columns |= dict.fromkeys([*about, *_columns(query, widest, output)])
        rows.append(map(functools.partial(operator.or_, about), _rows(found, query, output)))
        empty.append(selected.empty)
    if failures and not rows:
        raise failures[0]
    for sentence in said:
        note(sentence)
    last = [name for name in columns if name == "status"]  # also behind the further singular values of another run
    number = output.write([*(name for name in columns if name not in last), *last], chain.from_iterable(rows))
    if not number:
        note(f"Nothing matched{f': no {empty[0]} is selected' if empty and empty[0] else ''}.")
    return number


def _begin(snapshot: Snapshot, *, query: Query, whole: bool) -> tuple[Run, Selected, Iterator[Record]]:
    """What is selected, and its records: all of them, or, where there may be many, the first ones read already."""
    from gradtrace.store.queries.query import records
    from gradtrace.store.queries.selection import select

    selected = select(snapshot.run, query)
    found = records(selected, snapshot.whole) if selected.empty is None else iter(())
    return snapshot.run, selected, chain(list(islice(found, None if whole else HELD)), found)


def _follow(output: Output, keys: Keys, query: Query, timeout: float | None) -> int:
    """The number of rows written until no more can come."""
    from gradtrace.store.queries.follow import Follower

    if query.last_step_only:
        note("Showing the last step, then every step as it is committed; choose others by --step first:last.")
    for sentence in _said_of_metrics(query):
        note(sentence)
    follower = Follower(keys, query, tell=note)
    batches = (_rows(found, query, output) for found in _news(follower, timeout))
    number = output.follow(_columns(query, query.components or 0, output), batches)
    if not number:
        note("Nothing matched.")
    return number


def _news(follower: Follower, timeout: float | None) -> Iterator[Iterator[Record]]:
    """What comes, each time that something may have come. Whoever asks for the next has used up the one before."""
    last = time.monotonic()
    while follower.ended is None:
        before = follower.given
        yield follower.news()
        if follower.given > before:
            last = time.monotonic()
        elif timeout is not None and time.monotonic() - last >= timeout:
            note(f"Nothing came for {timeout:g} s.")
            return
        elif follower.ended is None:
            time.sleep(follower.interval)
    note(follower.ended)


def _said(run: Run, selected: Selected, query: Query) -> Iterator[str]:
    """What is to be said beside the rows of a run; of merged runs, what holds for several is said once."""
    if selected.unmeasured:
        reasons = [(name, run.parameters[name].attrs.get("reason")) for name in selected.unmeasured]
        yield f"Never measured: {', '.join(f'{name} ({why})' if why else name for name, why in reasons)}."
    if query.last_step_only and len(selected.stream.steps) > 1:
        step = selected.stream.steps[-1]
        yield f"Showing the last of {len(selected.stream.steps)} steps, {step}; choose others by --step first:last."
    yield from _said_of_metrics(query)
    yield from _said_of_others(selected, run)


def _said_of_metrics(query: Query) -> Iterator[str]:
    from gradtrace.metrics import RANK_RULE

    if "numerical_rank" in query.metrics:
        yield f"numerical_rank counts {RANK_RULE}."


def _said_of_others(selected: Selected, run: Run) -> Iterator[str]:
    """Of metrics that are not stored: what they are made of."""
    from gradtrace.metrics import BUILT_IN, find

    for name in selected.metrics:
        metric = find(name)
        if metric is not None and not metric.whole and name not in BUILT_IN:
            which = "all of them" if run.keep is None else f"the {run.keep} largest"
            yield f"{name} ({metric.definition}) is computed from the stored singular values, {which}."


def _columns(query: Query, widest: int, output: Output) -> list[str]:
    pair = ["group_other"] if "cosine" in query.metrics else []
    keys = ["step", "epoch", "parameter", "kind", "group", *pair]
    if not output.for_people:
        return [*keys, "metric" if query.metrics else "component", "value", "status"]
    if query.metrics:
        return [*keys, *dict.fromkeys(query.metrics), "status"]
    shown = range(1, min(widest, query.components or widest) + 1)
    return [*keys, *(f"sigma{place}" for place in shown), "status"]


def _rows(found: Iterable[Record], query: Query, output: Output) -> Iterator[dict[str, Any]]:
    return _wide(found) if output.for_people else _long(found, metrics=bool(query.metrics))


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


def _wide(found: Iterable[Record]) -> Iterator[dict[str, Any]]:
    for record in found:
        values = {(f"sigma{name}" if name.isdecimal() else name): value for name, value in record.values.items()}
        yield _keys(record) | {name: None if value != value else value for name, value in values.items()}


def _long(found: Iterable[Record], *, metrics: bool) -> Iterator[dict[str, Any]]:
    for record in found:
        keys = _keys(record)
        if metrics:
            yield from (keys | {"metric": name, "value": value} for name, value in record.values.items())
        elif record.status != "measured":
            yield keys | {"component": None, "value": None}
        else:
            for place, value in record.values.items():
                if value == value:  # the rest is padding
                    yield keys | {"component": int(place), "value": value}
