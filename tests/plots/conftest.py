from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from gradtrace.store.archives.merge import merge
from gradtrace.store.places.keys import Keys
from gradtrace.store.places.place import keys_at
from gradtrace.store.rows import KINDS, ParameterInfo
from gradtrace.store.writing.writer import RunWriter
from tests.store.samples import step_row

NAMES = ("encoder.fc1.weight", "encoder.fc1.bias", "head.weight")
STEPS = range(0, 40, 2)


def write(path: Path, steps: range = STEPS, names: tuple[str, ...] = NAMES, seed: int = 0) -> Path:
    """A closed run of matrices and, by their names, vectors. seed: moved to the steps that make its values."""
    infos = [ParameterInfo(n, (11,) if n.endswith("bias") else (11, 5), {"rung": "factored"}) for n in names]
    with RunWriter(path, attrs={}, kinds=KINDS, keep=64, parameters=infos) as writer:
        for step in steps:
            row = step_row(step + seed, names)
            writer.append(type(row)(**{**vars(row), "step": step}))
    return path


@pytest.fixture(scope="session")
def run_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("runs") / "run.zarr")


@pytest.fixture(scope="session")
def keys(run_path: Path) -> Keys:
    return keys_at(run_path)


@pytest.fixture(scope="session")
def merged_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three runs, the last of which has every second step of the others and some more."""
    folder = tmp_path_factory.mktemp("merged")
    runs = {"a": range(0, 40, 2), "b": range(0, 40, 2), "c": range(0, 60, 4)}
    for number, (label, steps) in enumerate(runs.items()):
        write(folder / f"{label}.zarr", steps, seed=100 * number)
    merge({label: folder / f"{label}.zarr" for label in runs}, folder / "merged.zarr")
    return folder / "merged.zarr"


def samples(step: int) -> np.ndarray:
    """Of `all` and the two groups, as `step_row` says."""
    return np.arange(1, 4) + step
