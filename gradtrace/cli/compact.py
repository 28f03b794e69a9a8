"""`gradtrace compact`: a finished run as an archive of few files."""

from __future__ import annotations

import click


@click.command("compact")
@click.argument("run", type=click.Path())
@click.argument("out", type=click.Path())
def command(run: str, out: str) -> None:
    """Write RUN as an archive to OUT: the same run in fewer files and bytes, quicker to read by parameter.

    RUN must not be written any more; it may have been killed, and stays as it is. Every value of the archive is read
    back and compared with RUN's before this ends; where one differs, OUT is removed. Nothing can be added to an
    archive. RUN and OUT are paths or URLs.

    \b
    gradtrace compact run.zarr archive.zarr
    gradtrace compact run.zarr s3://bucket/archive.zarr
    """
    from gradtrace.cli.copying import copying, told
    from gradtrace.cli.output import note
    from gradtrace.store.archives.compact import compact

    with copying() as progress:
        done = compact(run, out, progress=progress)
    note(f"{run}: {told(done.before)}")
    note(f"{out}: {told(done.after)}; every value is that of {run}.")
