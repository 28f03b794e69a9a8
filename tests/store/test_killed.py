"""A run killed at any moment, or read while it is written, shows whole rows only, and all that was committed."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import xarray as xr

from gradtrace.errors import StoreError
from gradtrace.store.reading.opened import open_run
from gradtrace.store.reading.reader import Run
from gradtrace.store.rows import Status
from tests.store.samples import parameter_row

CHILD = """
import sys, time
from gradtrace.store.writing.writer import RunWriter
from gradtrace.store.rows import KINDS
from tests.store.samples import infos, step_row
names = ["w0", "w1", "w2"]
pause = float(sys.argv[2])
with RunWriter(sys.argv[1], attrs={}, kinds=KINDS, keep=16, parameters=infos(names), flush_every=5) as writer:
    for step in range(int(sys.argv[3])):
        groups = ("all", "a", "b", "c", "d", "e")[: 2 + step // 20]
        writer.append(step_row(step, names[: 1 + step // 30] if step < 90 else names, groups=groups))
        if step % 7 == 0:
            writer.append(step_row(step, names[:1]), stream="probe/val")
        if step % 10 == 9:
            writer.flush()
            print(step + 1, flush=True)
        time.sleep(pause)
"""


def start(path: Path, *, pause: float, steps: int) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", CHILD, str(path), str(pause), str(steps)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def check_rows(run: Run) -> int:
    """The number of rows, all of which are whole and right."""
    stream = run.stream()
    count = run.committed["steps"]
    assert stream.steps.tolist() == list(range(count))
    assert stream.per_step("loss").tolist() == [1.0 / (step + 1) for step in range(count)]
    if count == 0:
        return 0
    spectra, status = stream.read("w0", "adjoint"), stream.read("w0", "adjoint_status")
    metric, inner = stream.read("w0", "nuclear"), stream.read("w0", "inner_product")
    for step in range(count):
        groups = min(2 + step // 20, 6)
        given = parameter_row(1000 * step, groups=groups)
        np.testing.assert_array_equal(spectra[step, :groups], given.spectra["adjoint"])
        np.testing.assert_array_equal(status[step, :groups], Status.MEASURED)
        np.testing.assert_array_equal(metric[step, :groups], given.metrics["gradient"]["nuclear"].astype(np.float32))
        np.testing.assert_array_equal(inner[step, :groups, :groups], given.inner_product.astype(np.float32))
        assert np.isnan(spectra[step, groups:]).all()
    return count


@pytest.mark.parametrize("seed", range(6))
def test_everything_committed_before_a_kill_is_readable(tmp_path: Path, seed: int) -> None:
    path = tmp_path / "run.zarr"
    child = start(path, pause=0.0, steps=100_000)
    assert child.stdout is not None
    promised = 0
    for _ in range(1 + 2 * seed):
        promised = int(child.stdout.readline())
    time.sleep(random.Random(seed).uniform(0, 0.05))
    os.kill(child.pid, signal.SIGKILL)
    promised = int((child.stdout.read().split() or [promised])[-1])
    child.stdout.close()
    child.wait()
    run = open_run(path)
    assert not run.closed
    assert check_rows(run) >= promised >= 10
    tree = xr.open_datatree(path, engine="zarr")
    assert tree["steps"].sizes["step"] == run.committed["steps"]
    assert not np.isnan(tree["steps/w16/gradient"].sel(parameter="w0", group="all").isel(component=0)).any()
    probe = run.stream("val")
    assert (probe.steps % 7 == 0).all()


def test_a_kill_before_the_first_commit_leaves_nothing_that_reads_wrong(tmp_path: Path) -> None:
    for delay in (0.0, 0.002, 0.01):
        path = tmp_path / f"run{delay}"
        child = start(path, pause=0.0, steps=1000)
        while not path.exists():
            time.sleep(0.0005)
        time.sleep(delay)
        os.kill(child.pid, signal.SIGKILL)
        child.communicate()
        if (path / "zarr.json").exists():
            assert check_rows(open_run(path)) >= 0
            continue
        with pytest.raises(StoreError, match=r"it has no zarr\.json"):
            open_run(path)


def test_a_reader_beside_the_writer_sees_whole_rows_and_ever_more_of_them(tmp_path: Path) -> None:
    path = tmp_path / "run.zarr"
    child = start(path, pause=0.002, steps=400)
    assert child.stdout is not None
    child.stdout.readline()
    seen = []
    while child.poll() is None:
        seen.append(check_rows(open_run(path)))
    child.communicate()
    assert child.returncode == 0
    assert len(seen) >= 3
    assert seen == sorted(seen)
    assert len(set(seen)) >= 3
    assert check_rows(open_run(path)) == 400
    assert open_run(path).closed
