from __future__ import annotations

from pathlib import Path

import pytest

from gradtrace.store.rows import KINDS, ParameterInfo
from gradtrace.store.writing.writer import RunWriter
from tests.inference.synthetic import write_run
from tests.store.samples import step_row

HOSTILE = "</script><script>alert(1)</script>"
HOSTILE_GROUP = "site=<img src=x onerror=alert(2)>"
NAMES = ("encoder.fc1.weight", "encoder.fc1.bias", "head.weight")


@pytest.fixture(scope="session")
def run_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Steps 0, 2, ... 38; a parameter whose audits fail in the later ones, a vector, and one never measured."""
    path = tmp_path_factory.mktemp("runs") / "run.zarr"
    attrs = {"rung": "factored", "ops": ["linear"], "ownership": "axis 0", "tolerance": 1e-2}
    infos = [
        ParameterInfo(NAMES[0], (11, 5), attrs),
        ParameterInfo(NAMES[1], (11,), attrs),
        ParameterInfo(NAMES[2], (11, 5), {**attrs, "tolerance": 2e-3}),
        ParameterInfo("frozen", (3,), {"rung": "ungrouped", "reason": "the op is opaque"}),
    ]
    with RunWriter(path, attrs={"torch": "2.13.0", "seed": 7}, kinds=KINDS, keep=64, parameters=infos) as writer:
        for step in range(0, 40, 2):
            writer.append(step_row(step, NAMES))
    return path


@pytest.fixture(scope="session")
def hostile_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(
        tmp_path_factory.mktemp("hostile") / "run.zarr",
        0,
        parameters=("fc1.weight", HOSTILE, "fc2.weight"),
        groups=("all", HOSTILE_GROUP, "site=B"),
        level={HOSTILE_GROUP: 1.0},
        steps=range(60),
        kinds=KINDS,
    )
