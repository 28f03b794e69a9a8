"""`python -m tests.benchmarks`: Markdown on stdout, progress on stderr."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click
import torch
from torch import nn

from tests.benchmarks import memory
from tests.benchmarks.chart import draw
from tests.benchmarks.environment import environment, headline
from tests.benchmarks.models import LARGE, MODELS, Problem, problem
from tests.benchmarks.report import tables
from tests.benchmarks.results import Results, measured
from tests.benchmarks.rounds import clock
from tests.benchmarks.scaling import TITLES, scaled, scaling_table
from tests.benchmarks.targets import targets
from tests.benchmarks.ways import UNTRACED, USUAL, WAYS

SECONDS, SCALING_SECONDS = 120.0, 15.0  # what the rounds of a model may take, and of one point of the scaling


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--model", "models", multiple=True, type=click.Choice([*MODELS, *LARGE]), help="Repeatable. Default: all "
              f"but {' and '.join(LARGE)}.")  # fmt: skip
@click.option("--way", "ways", multiple=True, type=click.Choice(list(WAYS)), help="Repeatable. Default: all "
              "but behind.")  # fmt: skip
@click.option("--repeats", default=9, show_default=True, type=click.IntRange(1), help="Rounds, at most.")
@click.option("--seconds", type=click.FloatRange(0, min_open=True), help="What the rounds of a model may take "
              f"[default: {SECONDS:g}], or of one point of --scaling [default: {SCALING_SECONDS:g}].")  # fmt: skip
@click.option("--threads", type=click.IntRange(1), help="Threads of torch. Default: as torch chooses.")
@click.option("--device", default="auto", show_default=True, type=click.Choice(["auto", "cpu", "cuda"]))
@click.option("--memory", "with_memory", is_flag=True, help="Also peak memory, each number in a process of its own.")
@click.option("--scaling", is_flag=True, help="Only how the cost grows with groups, batch, width and so on.")
@click.option("--json", "json_path", type=click.Path(path_type=Path), help="Write every number to this file.")
@click.option("--plot", "plot_path", type=click.Path(path_type=Path), help="Draw the ratios into this file.")
def main(
    models: Sequence[str], ways: Sequence[str], repeats: int, seconds: float | None, threads: int | None, device: str,
    with_memory: bool, scaling: bool, json_path: Path | None, plot_path: Path | None,
) -> None:  # fmt: skip
    """What tracing costs, as ratios to the same training step untraced, measured in the same run.

    Every way of training has a copy of the model and its own turn in each round; rounds begin with another one each. A
    turn is a block of consecutive steps followed by a flush, so that what steps put off is counted in.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if threads:
        torch.set_num_threads(threads)
    _prime(device)
    bench = Bench(device, repeats, seconds, json_path)
    click.echo(headline(device) + "\n")
    if scaling:
        bench.scaling()
        return
    chosen = {name: WAYS[name] for name in dict.fromkeys([UNTRACED, *(ways or USUAL)])}
    found = bench.models(models or list(MODELS), chosen)
    click.echo(tables(found, list(chosen), targets(device)))
    if plot_path:
        draw(found, plot_path, targets(device), note=headline(device))
    if with_memory:
        bench.memory(list(found))


class Bench:
    """One run of the benchmark; what is known is written after each model, so that an interrupted run leaves some."""

    def __init__(self, device: str, repeats: int, seconds: float | None, path: Path | None) -> None:
        self._device, self._repeats, self._seconds, self._path = device, repeats, seconds, path
        self._kept: dict[str, Any] = {"environment": environment(device)}

    def models(self, names: Sequence[str], ways: Mapping[str, Any]) -> dict[str, Results]:
        """Model -> way -> result."""
        found = {}
        for name in dict.fromkeys(names):
            found[name] = self._measured(name, problem(name, self._device), ways, self._seconds or SECONDS)
            self._keep("models", {model: _plain(of) for model, of in found.items()})
        return found

    def scaling(self) -> None:
        """A Markdown table for every axis."""

        def measure(one: Problem, ways: Mapping[str, Any]) -> Results:
            return self._measured("scaling", one, ways, self._seconds or SCALING_SECONDS)

        kept: dict[str, Any] = {}
        for axis, found in scaled(measure, self._device):
            click.echo(f"By {TITLES[axis]}, a recorded step to the untraced one:\n\n{scaling_table(axis, found)}\n")
            kept[axis] = {value: _plain(of) for value, of in found.items()}
            self._keep("scaling", kept)

    def memory(self, models: Sequence[str]) -> None:
        """The Markdown table of peaks, row by row."""
        click.echo("\nPeak memory of a step:\n\n" + memory.HEAD)
        rows = []
        for row in memory.rows(models, self._device):
            click.echo(row.markdown())
            rows.append(asdict(row))
            self._keep("memory", rows)

    def _measured(self, name: str, one: Problem, ways: Mapping[str, Any], seconds: float) -> Results:
        def tell(what: str) -> None:
            click.echo(f"{name}: {what}", err=True)

        return measured(one, ways=ways, repeats=self._repeats, seconds=seconds, now=clock(self._device), tell=tell)

    def _keep(self, key: str, value: Any) -> None:
        self._kept[key] = value
        if self._path:
            self._path.write_text(json.dumps(self._kept, indent=1) + "\n", encoding="utf-8")


def _plain(found: Results) -> dict[str, Any]:
    return {way: asdict(result) for way, result in found.items()}


def _prime(device: str) -> None:
    """Imports, and what libraries set up at their first call, belong to no model's first steps."""
    with torch.device(device):
        tiny: Problem = nn.Linear(3, 2), torch.randn(4, 3), lambda output: output.square().mean()
    measured(tiny, repeats=1, seconds=0.1, now=clock(device))


if __name__ == "__main__":
    main(prog_name="python -m tests.benchmarks")
