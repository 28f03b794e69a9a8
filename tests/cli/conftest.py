from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result

from gradtrace.cli import main
from gradtrace.store.rows import KINDS, ParameterInfo, ParameterRow, Status, StepRow
from gradtrace.store.writing.writer import RunWriter
from tests.store.samples import infos, parameter_row, step_row

COST = {"reduce": 0.5, "decompose": 0.25, "step": 2.0, "plain": 2.5, "period": 3.5}
NAMES = ("encoder.fc1.weight", "encoder.fc1.bias", "head.weight")


def unmeasurable_row() -> ParameterRow:
    """Two groups, of which one is not finite and the other absent."""
    nothing = np.full((2, 5), np.nan, dtype=np.float32)
    return ParameterRow(
        spectra=dict.fromkeys(KINDS, nothing),
        metrics={},
        status={kind: np.array([Status.NOT_FINITE, Status.GROUP_ABSENT], np.uint8) for kind in KINDS},
        inner_product=np.full((2, 2), np.nan),
        residual=0.5,
    )


@pytest.fixture(scope="session")
def run_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A closed run: steps 0, 2, ... 38 in epochs of 10 steps; one parameter never measured; one step not finite."""
    path = tmp_path_factory.mktemp("runs") / "run.zarr"
    unseen = ParameterInfo("frozen", (3,), {"rung": "ungrouped", "reason": "the op is opaque"})
    about = {"torch": "2.13.0", "seed": 7, "dtype": "float32"}
    with RunWriter(path, attrs=about, kinds=KINDS, keep=64, parameters=[*infos(NAMES), unseen]) as writer:
        for step in range(0, 40, 2):
            writer.append(step_row(step, NAMES, cost=COST))
        broken = {"head.weight": unmeasurable_row()}
        writer.append(StepRow(40, ("all", "diagnosis=SZ"), np.array([4, 0]), broken, epoch=4.0))
        writer.append(step_row(7, NAMES[:1], groups=("all",)), stream="probe/val")
    return path


@pytest.fixture
def cli() -> Callable[..., Result]:
    """Runs a command in this process; any exception that is not an exit is raised."""

    def run(*arguments: object, input: str | None = None) -> Result:
        return CliRunner().invoke(main, [str(a) for a in arguments], input=input, catch_exceptions=False)

    return run


@pytest.fixture
def shell() -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs a command in a process of its own."""

    def run(*arguments: object, prelude: str = "", **options: object) -> subprocess.CompletedProcess[str]:
        code = f"{prelude}\nfrom gradtrace.cli import main\nmain()"
        command = [sys.executable, "-W", "error", "-c", code, *map(str, arguments)]
        return subprocess.run(command, capture_output=True, text=True, timeout=60, **options)  # type: ignore[call-overload]

    return run


__all__ = ["NAMES", "parameter_row"]
