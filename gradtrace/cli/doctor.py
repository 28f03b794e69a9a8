"""`gradtrace doctor`: how a study's parameters will be measured, and what would improve it, before it is trained."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from gradtrace.cli import FAILURE
from gradtrace.cli.definition import definition_options
from gradtrace.cli.output import Output, json_of, note, output_options

if TYPE_CHECKING:
    from gradtrace.checkup import Checkup, ParameterCheck

COLUMNS = (
    *(
        "parameter",
        "shape",
        "elements",
        "dtype",
        "ops",
        "adapters",
        "rung",
        "reason",
        "ownership",
        "coupled",
        "coupling",
    ),
    *("kinds", "kinds_absent", "rank_bound", "rank_reason"),
    *("residual", "owner_residual", "tolerance", "verdict", "advice"),
)
SHOWN = (
    *("parameter", "shape", "ops", "adapters", "rung", "ownership", "coupled", "kinds", "rank_bound"),
    *("residual", "owner_residual", "tolerance", "verdict"),
)
# What a narrow terminal goes without, in this order.
DISPENSABLE = (
    *("tolerance", "coupled", "rank_bound", "shape", "kinds", "ownership", "ops", "adapters"),
    *("owner_residual", "residual"),
)
INITIALS = {"gradient": "G", "activation": "A", "adjoint": "D"}
UNLIMITED = 100_000  # a pipe or file has no width to fit into
NAMED = 4  # so many parameters are named beside a piece of advice


@click.command("doctor")
@click.argument("study", metavar="STUDY")
@click.option(
    "--parameters",
    metavar="GLOB",
    multiple=True,
    help="Only parameters whose name matches; repeatable.  [default: all]",
)
@definition_options
@click.option(
    "--device",
    type=click.Choice(["auto", "cpu", "cuda"]),
    default="auto",
    show_default=True,
    help="Where to run; auto takes CUDA where there is one.",
)
@click.option("--only-problems", is_flag=True, help="Only parameters that fail or could be measured better.")
@click.option("--plan", "planned", is_flag=True, help="What is computed in which way instead, and what each takes.")
@output_options
@click.pass_context
def command(
    ctx: click.Context,
    study: str,
    only_problems: bool,
    planned: bool,
    output_format: str,
    output_path: Path | None,
    **options: Any,
) -> None:
    """How each parameter of STUDY will be measured, before training.

    Runs the study's first batch with its loss and groups, in training mode, and changes nothing. Per parameter: ops,
    adapters, rung and why, whose rows are whose, the kinds of spectra, the audits, and what would improve it; in all,
    what recording will cost. Ends with exit code 1 if a parameter is ungrouped or fails an audit.
    """
    from gradtrace.checkup import examine
    from gradtrace.planning.rates import measured_rates
    from gradtrace.study import load_study
    from gradtrace.training import chosen_device

    patterns = options.pop("parameters")
    loaded, rates = load_study(study), measured_rates(chosen_device(options["device"]))
    found = examine(loaded, parameters=patterns or None, rates=rates, **options)
    rows = found.problems if only_problems else found.parameters
    output = Output(output_format, output_path)
    if planned and output_format != "json":
        _write_plan(found, output)
    else:
        _write(found, rows, output)
    for text in (found.batch, *found.notes, *found.ranks, *found.costs, found.summary):
        note(_wrapped(text, _width(sys.stderr)))
    if not found.ok:
        ctx.exit(FAILURE)


def _write(found: Checkup, rows: Sequence[ParameterCheck], output: Output) -> None:
    if output.format == "json":
        with output.open() as file:
            json.dump(json_of(_nested(found, rows)), file, ensure_ascii=False, indent=2, allow_nan=False)
            file.write("\n")
    elif output.format == "table":
        _write_table(found, rows, output)
    else:
        output.write(COLUMNS, map(_flat, rows))


def _write_plan(found: Checkup, output: Output) -> None:
    from gradtrace.planning.planned import COLUMNS as PLANNED

    if output.format != "table":
        output.write(PLANNED, found.plan.rows())
        return
    with output.open() as file:
        file.write(f"{found.plan}\n")


def _nested(found: Checkup, rows: Sequence[ParameterCheck]) -> dict[str, Any]:
    return {
        "study": found.study,
        "ok": found.ok,
        "summary": found.summary,
        "loss": found.loss,
        "coupling": found.coupling,
        "groups": found.groups,
        "factored_share": found.factored_share,
        "notes": found.notes,
        "ranks": found.ranks,
        "step_seconds": found.step_seconds,
        "plan": {**found.plan.totals(), "rows": found.plan.rows()},
        "parameters": [{**_flat(row), "shape": row.shape} for row in rows],
    }


def _flat(row: ParameterCheck) -> dict[str, Any]:
    """A row under its columns."""
    found = {column: getattr(row, column) for column in COLUMNS}
    return found | {"shape": _shape(row), "rank_bound": row.rank_bound if row.is_measured else None}


def _shape(row: ParameterCheck) -> str:
    return "x".join(map(str, row.shape)) or "scalar"


# ---------------------------------------------------------------------- for people


def _write_table(found: Checkup, rows: Sequence[ParameterCheck], output: Output) -> None:
    numbers = {text: place for place, text in enumerate(found.advice, 1)}
    shown = [_short(row, numbers) for row in rows]
    width = _width(sys.stdout if output.path is None else None)
    output.write(_fitting(shown, width), shown)
    lines = []
    for text, place in numbers.items():
        lines.append(f"\n{place}. {_named(found.advice[text])}:\n{_wrapped(text, min(width, 100), indent='   ')}")
    if lines and output.path is None:
        click.echo("\n".join([*lines, ""]))
    elif lines and output.path is not None:
        with output.path.open("a", encoding="utf-8") as file:
            file.write("\n".join(lines) + "\n")


def _short(row: ParameterCheck, numbers: Mapping[str, int]) -> dict[str, Any]:
    """A row as the table has it: numbers in few digits, advice by its number."""
    audits = {name: f"{getattr(row, name):.0e}" for name in ("residual", "owner_residual", "tolerance")}
    advice = ", ".join(str(numbers[text]) for text in row.advice)
    verdict = row.verdict.replace("fails", "FAILS").replace("improvable", "see")
    return {
        "parameter": row.parameter,
        "shape": _shape(row),
        "ops": ", ".join(row.ops) or "-",
        "adapters": ", ".join(row.adapters) or "-",
        "rung": row.rung,
        "ownership": row.ownership,
        "coupled": "yes" if row.coupled else "-",
        "kinds": " ".join(INITIALS[kind] for kind in row.kinds) or "-",
        "rank_bound": str(row.rank_bound) if row.is_measured else "-",
        "verdict": f"{verdict} {advice}".strip(),
        **{name: "-" if text == "nan" else text for name, text in audits.items()},
    }


def _fitting(rows: Sequence[Mapping[str, str]], width: int) -> list[str]:
    """The columns that fit into a width side by side, the most important at least."""
    sizes = {column: max([len(column), *(len(row[column]) for row in rows)]) + 2 for column in SHOWN}
    kept = list(SHOWN)
    for column in DISPENSABLE:
        if sum(sizes[name] for name in kept) - 2 > width:
            kept.remove(column)
    return kept


def _named(names: Sequence[str]) -> str:
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return ", ".join(names[:NAMED]) + more


def _width(stream: Any) -> int:
    return shutil.get_terminal_size().columns if stream is not None and stream.isatty() else UNLIMITED


def _wrapped(text: str, width: int, *, indent: str = "") -> str:
    return click.wrap_text(text, width, initial_indent=indent, subsequent_indent=indent or "  ")
