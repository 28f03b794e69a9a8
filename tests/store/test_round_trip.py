"""What is written comes back: through the reader, through the tree, and through plain xarray."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xarray as xr
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gradtrace.store.reading.opened import open_run
from gradtrace.store.reading.tree import tree_of
from gradtrace.store.rows import KINDS, ParameterInfo, ParameterRow, Status, StepRow
from gradtrace.store.writing.writer import RunWriter
from tests.store.samples import GROUPS, infos, parameter_row, step_row

NAMES = ("fc1.weight", "fc1.bias")
Make = Callable[..., RunWriter]


def test_every_value_of_a_row_comes_back(new_writer: Make) -> None:
    rows = [step_row(step, NAMES, scalars={"val/accuracy ü": step / 2}) for step in range(0, 30, 3)]
    with new_writer() as writer:
        for row in rows:
            writer.append(row)
    run = open_run(writer.path)
    stream = run.stream()
    assert run.closed
    assert stream.steps.tolist() == [row.step for row in rows]
    assert stream.groups == GROUPS
    assert stream.per_step("loss").tolist() == [row.loss for row in rows]
    assert stream.per_step("scalars")[:, 0].tolist() == [row.scalars["val/accuracy ü"] for row in rows]
    assert stream.scalar_names == ("val/accuracy ü",)
    assert stream.per_step("cost").tolist() == [[0.25]] * 10
    np.testing.assert_array_equal(stream.per_step("n_samples"), [row.n_samples for row in rows])
    for name in NAMES:
        _assert_same(stream, name, [row.parameters[name] for row in rows])


def _assert_same(stream: Any, name: str, rows: list[ParameterRow]) -> None:
    for kind in KINDS:
        prefix = "" if kind == "gradient" else f"{kind}_"
        np.testing.assert_array_equal(stream.read(name, kind), [row.spectra[kind] for row in rows])
        np.testing.assert_array_equal(stream.read(name, f"{prefix}status"), [row.status[kind] for row in rows])
        for metric in rows[0].metrics[kind]:
            expected = np.array([row.metrics[kind][metric] for row in rows], dtype=np.float32)
            np.testing.assert_array_equal(stream.read(name, prefix + metric), expected)
    expected = np.array([row.inner_product for row in rows], dtype=np.float32)
    np.testing.assert_array_equal(stream.read(name, "inner_product"), expected)
    np.testing.assert_allclose(stream.read(name, "residual"), [row.residual for row in rows], rtol=1e-6)


def test_the_tree_of_a_store_equals_the_tree_of_its_row(new_writer: Make) -> None:
    row = step_row(5, NAMES, scalars={"lr": 0.1})
    with new_writer() as writer:
        writer.append(row)
    stored = open_run(writer.path).tree
    direct = tree_of(row, infos(NAMES), attrs={})
    assert list(stored.children) == list(direct.children)
    for name in NAMES:
        ours, theirs = (
            direct[name].to_dataset().drop_dims(["scalar", "part"]),
            stored[name].sel(step=5).to_dataset().drop_vars("step"),
        )
        assert set(ours.data_vars) == set(theirs.data_vars)
        xr.testing.assert_allclose(
            ours.astype(float), theirs.drop_vars(["scalar", "part"], errors="ignore").astype(float)
        )
        assert direct[name].attrs == stored[name].attrs


def test_spectra_are_selected_by_the_names_of_groups(new_writer: Make) -> None:
    row = step_row(0, NAMES)
    spectrum = tree_of(row, infos(NAMES), attrs={})["fc1.weight"]["gradient"].sel(group="diagnosis=SZ")
    assert spectrum.dims == ("component",)
    assert spectrum.values.tolist() == row.parameters["fc1.weight"].spectra["gradient"][2].tolist()
    assert (np.diff(spectrum.values) <= 0).all()


def test_plain_xarray_opens_a_closed_store_with_labels(new_writer: Make) -> None:
    rows = [step_row(step, NAMES) for step in range(5)]
    with new_writer() as writer:
        for row in rows:
            writer.append(row)
        writer.append(step_row(2, NAMES, groups=("all",)), stream="probe/val")
    for consolidated in (True, None):
        tree = xr.open_datatree(writer.path, engine="zarr", consolidated=consolidated)
        found = tree["steps/w16/gradient"].sel(parameter="fc1.bias", group="diagnosis=HC", step=slice(1, 3))
        expected = [row.parameters["fc1.bias"].spectra["gradient"][1] for row in rows[1:4]]
        np.testing.assert_array_equal(found.values, expected)
        assert tree["probes/val"].sizes["step"] == 1
        assert tree["steps/w16/status"].attrs["flag_meanings"].split()[Status.NOT_FINITE] == "not_finite"


def test_each_array_of_a_closed_store_can_be_opened_by_itself(new_writer: Make) -> None:
    with new_writer() as writer:
        writer.append(step_row(4, NAMES))
    alone = xr.open_dataset(writer.path, engine="zarr", group="steps/w16", consolidated=False)
    assert alone["gradient"].shape == (1, 2, 3, 5)


def test_a_probe_has_its_own_steps_and_groups(new_writer: Make) -> None:
    with new_writer() as writer:
        for step in range(8):
            writer.append(step_row(step, NAMES))
        writer.append(step_row(3, NAMES, groups=("all", "site=ü 1")), stream="probe/val/2 .x")
        writer.append(step_row(6, NAMES, groups=("site=ü 1", "all")), stream="probe/val/2 .x")
    run = open_run(writer.path)
    assert run.probe_names == ("val/2 .x",)
    assert run.committed == {"steps": 8, "probe/val/2 .x": 2}
    tree = run.probes["val/2 .x"]
    assert tree["step"].values.tolist() == [3, 6]
    assert tree["group"].values.tolist() == ["all", "site=ü 1"]
    first = parameter_row(6000, groups=2).spectra["gradient"]
    np.testing.assert_array_equal(tree["fc1.weight"]["gradient"].sel(step=6, group="site=ü 1").values, first[0])


names = st.text(st.characters(exclude_categories=["Cs"]), min_size=0, max_size=12)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    parameters=st.lists(names, min_size=1, max_size=4, unique=True),
    groups=st.lists(names, min_size=1, max_size=4, unique=True),
    widths=st.lists(st.integers(1, 20), min_size=1, max_size=6),
    flush_every=st.integers(1, 4),
    keep=st.one_of(st.none(), st.integers(1, 20)),
)
def test_any_names_and_shapes_come_back(
    tmp_path_factory: pytest.TempPathFactory,
    parameters: list[str],
    groups: list[str],
    widths: list[int],
    flush_every: int,
    keep: int | None,
) -> None:
    path = tmp_path_factory.mktemp("any") / "run"
    rows = [step_row(step, parameters, groups=groups, width=width) for step, width in enumerate(widths)]
    with RunWriter(
        path, attrs={}, kinds=KINDS, keep=keep, parameters=infos(parameters), flush_every=flush_every
    ) as writer:
        for row in rows:
            writer.append(row)
    run = open_run(path)
    assert run.groups == tuple(groups)
    assert list(run.parameters) == parameters
    assert [node.attrs["parameter"] for node in run.tree.children.values()] == parameters
    for name in parameters:
        stored = run.stream().read(name, "adjoint")
        for row, values in zip(rows, stored, strict=True):
            given_values = row.parameters[name].spectra["adjoint"][:, :keep]
            np.testing.assert_array_equal(values[:, : given_values.shape[1]], given_values)
            assert np.isnan(values[:, given_values.shape[1] :]).all()


def test_parameters_named_like_variables_of_the_root_have_nodes(new_writer: Make) -> None:
    awkward = ("loss", "step", "group", "a/b", "50%", "..", "%6Coss")
    with new_writer(awkward) as writer:
        writer.append(step_row(0, awkward))
    run = open_run(writer.path)
    for name in awkward:
        assert run.parameter(name).attrs["parameter"] == name
        assert run.parameter(name)["gradient"].shape == (1, 3, 5)


def test_values_beyond_float32_become_infinity_and_recording_goes_on(new_writer: Make) -> None:
    row = parameter_row(0, groups=1, dtype="float64")
    row.metrics["gradient"]["condition"][:] = 1e60
    row.inner_product[:] = 1e80
    row.spectra["gradient"][:, 0] = 1e40
    with new_writer(["w"]) as writer:
        writer.append(StepRow(0, ("all",), np.array([2]), {"w": row}))
    stream = open_run(writer.path).stream()
    for variable in ("condition", "inner_product", "gradient"):
        assert np.isinf(stream.read("w", variable).ravel()[0])


def test_float64_and_unusual_attributes_are_stored_as_plain_json(new_writer: Make, tmp_path: Path) -> None:
    info = ParameterInfo("w", (3, 3), {"tolerance": np.float32(0.5), "shape": (1, 2), "worst": float("nan"), "n": None})
    with new_writer(parameters=[info], attrs={"numpy": np.int64(3)}) as writer:
        writer.append(StepRow(0, ("all",), np.array([2]), {"w": parameter_row(0, groups=1, dtype="float64")}))
    run = open_run(tmp_path / "run.zarr")
    assert run.parameters["w"].attrs == {"tolerance": 0.5, "shape": [1, 2], "worst": "nan", "n": None}
    assert run.attrs == {"numpy": 3}
