"""`gradtrace train`: somebody's own study, trained and recorded."""

from __future__ import annotations

from typing import Any

import click

from gradtrace.cli.definition import definition_options
from gradtrace.store.rows import KINDS

EPILOG = """\b
A STUDY is path/to/file.py or package.module with these functions:
  model()               the network
  batches()             the batches of one epoch (a generator, a DataLoader)
  inputs(batch)         what the network is called with: a tensor, a tuple
                        (positional) or a mapping (keyword arguments);
                        default: batch[0]
  loss(output, batch)   a tensor with one number
  groups(batch)         {grouping: one label per sample}
  optimizer(parameters) default: Adam with learning rate 1e-3
"""


@click.command("train", epilog=EPILOG)
@click.argument("study")
@click.option("-o", "--output", "run", type=click.Path(), help="The store to write.  [default: NAME-OF-STUDY.zarr]")
@click.option("--epochs", type=click.IntRange(min=1), default=1, show_default=True, help="Passes over batches().")
@click.option(
    "--every", type=click.IntRange(min=1), default=1, show_default=True, help="Record every K-th step.", metavar="K"
)
@click.option(
    "--budget",
    type=click.FloatRange(min=0, max=1, min_open=True),
    metavar="FRACTION",
    help="Instead of --every: choose a K for which recording adds less than this fraction to the training time.",
)
@click.option(
    "--kind",
    "kinds",
    type=click.Choice(KINDS),
    multiple=True,
    help="Which spectra to record; repeatable.  [default: all three]",
)
@click.option(
    "--keep",
    type=click.IntRange(min=0),
    default=64,
    show_default=True,
    metavar="K",
    help="How many of the largest singular values to store; 0 for all.",
)
@click.option(
    "--parameters",
    metavar="GLOB",
    multiple=True,
    help="Record only parameters whose name matches; repeatable.  [default: all]",
)
@click.option(
    "--behind/--no-behind",
    default=None,
    help="Whether spectra are computed behind the training, which goes on meanwhile.  [default: on a GPU]",
)
@click.option(
    "--min-samples",
    type=click.IntRange(min=1),
    default=1,
    show_default=True,
    metavar="N",
    help="Do not store groups with fewer samples in a step, nor those that would tell of them.",
)
@definition_options
@click.option("--seed", type=int, help="Seed of torch's random state, set before model().  [default: not set]")
@click.option(
    "--device",
    type=click.Choice(["auto", "cpu", "cuda"]),
    default="auto",
    show_default=True,
    help="Where to train; auto takes CUDA where there is one.",
)
def command(study: str, run: str | None, epochs: int, **options: Any) -> None:
    """Train the model of a STUDY and record its spectra.

    The training is the same as without recording. A run that is interrupted keeps what was recorded.
    """
    from gradtrace.cli.bars import training_bar
    from gradtrace.study import load_study
    from gradtrace.training import train_study

    recording = _recording(options)
    loaded = load_study(study)
    path = run or f"{loaded.name}.zarr"
    with training_bar() as bar:
        line = bar.add_task(loaded.name, total=None, loss="")

        def tick(loss: float, total: int | None) -> None:
            bar.update(line, advance=1, total=total, loss=f"loss {loss:.4g}")

        steps = train_study(loaded, path, epochs=epochs, tick=tick, **recording)
    click.echo(f"Trained for {steps} steps and recorded {path}. Next:\n  gradtrace info {path}", err=True)


def _recording(options: dict[str, Any]) -> dict[str, Any]:
    """The options in the library's terms: what was not given keeps the library's default."""
    kinds, parameters = options.pop("kinds"), options.pop("parameters")
    options["keep"] = options["keep"] or None
    if options["budget"] is not None and options["every"] != 1:
        raise click.UsageError("--every and --budget each say how often to record: give one of them.")
    return options | ({"kinds": kinds} if kinds else {}) | ({"parameters": parameters} if parameters else {})
