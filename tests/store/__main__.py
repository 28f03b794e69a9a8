"""`make torture`: hundreds of kills."""

from __future__ import annotations

import random
import tempfile
import time
from pathlib import Path

import click
import torch

from tests.store.torture import Torture


@click.command()
@click.option("--kills", type=click.IntRange(min=1), default=300, show_default=True)
@click.option("--seed", type=int, default=None, help="Of the moments.  [default: another one each time]")
def main(kills: int, seed: int | None) -> None:
    """Kills recordings, and says what was lost."""
    seed = random.SystemRandom().randrange(2**31) if seed is None else seed
    rng, done, runs, reads = random.Random(seed), 0, 0, 0
    torch.set_num_threads(1)
    began = time.monotonic()
    while done < kills:
        with tempfile.TemporaryDirectory() as folder:
            torture = Torture(Path(folder) / "run.zarr")
            for _ in range(min(kills - done, 25)):
                back = rng.randrange(torture.seen) if torture.seen and rng.random() < 0.1 else True
                torture.kill_after(rng.choice([0, 0, 1, 5, 30]), rng.uniform(0, 0.5), rng, back)
            torture.finish()
            done, runs, reads = done + torture.kills, runs + 1, reads + torture.reads
            click.echo(f"{done} kills of {runs} runs, {reads} snapshots read: nothing lost, nothing wrong", err=True)
    click.echo(f"{done} kills, {runs} runs, {reads} snapshots, seed {seed}, {time.monotonic() - began:.0f} s: 100 %")


main()
