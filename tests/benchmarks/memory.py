"""Peak memory of a recorded step, as a ratio to the same step untraced: `python -m tests.benchmarks.memory`.

Each number comes from a process of its own: the largest resident size during a step (forward, backward, Adam) less what
the process had after the imports. Large blocks are handed back to the system at once, so that the peak is what was
alive, not what the allocator kept.
"""

from __future__ import annotations

import gc
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import date
from pathlib import Path

STEPS = 5
PROBING = 3  # the first steps, in which owners are probed
WAYS = {"untraced": "", "gradient": "gradient", "all kinds": "gradient,activation,adjoint"}
ENVIRONMENT = {"MALLOC_MMAP_THRESHOLD_": str(2**17), "MALLOC_TRIM_THRESHOLD_": "0", "OMP_NUM_THREADS": "1"}


def peaks(model: str, kinds: str) -> list[float]:
    """The peak of every step in MiB, in this process."""
    import torch

    import gradtrace as gt
    from tests.benchmarks.models import MODELS

    torch.manual_seed(0)
    gt.record, torch.linalg.svdvals(torch.eye(2))  # imports, and what LAPACK allocates once
    before = _status("VmRSS")
    network, batch, loss = MODELS[model]()
    optimizer = torch.optim.Adam(network.parameters())
    groups = ["SZ" if n % 2 else "HC" for n in range(len(batch))]
    found = []
    with tempfile.TemporaryDirectory() as folder, _recorder(network, folder, kinds) as step:
        for _ in range(STEPS):
            gc.collect()
            Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
            with step(groups):
                loss(network(batch)).backward()
            optimizer.step()
            optimizer.zero_grad()
            found.append(_status("VmHWM") - before)
    return found


@contextmanager
def _recorder(network: object, folder: str, kinds: str) -> Iterator[object]:
    import gradtrace as gt

    if not kinds:
        yield lambda groups: _nothing()
        return
    with gt.record(network, f"{folder}/run.zarr", kinds=kinds.split(",")) as recorder:  # type: ignore[arg-type]
        yield lambda groups: recorder.step(groups=groups)


@contextmanager
def _nothing() -> Iterator[None]:
    yield


def _status(field: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(field)).split()[1]) / 1024


def main() -> None:
    """A Markdown table on stdout."""
    import torch

    from tests.benchmarks.models import MODELS

    print(f"{date.today()}, torch {torch.__version__}, {platform.machine()}, {os.cpu_count()} cores, float32\n")
    print("| model | way | peak, MiB | ratio | while owners are probed |\n| --- | --- | --- | --- | --- |")
    for model in MODELS:
        untraced = 0.0
        for way, kinds in WAYS.items():
            done = subprocess.run(
                [sys.executable, "-W", "ignore", "-m", "tests.benchmarks.memory", model, kinds or "-"],
                env={**os.environ, **ENVIRONMENT}, capture_output=True, text=True, check=True,
            )  # fmt: skip
            found = [float(word) for word in done.stdout.split()]
            steady = max(found[PROBING:])
            untraced = untraced or steady
            probing = f"{max(found[:PROBING]) / untraced:.2f}" if kinds else ""
            print(f"| {model} | {way} | {steady:.0f} | {steady / untraced:.2f} | {probing} |", flush=True)


if __name__ == "__main__":
    if len(sys.argv) == 3:
        print(*peaks(sys.argv[1], sys.argv[2].replace("-", "")))
    else:
        main()
