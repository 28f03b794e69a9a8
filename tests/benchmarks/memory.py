"""Peak memory of a recorded step, to the same step untraced: `python -m tests.benchmarks.memory [MODEL ...]`.

Each number comes from a process of its own: the largest resident size during a step (forward, backward, Adam) less what
the process had after the imports. Large blocks are handed back to the system at once, so that the peak is what was
alive, not what the allocator kept. On a GPU: the most memory that torch had allocated there.
"""

from __future__ import annotations

import gc
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

STEPS = 5
PROBING = 3  # the first steps, in which owners are probed
WAYS = {"untraced": "", "gradient": "gradient", "all kinds": "gradient,activation,adjoint"}
ENVIRONMENT = {"MALLOC_MMAP_THRESHOLD_": str(2**17), "MALLOC_TRIM_THRESHOLD_": "0", "OMP_NUM_THREADS": "1"}
HEAD = "| model | way | peak, MiB | ratio | while owners are probed |\n| --- | --- | --- | --- | --- |"


@dataclass(frozen=True)
class Row:
    """The peak of a way in MiB, and its ratio to the untraced one; that of the first steps where it is traced."""

    model: str
    way: str
    peak: float
    ratio: float
    probing: float | None

    def markdown(self) -> str:
        """The row of a table under HEAD."""
        probing = "" if self.probing is None else f"{self.probing:.2f}"
        return f"| {self.model} | {self.way} | {self.peak:.0f} | {self.ratio:.2f} | {probing} |"


def rows(models: Sequence[str], device: str = "cpu") -> Iterator[Row]:
    """The rows of the table, as they come."""
    for model in models:
        untraced = 0.0
        for way, kinds in WAYS.items():
            done = subprocess.run(
                [sys.executable, "-W", "ignore", "-m", "tests.benchmarks.memory", "--peaks", model, kinds, device],
                env={**os.environ, **ENVIRONMENT}, stdout=subprocess.PIPE, text=True, check=True,
            )  # fmt: skip
            found = [float(word) for word in done.stdout.split()]
            steady = max(found[PROBING:])
            untraced = untraced or steady
            yield Row(model, way, steady, steady / untraced, max(found[:PROBING]) / untraced if kinds else None)


def peaks(model: str, kinds: str, device: str) -> list[float]:
    """The peak of every step in MiB, in this process."""
    import torch

    import gradtrace as gt
    from tests.benchmarks.models import problem

    gt.record, torch.linalg.svdvals(torch.eye(2))  # imports, and what LAPACK allocates once
    restart, peak = _on_gpu() if device == "cuda" else _resident()
    network, batch, loss = problem(model, device)
    optimizer = torch.optim.Adam(network.parameters())
    groups = ["SZ" if n % 2 else "HC" for n in range(len(batch))]
    found = []
    with tempfile.TemporaryDirectory() as folder, _recorder(network, folder, kinds) as step:
        for _ in range(STEPS):
            gc.collect()
            restart()
            with step(groups):
                loss(network(batch)).backward()
            optimizer.step()
            optimizer.zero_grad()
            found.append(peak())
    return found


def _resident() -> tuple[Callable[[], Any], Callable[[], float]]:
    """Functions that let the peak start again from here, and that tell it; resident size beyond today's."""
    before = _status("VmRSS")
    return lambda: Path("/proc/self/clear_refs").write_text("5"), lambda: _status("VmHWM") - before


def _on_gpu() -> tuple[Callable[[], Any], Callable[[], float]]:
    import torch

    return torch.cuda.reset_peak_memory_stats, lambda: torch.cuda.max_memory_allocated() / 2**20


@contextmanager
def _recorder(network: Any, folder: str, kinds: str) -> Iterator[Callable[[Any], AbstractContextManager[Any]]]:
    import gradtrace as gt

    if not kinds:
        yield lambda groups: nullcontext()
        return
    with gt.record(network, f"{folder}/run.zarr", kinds=kinds.split(",")) as recorder:
        yield lambda groups: recorder.step(groups=groups)


def _status(field: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(field)).split()[1]) / 1024


def main(models: Sequence[str]) -> None:
    """A Markdown table on stdout."""
    import torch

    from tests.benchmarks.models import MODELS

    print(f"{date.today()}, torch {torch.__version__}, {platform.machine()}, {os.cpu_count()} cores, float32\n")
    print(HEAD)
    for row in rows(models or list(MODELS)):
        print(row.markdown(), flush=True)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--peaks"]:
        print(*peaks(*sys.argv[2:]))
    else:
        main(sys.argv[1:])
