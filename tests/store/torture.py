"""Real recordings, killed at random moments and gone on with, while somebody reads: `make torture`.

Nothing that was acknowledged or seen may be gone, and whatever is read is right, to the last bit. A step's numbers
depend on the step alone, so they can be made again.
"""

from __future__ import annotations

import functools
import multiprocessing
import random
import time
from dataclasses import dataclass, field
from multiprocessing.context import ForkServerContext, ForkServerProcess
from multiprocessing.sharedctypes import Synchronized
from multiprocessing.synchronize import Event
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

import gradtrace as gt
from gradtrace.store.places.keys import Directory
from gradtrace.store.places.orphans import orphans
from gradtrace.store.writing.past import Past

VARIABLES = ("gradient", "activation", "adjoint", "nuclear", "inner_product", "status")
STEPS = 400  # of the whole training, unless told otherwise
FLUSH = 7  # steps from one acknowledgement to the next
PROBE = 23  # steps from one probe to the next


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 3))


def batch(step: int) -> tuple[Tensor, list[str]]:
    """The samples of a step and their labels; further groups join as steps go by."""
    generator = torch.Generator().manual_seed(step)
    return torch.randn(6, 6, generator=generator), [f"g{n % (2 + step // 80)}" for n in range(6)]


def loss_of(output: Tensor) -> Tensor:
    return output.square().mean()


def train(path: str, begun: Event, acknowledged: Synchronized[int], resume: bool | int, steps: int) -> None:
    """The child: records from where the run stands, and says up to which step that is safe."""
    torch.set_num_threads(1)
    begun.set()
    model = network()
    with gt.record(model, path, resume=resume) as recorder:
        start = recorder.steps_done
        for step in range(start, steps):
            x, labels = batch(step)
            with recorder.step(groups={"site": labels}, scalars={"twice": 2 * step}):
                loss_of(model(x)).backward()
            model.zero_grad()
            if step % PROBE == PROBE - 1:
                recorder.probe("val", [batch(1000)[0]], lambda out, _: loss_of(out), inputs=lambda b: b)
            if step % FLUSH == FLUSH - 1:
                recorder.flush()
                acknowledged.value = step + 1


@functools.cache
def expected(step: int) -> dict[str, dict[str, np.ndarray]]:
    """What a step holds: parameter -> variable -> numbers, of the groups of that step."""
    x, labels = batch(step)
    tree = gt.spectra(network(), x, loss_of, groups={"site": labels})
    return {name: {v: node[v].values.astype(np.float32) for v in VARIABLES} for name, node in tree.children.items()}


@dataclass
class Torture:
    """One run that is killed again and again."""

    path: Path
    steps: int = STEPS
    kills: int = 0
    reads: int = 0
    seen: int = 0  # rows that a reader has seen
    rewound: int = 0
    context: ForkServerContext = field(default_factory=lambda: multiprocessing.get_context("forkserver"))

    def __post_init__(self) -> None:
        self.context.set_forkserver_preload(["tests.store.torture"])
        self.acknowledged: Synchronized[int] = self.context.Value("i", 0)
        self.begun = self.context.Event()

    def start(self, resume: bool | int = True) -> ForkServerProcess:
        """Another child that goes on with the run."""
        child = self.context.Process(
            target=train, args=(str(self.path), self.begun, self.acknowledged, resume, self.steps)
        )
        child.start()
        return child

    def kill_after(self, rows: int, seconds: float, rng: random.Random, resume: bool | int = True) -> None:
        """Kills the run's writer so long after it began or, where rows are asked for, after a reader saw more of them.

        The run is read all the while; not one that is rewound, of which both states may be met.
        """
        if resume is not True:
            self.acknowledged.value, self.seen, self.rewound = min(self.acknowledged.value, resume), 0, self.rewound + 1
        self.begun.clear()
        child, wanted, patience = self.start(resume), min(self.seen + rows, self.steps), time.monotonic() + 120
        assert self.begun.wait(120), "the child did not begin"
        while resume is True and self.seen < wanted and child.is_alive():
            assert time.monotonic() < patience, "the child makes no steps"
            self.read(rng)
        time.sleep(seconds)
        child.kill()
        child.join()
        self.kills += 1
        self.read(rng)
        assert self.seen >= self.acknowledged.value, "acknowledged, and gone"

    def read(self, rng: random.Random) -> None:
        """Reads one snapshot, some of it closely."""
        if not (self.path / "zarr.json").exists():
            assert self.acknowledged.value == 0
            return
        run = gt.open_run(self.path)
        stream, count = run.stream(), run.committed["steps"]
        assert stream.steps.tolist() == list(range(count))
        assert count >= self.seen, "seen, and gone"
        self.seen, self.reads = count, self.reads + 1
        assert stream.per_step("scalars")[:, :1].ravel().tolist() == [2.0 * step for step in range(count)]
        for step in rng.sample(range(count), min(count, 3)):
            check(run, step)
        if "val" in run.probe_names:
            probed = run.stream("val").steps.tolist()
            assert probed == list(range(PROBE, self.steps + 1, PROBE))[: len(probed)]

    def finish(self) -> gt.Run:
        """Lets the run come to its end, and checks all of it."""
        child = self.start()
        child.join()
        assert child.exitcode == 0
        run = gt.open_run(self.path)
        assert run.closed
        assert run.committed["steps"] == self.steps
        for step in range(self.steps):
            check(run, step)
        keys = Directory(self.path)
        assert list(orphans(keys.list(), Past(keys, None).members)) == []
        return run


def check(run: gt.Run, step: int) -> None:
    """One step of a run is what it should be, to the last bit."""
    stream, groups = run.stream(), len(set(batch(step)[1])) + 1
    for name, variables in expected(step).items():
        for variable, right in variables.items():
            found = stream.read(name, variable, slice(step, step + 1))[0]
            where = (slice(groups),) * (2 if variable == "inner_product" else 1)
            width = slice(right.shape[-1]) if found.ndim == 2 and variable != "inner_product" else None
            own = found[where] if width is None else found[where][:, width]
            np.testing.assert_array_equal(own, right, err_msg=f"{name} {variable} of step {step}")
