"""Axes grow while a run goes on, and earlier rows read as absent."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import xarray as xr

from gradtrace.store.reading.opened import open_run
from gradtrace.store.reading.reader import Run
from gradtrace.store.rows import ParameterInfo, Status, StepRow
from gradtrace.store.writing.writer import RunWriter
from tests.store.samples import infos, parameter_row, step_row

Make = Callable[..., RunWriter]


def record(writer: RunWriter, rows: list[StepRow]) -> Run:
    with writer:
        for row in rows:
            writer.append(row)
    return open_run(writer.path)


@pytest.mark.parametrize("flush_every", [1, 3, 64])
def test_a_group_that_appears_later_is_absent_before(new_writer: Make, flush_every: int) -> None:
    labels = ["all", *(f"site={i}" for i in range(11))]
    rows = [step_row(step, ["w"], groups=labels[: 1 + step]) for step in range(12)]
    run = record(new_writer(["w"], flush_every=flush_every), rows)
    assert run.groups == tuple(labels)
    status, spectra = run.stream().read("w", "status"), run.stream().read("w", "gradient")
    for step in range(12):
        assert (status[step, : step + 1] == Status.MEASURED).all()
        assert (status[step, step + 1 :] == Status.GROUP_ABSENT).all()
        np.testing.assert_array_equal(spectra[step, : step + 1], rows[step].parameters["w"].spectra["gradient"])
        assert np.isnan(spectra[step, step + 1 :]).all()
    assert np.isnan(run.stream().read("w", "inner_product")[4, 4, 5])
    assert run.tree["n_samples"].sel(step=3, group="site=9") == 0


def test_groups_in_another_order_land_where_they_belong(new_writer: Make) -> None:
    rows = [step_row(0, ["w"], groups=("all", "a", "b")), step_row(1, ["w"], groups=("b", "all"))]
    node = record(new_writer(["w"]), rows).tree["w"]
    given = rows[1].parameters["w"]
    np.testing.assert_array_equal(node["gradient"].sel(step=1, group="b").values, given.spectra["gradient"][0])
    found = node["inner_product"].sel(step=1, group="all", group_other="b")
    assert float(found) == np.float32(given.inner_product[1, 0])
    assert np.isnan(node["inner_product"].sel(step=1, group="a")).all()
    assert float(node["frobenius"].sel(step=1, group="b")) == np.float32(given.metrics["gradient"]["frobenius"][0])
    assert int(node["n_samples"].sel(step=1, group="a")) == 0


def test_a_parameter_that_gets_its_first_gradient_later_joins(new_writer: Make) -> None:
    writer = new_writer(["w0"], flush_every=2)
    names = ["w0"]
    with writer:
        for step in range(40):
            if step:
                names.append(f"w{step}")
                writer.add_parameter(ParameterInfo(names[-1], (3, 4)))
            writer.append(step_row(step, names))
    run = open_run(writer.path)
    assert list(run.parameters) == names
    late = run.tree["w39"]["gradient"]
    assert np.isnan(late.isel(step=slice(0, 39))).all()
    np.testing.assert_array_equal(late.sel(step=39).values, parameter_row(39039).spectra["gradient"])
    assert (run.tree["w39"]["status"].isel(step=slice(0, 39)) == Status.GROUP_ABSENT).all()


def test_a_parameter_never_measured_has_a_node_that_says_so(new_writer: Make) -> None:
    extra = ParameterInfo("frozen.weight", (2, 2), {"reason": "does not require grad"})
    run = record(new_writer(parameters=[*infos(["w"]), extra]), [step_row(0, ["w"])])
    node = run.tree["frozen.weight"]
    assert node.attrs["reason"] == "does not require grad"
    assert set(node.data_vars) == {"n_samples"}


def test_a_parameter_may_skip_steps(new_writer: Make) -> None:
    rows = [step_row(0, ["a", "b"]), step_row(1, ["b"]), step_row(2, ["a"])]
    run = record(new_writer(["a", "b"]), rows)
    assert run.stream().read("a", "status")[:, 0].tolist() == [1, 0, 1]
    assert run.stream().read("b", "status")[:, 0].tolist() == [1, 1, 0]
    assert np.isnan(run.stream().read("a", "residual")[1])


def test_spectra_may_get_wider_and_are_cut_at_keep(new_writer: Make) -> None:
    rows = [step_row(step, ["w"], width=width) for step, width in enumerate([3, 9, 40, 2])]
    run = record(new_writer(["w"], keep=30), rows)
    spectra = run.stream().read("w", "gradient")
    assert spectra.shape == (4, 3, 30)
    for row, values in zip(rows, spectra, strict=True):
        kept = row.parameters["w"].spectra["gradient"][:, :30]
        np.testing.assert_array_equal(values[:, : kept.shape[1]], kept)
        assert np.isnan(values[:, kept.shape[1] :]).all()


def test_scalars_and_costs_may_come_and_go(new_writer: Make) -> None:
    rows = [
        step_row(0, ["w"], scalars={"lr": 0.1}),
        step_row(1, ["w"], scalars={"acc/ü": 0.5}, cost={"survey": 2.0}),
        step_row(2, ["w"], scalars={}),
    ]
    tree = record(new_writer(["w"]), rows).tree
    np.testing.assert_array_equal(tree["scalars"].sel(scalar="lr"), [0.1, np.nan, np.nan])
    np.testing.assert_array_equal(tree["scalars"].sel(scalar="acc/ü"), [np.nan, 0.5, np.nan])
    np.testing.assert_array_equal(tree["cost"].sel(part="survey"), [np.nan, 2.0, np.nan])


def test_more_than_a_thousand_labels_come_back(new_writer: Make) -> None:
    labels = [f"participant={i}" for i in range(1500)]
    rows = [
        StepRow(step, tuple(labels[:count]), np.ones(count, int), {}) for step, count in enumerate([1000, 1024, 1500])
    ]
    run = record(new_writer(["w"], flush_every=1), rows)
    assert run.groups == tuple(labels)
    assert run.stream().per_step("n_samples").sum(axis=1).tolist() == [1000, 1024, 1500]


def test_a_kind_that_a_parameter_lacks_is_marked(new_writer: Make) -> None:
    row = StepRow(0, ("all",), np.array([4]), {"w": parameter_row(0, groups=1, kinds=("gradient",))})
    run = record(new_writer(["w"]), [row])
    assert run.stream().read("w", "adjoint_status").tolist() == [[Status.KIND_ABSENT]]
    assert run.stream().read("w", "status").tolist() == [[Status.MEASURED]]
    assert "adjoint" not in run.tree["w"].data_vars


def test_widths_keep_parameters_in_classes_without_padding_in_the_view(new_writer: Make) -> None:
    rows = {f"w{width}": parameter_row(width, width=width) for width in (1, 3, 10, 50)}
    row = StepRow(0, ("all", "a", "b"), np.ones(3, int), rows)
    writer = new_writer(list(rows))
    run = record(writer, [row])
    for name, given in rows.items():
        np.testing.assert_array_equal(run.tree[name]["gradient"].values[0], given.spectra["gradient"])
    plain = xr.open_datatree(writer.path, engine="zarr")
    assert sorted(plain["steps"].children) == ["w1", "w16", "w4", "w64"]


def test_attributes_may_change_while_the_run_goes_on(new_writer: Make) -> None:
    writer = new_writer(["w"])
    with writer:
        writer.append(step_row(0, ["w"]))
        writer.flush()
        assert open_run(writer.path).parameters["w"].attrs["rung"] == "factored"
        writer.update_parameter(ParameterInfo("w", (11, 5), {"rung": "global"}))
        writer.update_attrs({"ended_because": "patience"})
        writer.flush()
        seen = open_run(writer.path)
        assert seen.parameters["w"].attrs == {"rung": "global"}
        assert seen.attrs == {"seed": 7, "ended_because": "patience"}
        assert not seen.closed
