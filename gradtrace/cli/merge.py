"""`gradtrace merge`: runs that belong together in one archive."""

from __future__ import annotations

import os
from collections.abc import Sequence

import click


@click.command("merge")
@click.argument("runs", nargs=-1, required=True, metavar="RUN...")
@click.argument("out", type=click.Path())
def command(runs: tuple[str, ...], out: str) -> None:
    """Write folds, seeds or other runs that belong together as one archive to OUT, along a dimension `run`.

    Each RUN is a path or URL, or NAME=PATH; its name is else that of the directory, without .zarr. Steps, groups and
    parameters are those of all runs: where a run lacks one, values are NaN. What the runs do not have in common is told
    on stderr. As for `gradtrace compact`, no RUN may be written any more, and every value is compared.

    \b
    gradtrace merge fold1.zarr fold2.zarr fold3.zarr folds.zarr
    gradtrace merge small=a/run.zarr large=b/run.zarr both.zarr
    """
    from gradtrace.cli.copying import copying, told
    from gradtrace.cli.output import note
    from gradtrace.store.archives.merge import merge

    sources = _labelled(runs)
    with copying() as progress:
        done = merge(sources, out, progress=progress)
    for text in done.notes:
        note(text)
    for label, size in done.before.items():
        note(f"{label}: {told(size)}")
    note(f"{out}: {told(done.after)}; every value is that of its run.")


def _labelled(arguments: Sequence[str]) -> dict[str, str]:
    """Name -> path. An argument that is a path as it stands has no name before its first `=`."""
    found: dict[str, str] = {}
    for argument in arguments:
        name, equals, path = argument.partition("=")
        if not equals or "/" in name or os.sep in name or os.path.exists(argument):
            path = argument
            name = os.path.basename(path.rstrip(f"/{os.sep}")).removesuffix(".zarr")
        if name in ("", ".", ".."):
            raise click.UsageError(f"{argument!r} says no name for the run. Give one: NAME=PATH.")
        if name in found:
            raise click.UsageError(
                f"Two runs would be called {name!r}: {found[name]} and {path}. Give them names: fold1={found[name]}."
            )
        found[name] = path
    return found
