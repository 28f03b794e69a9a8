"""Stores of every version of the schema, as they were written then, are read as they were meant.

Each archive holds a run and what was handed over to its writer. They are never written again.
"""

from __future__ import annotations

import zipfile
from pathlib import Path

import numpy as np
import pytest
import xarray as xr

from gradtrace.store.reading.opened import open_run
from gradtrace.store.reading.reader import Run
from gradtrace.store.rows import KINDS
from gradtrace.store.schema import SCHEMA
from gradtrace.store.writing.writer import RunWriter
from tests.store.samples import infos, step_row

ARCHIVES = sorted((Path(__file__).parent / "golden").glob("*.zip"))
GROUPS = ("all", "diagnosis=HC", "diagnosis=SZ")


@pytest.fixture(params=ARCHIVES, ids=lambda path: path.stem)
def golden(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, dict[str, np.ndarray]]:
    with zipfile.ZipFile(request.param) as archive:
        archive.extractall(tmp_path)
    expected = np.load(tmp_path / "expected.npz")
    return tmp_path / "run.zarr", {name.replace("\\", "/"): expected[name] for name in expected.files}


def test_there_is_one_of_every_version() -> None:
    major, minor = SCHEMA
    assert [path.stem for path in ARCHIVES] == [f"{major}.{number}" for number in range(minor + 1)]


def check(run: Run, expected: dict[str, np.ndarray]) -> None:
    for name in ("steps", "probe/val"):
        stream = run.stream(None if name == "steps" else "val")
        kept = expected[f"{name}|steps"]
        assert stream.steps[: len(kept)].tolist() == kept.tolist()
        assert stream.per_step("loss")[: len(kept)].tolist() == expected[f"{name}|loss"].tolist()
        for key, value in expected.items():
            stream_name, place, *rest = key.split("|")
            if stream_name != name or not place.isdecimal():
                continue
            if rest == ["n_samples"]:
                assert stream.per_step("n_samples")[int(place)][: len(value)].tolist() == value.tolist()
                continue
            parameter, variable = rest
            found = stream.read(parameter, variable)[int(place)]
            where = tuple(slice(size) for size in value.shape)
            np.testing.assert_array_equal(found[where], value.astype(found.dtype), err_msg=key)


def test_it_is_read_as_it_was_meant(golden: tuple[Path, dict[str, np.ndarray]]) -> None:
    path, expected = golden
    run = open_run(path)
    assert run.closed
    assert run.groups == GROUPS
    assert run.attrs["seed"] == 7
    assert run.parameters["blocks/0 ü"].attrs["rung"] == "factored"
    check(run, expected)


def test_it_opens_without_gradtrace(golden: tuple[Path, dict[str, np.ndarray]]) -> None:
    path, expected = golden
    tree = xr.open_datatree(path, engine="zarr")
    homes = [node for node in tree["steps"].children.values() if "fc1.weight" in node["parameter"].values]
    found = homes[0]["gradient"].sel(parameter="fc1.weight").isel(step=0, group=slice(2), component=slice(3))
    np.testing.assert_array_equal(found.values, expected["steps|0|fc1.weight|gradient"][:, :3])


def test_it_can_be_gone_on_with(golden: tuple[Path, dict[str, np.ndarray]]) -> None:
    path, expected = golden
    names = ["fc1.weight", "blocks/0 ü", "late"]
    with RunWriter(path, attrs={}, kinds=KINDS, keep=17, parameters=infos(names), resume=True) as writer:
        assert writer.past is not None
        writer.append(step_row(writer.past.next_step, names, groups=GROUPS))
    run = open_run(path)
    assert run.schema == ".".join(map(str, SCHEMA))
    check(run, expected)
    assert run.committed["steps"] == len(expected["steps|steps"]) + 1
