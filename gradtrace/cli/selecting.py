"""The options by which commands select what of a run they are about."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from gradtrace.store.queries.selection import Span


class SpanType(click.ParamType):
    """`7`, `3:9`, `3:`, `:9`: both ends included."""

    name = "first:last"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Span:
        from gradtrace.store.queries.selection import Span

        first, colon, last = str(value).partition(":")
        try:
            ends = (int(first) if first else None, int(last) if last else None)
        except ValueError:
            self.fail(f"{value!r} is neither a number nor first:last, with both ends included", param, ctx)
        if not colon and ends[0] is None:
            self.fail("it is empty; give a number, or first:last with both ends included", param, ctx)
        return Span(*ends) if colon else Span(ends[0], ends[0])


def selection_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Adds PATTERN, --kind, --group, --step, --epoch, --probe and --metric, named as the fields of a `Query`."""
    for option in (
        click.option("--metric", "metrics", multiple=True, help="sigma1, stable_rank, ...; repeatable."),
        click.option("--probe", help="Look at this probe instead of the training run."),
        click.option("--epoch", "epochs", type=SpanType(), help="One epoch, or first:last; both ends are included."),
        click.option("--step", "steps", type=SpanType(), help="One step, or first:last; both ends are included."),
        click.option("--group", "groups", multiple=True, help="Name or glob of groups; repeatable.  [default: all]"),
        click.option(
            "--kind", "kinds", multiple=True, help="gradient, activation or adjoint; repeatable.  [default: all]"
        ),
        click.argument("patterns", nargs=-1, metavar="[PATTERN]..."),
    ):
        command = option(command)
    return command


def run_option(command: Callable[..., Any]) -> Callable[..., Any]:
    """Adds --run, for commands that are about one run."""
    return click.option("--run", "label", metavar="LABEL", help="Of merged runs, the one to look at.")(command)


def names(patterns: Sequence[str]) -> list[str]:
    """The patterns, with `-` replaced by the lines of stdin; where there are none, a pattern that nothing matches."""
    if "-" not in patterns:
        return list(patterns)
    piped = [line.strip() for line in sys.stdin if line.strip()]
    return [name for pattern in patterns for name in (piped if pattern == "-" else [pattern])] or ["re:(?!)"]
