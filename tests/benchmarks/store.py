"""What a large run costs to write and to read, and how that grows: `python -m tests.benchmarks.store`.

400 parameters, four groups, 64 values of three kinds. Rows are handed over one after the other, as fast as they are
taken; at each size the store is looked at from a process of its own. The last line reduces all of it with dask in a
process that may not have as much memory as the store has bytes.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import numpy as np

from gradtrace.metrics import METRICS, WHOLE
from gradtrace.store.rows import KINDS, ParameterInfo, ParameterRow, Status, StepRow
from gradtrace.store.writing.writer import RunWriter

GROUPS = ("all", "diagnosis=HC", "diagnosis=SZ", "diagnosis=<missing>")
VALUES = 64
LEAST = 700 << 20  # bytes that the libraries need by themselves, and more
DRAWN = 24  # steps that are drawn, and then repeated: compression cannot see that far
COLUMNS = "| steps | written, ms a step | handed over, ms | files | MB | of raw | writer, MB | "
Look = Callable[[int, Mapping[str, float]], None]
ASKED = ("open", "a parameter, all steps", "all parameters, a step", "a metric of all, all steps", "a group's largest")


def drawn(parameters: int) -> list[StepRow]:
    """Steps with spectra that fall off as gradients' do."""
    rng = np.random.default_rng(0)
    decay = np.exp(-np.linspace(0, 6, VALUES))
    steps = []
    for _ in range(DRAWN):
        rows = {}
        for number in range(parameters):
            spectra = {kind: -np.sort(-rng.random((len(GROUPS), VALUES)) * decay, axis=1) for kind in KINDS}
            rows[f"blocks.{number}.weight"] = ParameterRow(
                spectra=spectra,
                metrics={kind: {name: METRICS[name](s) for name in WHOLE} for kind, s in spectra.items()},
                status={kind: np.full(len(GROUPS), Status.MEASURED, np.uint8) for kind in KINDS},
                inner_product=rng.random((len(GROUPS), len(GROUPS))),
                residual=1e-7,
            )
        steps.append(StepRow(0, GROUPS, np.array([16, 8, 7, 1]), rows, loss=0.5))
    return steps


def written(
    path: Path, sizes: Sequence[int], parameters: int, look: Callable[[int, Mapping[str, float]], None]
) -> None:
    """Writes a run, and lets it be looked at when it has each of these sizes."""
    steps, infos = drawn(parameters), [ParameterInfo(f"blocks.{n}.weight", (512, 512)) for n in range(parameters)]
    with RunWriter(path, attrs={}, kinds=KINDS, keep=VALUES, parameters=infos) as writer:
        waited, began, before = 0.0, time.perf_counter(), 0
        for step in range(max(sizes)):
            waited += writer.append(replace(steps[step % DRAWN], step=step))
            if step + 1 in sizes:
                writer.flush()
                count, took = step + 1 - before, time.perf_counter() - began
                look(step + 1, {"written": took / count, "waited": waited / count, "writer": peak()})
                waited, began, before = 0.0, time.perf_counter(), step + 1


def peak() -> float:
    """The most memory that this process has had, in MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1000


def asked(path: str) -> dict[str, float]:
    """Seconds of the usual questions, and the memory of who asks."""
    import gradtrace as gt

    gt.open_run(path)  # imports what it needs
    found: dict[str, float] = {"imported": peak()}

    def timed(what: str, ask: Callable[[], Any]) -> Any:
        began = time.perf_counter()
        answer = ask()
        found[what] = time.perf_counter() - began
        return answer

    run = timed("open", lambda: gt.open_run(path))
    name, stream = list(run.parameters)[len(run.parameters) // 2], run.stream()
    last = slice(len(stream.steps) - 1, None)
    timed(ASKED[1], lambda: stream.read(name, "gradient"))
    timed(ASKED[2], lambda: [stream.read(name, "gradient", last) for name in run.parameters])
    timed(ASKED[3], lambda: list(stream.over_parameters("effective_rank")))
    timed(ASKED[4], lambda: run.tree[name]["gradient"].isel(component=0).sel(group=GROUPS[1]).values)
    found["reader"] = peak()
    return found


def reduced(path: str) -> dict[str, float]:
    """A mean over all steps of every singular value, by dask, with as little memory as the limit leaves."""
    import dask
    import xarray as xr

    began = time.perf_counter()
    with dask.config.set(scheduler="threads", num_workers=2):
        tree = xr.open_datatree(path, engine="zarr", chunks={})
        mean = tree["steps/w64/gradient"].mean("step").compute()
    assert mean.shape[1:] == (len(GROUPS), VALUES)
    return {"seconds": time.perf_counter() - began, "peak": peak()}


def elsewhere(what: str, path: Path, limit: int = 0) -> dict[str, float]:
    """What another process says; limit: bytes of address space that it may have."""
    command = [sys.executable, "-m", "tests.benchmarks.store", "--only", what, "--at", str(path)]
    limited = (lambda: resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))) if limit else None
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, preexec_fn=limited)
    answer = json.loads(done.stdout)
    assert isinstance(answer, dict)
    return answer


@click.command()
@click.option("--steps", type=int, multiple=True, default=(100, 1000, 10_000), show_default=True)
@click.option("--parameters", type=int, default=400, show_default=True)
@click.option("--only", type=click.Choice(["asked", "reduced"]), hidden=True)
@click.option("--at", type=click.Path(path_type=Path), help="Where to write.  [default: a temporary folder]")
def main(steps: Sequence[int], parameters: int, only: str | None, at: Path | None) -> None:
    """What a large run costs."""
    if only:
        click.echo(json.dumps({"asked": asked, "reduced": reduced}[only](str(at))))
        return
    click.echo(COLUMNS + " | ".join(f"{q}, ms" for q in ASKED) + " | reader, MB |")
    click.echo("| --- " * (8 + len(ASKED)) + "|")
    with tempfile.TemporaryDirectory(dir=at) as folder:
        path = Path(folder) / "run.zarr"

        def look(count: int, of: Mapping[str, float]) -> None:
            files = [file.stat().st_size for file in path.rglob("*") if file.is_file()]
            raw, size = count * parameters * len(KINDS) * len(GROUPS) * VALUES * 4, sum(files)
            answers = elsewhere("asked", path)
            cells = [
                f"{count}", f"{of['written'] * 1e3:.1f}", f"{of['waited'] * 1e3:.1f}", f"{len(files)}",
                f"{size / 1e6:.0f}", f"{size / raw:.2f}", f"{of['writer']:.0f}",
                *(f"{answers[q] * 1e3:.0f}" for q in ASKED), f"{answers['reader']:.0f} ({answers['imported']:.0f})",
            ]  # fmt: skip
            click.echo(f"| {' | '.join(cells)} |")

        written(path, sorted(steps), parameters, look)
        size = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
        limit = min(max(size // 2, LEAST), 2 << 30)
        found = elsewhere("reduced", path, limit)
        click.echo(
            f"\nA mean over all {max(steps)} steps by dask, {limit / 1e6:.0f} MB of memory allowed: "
            f"{found['seconds']:.1f} s, {found['peak']:.0f} MB at most."
        )


if __name__ == "__main__":
    main()
