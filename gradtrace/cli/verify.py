"""`gradtrace verify`: whether a run is whole, and what to do where it is not."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from gradtrace.cli import FAILURE
from gradtrace.cli.output import Output, note, output_options

if TYPE_CHECKING:
    from gradtrace.store.checking.finding import Finding

COLUMNS = ("severity", "stream", "array", "steps", "what", "remedy")


@click.command("verify")
@click.argument("run", type=click.Path())
@click.option("--repair", "mend", is_flag=True, help="Remove what is left over, and give up rows that are damaged.")
@output_options
@click.pass_context
def command(ctx: click.Context, run: str, mend: bool, output_format: str, output_path: Path | None) -> None:
    """Whether RUN is whole: metadata, chunks, and numbers that contradict each other.

    One row for each thing that is wrong (damage), that a kill left behind (leftover), or that is worth knowing (note),
    with what to do. Ends with exit code 1 if there is damage. Everything is read; a run that is being written is looked
    at as of its last commit.

    --repair removes what is left over, writes metadata anew that the root says otherwise, and keeps of each stream the
    rows before the first that is damaged. It says what it did on stderr, and shows what is still to be said.

    \b
    gradtrace verify run.zarr
    gradtrace verify run.zarr --repair
    """
    from gradtrace.store.checking.finding import DAMAGE
    from gradtrace.store.checking.repair import repair
    from gradtrace.store.checking.verify import verify
    from gradtrace.store.places.place import keys_at

    keys = keys_at(run)
    if mend:
        done, found = repair(keys)
        for sentence in done or ["nothing was to be repaired"]:
            note(f"{sentence[0].upper()}{sentence[1:]}.")
    else:
        found = verify(keys)
    output = Output(output_format, output_path)
    if found or not output.for_people:
        output.write(COLUMNS, ({column: getattr(one, column) for column in COLUMNS} for one in found))
    note(f"{keys.name}: {_counted(found)}.")
    if any(one.severity == DAMAGE for one in found):
        ctx.exit(FAILURE)


def _counted(found: Sequence[Finding]) -> str:
    """How much of which severity was found."""
    times = Counter(one.severity for one in found)
    return ", ".join(f"{number} {severity}" for severity, number in times.items()) or "all is well"
