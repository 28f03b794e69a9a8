"""Merged runs: each as it was by itself, and all of them along one dimension."""

from __future__ import annotations

import json
import shutil
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xarray as xr
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gradtrace.errors import SelectionError, StoreError
from gradtrace.store.archives import shards
from gradtrace.store.archives.compact import compact
from gradtrace.store.archives.merge import merge
from gradtrace.store.names import parameter_name
from gradtrace.store.places.keys import Directory
from gradtrace.store.places.place import keys_at
from gradtrace.store.reading.merged import MergedRun, open_merged
from gradtrace.store.reading.opened import labels, open_run, opened
from gradtrace.store.rows import KINDS, ParameterInfo, StepRow
from gradtrace.store.writing.writer import RunWriter
from tests.store.alike import assert_alike
from tests.store.samples import infos, parameter_row, step_row


def record(path: Any, steps: Any, names: Any, groups: Any, *, width: int = 5, first: int = 0, **options: Any) -> None:
    """A run whose numbers are those of its steps and of `first`, and in whose last rows a group is missing."""
    kinds = options.setdefault("kinds", KINDS)
    defaults = {"attrs": {"seed": first, "torch": "2.13"}, "keep": 64, "parameters": infos(names), "flush_every": 3}
    with RunWriter(path, **{**defaults, **options}) as writer:
        for step in steps:
            there = groups if step < 12 else groups[:-1]
            rows = {
                name: parameter_row(100 * step + i + first, groups=len(there), width=width + i, kinds=kinds)
                for i, name in enumerate(names)
            }
            samples = np.arange(len(there)) + step
            writer.append(StepRow(step, tuple(there), samples, rows, loss=step / 3, scalars={f"lr{first}": 0.5}))


@pytest.fixture
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several shards an array, of several chunks each."""
    monkeypatch.setattr(shards, "CHUNK_BYTES", 2000)
    monkeypatch.setattr(shards, "SHARD_BYTES", 10000)
    monkeypatch.setattr(shards, "LEAST_STEPS", 4)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs that differ in steps, parameters and their order, widths, groups and theirs, kinds, keep and probes."""
    path = tmp_path_factory.mktemp("runs")
    record(path / "one.zarr", range(15), ("a", "b/c", "d"), ("all", "x=1", "x=2"))
    record(path / "two.zarr", range(0, 30, 3), ("d", "a", "e"), ("all", "x=2", "new", "x=1"), width=15, first=7)
    record(path / "few.zarr", [2, 40], ("e", "b/c"), ("y", "all"), kinds=("gradient",), keep=3, first=9)
    record(path / "none.zarr", [], ("a",), ("all",))
    for name, groups in {"one": ("all", "site=1"), "two": ("site=2", "all")}.items():
        with RunWriter(path / f"{name}.zarr", attrs={}, kinds=KINDS, keep=64, parameters=[], resume=True) as writer:
            for step in (5, 9):
                writer.append(step_row(step, ("a", "d"), groups=groups), stream="probe/val 1/x")
    return path


LABELS = ("one", "two", "few", "none")


def merged(folder: Path, target: Path, labels: Any = LABELS) -> MergedRun:
    merge({label: folder / f"{label}.zarr" for label in labels}, target)
    return open_merged(keys_at(target))


@pytest.mark.parametrize("order", [LABELS, LABELS[::-1]])
def test_each_run_is_as_it_was_by_itself(folder: Path, tmp_path: Path, order: Any, small_shards: None) -> None:
    together = merged(folder, tmp_path / "m.zarr", order)
    assert together.runs == order
    for label in order:
        alone, run = open_run(folder / f"{label}.zarr"), together.run(label)
        assert_alike(alone, run)
        assert list(run.parameters) == list(alone.parameters)
        if alone.committed["steps"]:
            xr.testing.assert_identical(alone.tree.load(), run.tree.load())
        for name in alone.probe_names:
            xr.testing.assert_identical(alone.probes[name].load(), run.probes[name].load())


def test_parts_of_a_run_are_read_as_from_the_run_itself(folder: Path, tmp_path: Path) -> None:
    alone, run = open_run(folder / "two.zarr"), merged(folder, tmp_path / "m.zarr").run("two")
    for rows in (slice(2, 5), slice(None, None, 2), slice(-3, None), slice(4, 4)):
        expected = alone.stream().read("e", "gradient", rows)
        np.testing.assert_array_equal(expected, run.stream().read("e", "gradient", rows))
    there, here = alone.tree["a"]["nuclear"], run.tree["a"]["nuclear"]
    for part in ({"step": 9, "group": "new"}, {"step": slice(3, 12)}, {"group": ["x=1", "all"], "step": [27, 0]}):
        xr.testing.assert_identical(there.sel(part), here.sel(part))


def test_the_tree_has_all_runs_and_nothing_where_a_run_has_nothing(
    folder: Path, tmp_path: Path, small_shards: None
) -> None:
    together = merged(folder, tmp_path / "m.zarr")
    tree = together.tree
    assert tree["run"].values.tolist() == list(LABELS)
    assert tree["step"].values.tolist() == sorted({*range(15), *range(0, 30, 3), 2, 40})
    assert together.groups == tuple(tree["group"].values) == ("all", "x=1", "x=2", "new", "y")
    assert list(tree.children) == ["a", "b%2Fc", "d", "e"]
    for name in ("a", "b/c", "d", "e"):
        node = together.parameter(name)
        assert node["gradient"].dims == ("run", "step", "group", "component")
        assert node["status"].dims == ("run", "step", "group")
        for label in LABELS:
            _check_part(together, name, label)
    assert tree["recorded"].sum("step").values.tolist() == [15, 10, 2, 0]
    assert float(tree["loss"].sel(run="few", step=40)) == 40 / 3
    assert np.isnan(tree["loss"].sel(run="one", step=40))
    assert int(tree["n_samples"].sel(run="two", step=3, group="y")) == 0


def _check_part(together: MergedRun, name: str, label: str) -> None:
    """A parameter of one run in the tree of all of them."""
    part = together.parameter(name).sel(run=label).to_dataset().drop_vars("run")
    run = together.run(label)
    steps = run.stream().steps
    alone = run.tree[name.replace("/", "%2F")].to_dataset() if name in run.stream().places else None
    for variable in ("gradient", "status", "nuclear", "inner_product", "adjoint", "adjoint_status", "residual"):
        values = part[variable].values
        there = np.zeros(values.shape, dtype=bool)
        if alone is not None and variable in alone:
            groups = [together.groups.index(group) for group in run.groups]
            axes = {"step": np.searchsorted(part["step"].values, steps), "group": groups, "group_other": groups}
            where = np.ix_(*(axes.get(str(dim), np.arange(alone[variable].sizes[dim])) for dim in part[variable].dims))
            np.testing.assert_array_equal(values[where], alone[variable].values)
            there[where] = True
        empty = values[~there]
        assert (empty == 0).all() if variable.endswith("status") else np.isnan(empty).all()


def test_plain_xarray_opens_merged_runs_with_labels(folder: Path, tmp_path: Path) -> None:
    merge({label: folder / f"{label}.zarr" for label in LABELS}, tmp_path / "m.zarr")
    for consolidated in (None, True, False):
        tree = xr.open_datatree(tmp_path / "m.zarr", engine="zarr", consolidated=consolidated)
        found = tree["steps/w16/gradient"].sel(run="one", parameter="d", group="x=2", step=slice(3, 5))
        expected = open_run(folder / "one.zarr").tree["d"]["gradient"].sel(group="x=2", step=slice(3, 5))
        np.testing.assert_array_equal(found[:, : expected.sizes["component"]], expected)
        assert tree["probes/val 1%2Fx"].sizes["run"] == len(LABELS)


def test_probes_are_those_of_any_run(folder: Path, tmp_path: Path) -> None:
    together = merged(folder, tmp_path / "m.zarr", ("few", "one", "two"))
    assert together.probe_names == ("val 1/x",)
    probe = together.probes["val 1/x"]
    assert probe["group"].values.tolist() == ["all", "site=1", "site=2"]
    assert np.isnan(probe["a"]["gradient"].sel(run="few")).all()
    expected = open_run(folder / "two.zarr").probes["val 1/x"]["d"]["gradient"].sel(step=9, group="site=2")
    np.testing.assert_array_equal(probe["d"]["gradient"].sel(run="two", step=9, group="site=2"), expected)
    assert together.run("few").probe_names == ()
    with pytest.raises(SelectionError, match="has no probe 'val 1/x'"):
        together.run("few").stream("val 1/x")


def test_what_each_run_says_of_itself_is_kept_and_what_all_say_stands_above(folder: Path, tmp_path: Path) -> None:
    together = merged(folder, tmp_path / "m.zarr")
    about = json.loads((tmp_path / "m.zarr" / "zarr.json").read_text())["attributes"]
    for label in LABELS:
        own = json.loads((folder / f"{label}.zarr" / "zarr.json").read_text())["attributes"]
        assert {key: value for key, value in about["runs"][label].items() if key != "axes"} == own
    assert about["archive"] == "merge"
    assert together.attrs == {"torch": "2.13"}
    assert together.keep == 64
    assert together.kinds == KINDS
    assert together.closed
    assert str(folder) not in json.dumps(about)


def test_how_runs_differ_is_told(tmp_path: Path, folder: Path) -> None:
    with RunWriter(
        tmp_path / "k.zarr", attrs={}, kinds=KINDS, keep=64, parameters=[ParameterInfo("a", (2, 9))]
    ) as writer:
        writer.append(StepRow(0, ("all",), np.array([3]), {"a": parameter_row(0, groups=1)}))
        writer.flush()
        shutil.copytree(writer.path, tmp_path / "killed.zarr", ignore=shutil.ignore_patterns("gradtrace.lock"))
    one, few = folder / "one.zarr", folder / "few.zarr"
    notes = merge({"one": one, "few": few, "killed": tmp_path / "killed.zarr"}, tmp_path / "m.zarr").notes
    for expected in (
        "one lacks parameters that others have: e.",
        "few lacks parameters that others have: a, d.",
        "The shape of 'a' differs: (11, 5) in one, (2, 9) in killed.",
        "`keep` differs: 64 in one, 3 in few, 64 in killed.",
        "What kinds were recorded differs: gradient, activation, adjoint in one, gradient in few, "
        "gradient, activation, adjoint in killed.",
        "one lacks groups that others have: y.",
        "few lacks probes that others have: val 1/x.",
        "Never closed, as after a kill: killed.",
    ):
        assert expected in notes
    assert not open_merged(keys_at(tmp_path / "m.zarr")).closed
    assert merge({"one": one, "again": one}, tmp_path / "same.zarr").notes == ()


def test_parameters_that_are_called_like_what_only_merged_runs_have_keep_their_nodes(tmp_path: Path) -> None:
    awkward = ("run", "recorded", "loss", "a/run", "%72un")
    record(tmp_path / "one.zarr", range(3), awkward, ("all",))
    together = merged(tmp_path, tmp_path / "m.zarr", ("one",))
    for name in awkward:
        assert together.parameter(name).attrs["parameter"] == name
        assert together.parameter(name)["gradient"].dims == ("run", "step", "group", "component")
    assert [parameter_name(node) for node in together.tree.children] == list(awkward)
    with pytest.raises(SelectionError, match="Nearest: 'run'"):
        together.parameter("runs")


def test_merged_runs_can_be_compacted(folder: Path, tmp_path: Path, small_shards: None) -> None:
    together = merged(folder, tmp_path / "m.zarr")
    compact(tmp_path / "m.zarr", tmp_path / "again.zarr")
    again = opened(keys_at(tmp_path / "again.zarr"))
    assert again.runs == together.runs
    for label in LABELS:
        assert_alike(together.run(label), again.run(label))


def test_choosing_among_runs(folder: Path, tmp_path: Path) -> None:
    together, keys = merged(folder, tmp_path / "m.zarr"), keys_at(tmp_path / "m.zarr")
    assert labels(keys) == list(LABELS)
    assert labels(keys, ["*o*e", "re:^f"]) == ["one", "few", "none"]
    assert opened(keys, "two").committed["steps"] == 10
    assert opened(keys).attrs == together.attrs
    with pytest.raises(SelectionError, match="Nearest: 'one'"):
        labels(keys, ["ones"])
    alone = keys_at(folder / "one.zarr")
    assert labels(alone) == [None]
    for ask in (lambda: labels(alone, ["one"]), lambda: opened(alone, "one")):
        with pytest.raises(SelectionError, match="is a single run"):
            ask()


def test_what_can_only_be_asked_of_one_run_says_so(folder: Path, tmp_path: Path) -> None:
    together = merged(folder, tmp_path / "m.zarr")
    with pytest.raises(SelectionError, match=r"holds several runs.*run\(label\).*Valid: 'one', 'two'"):
        together.stream()
    with pytest.raises(SelectionError, match=r"holds no run 'tow'\. Nearest: 'two'"):
        together.run("tow")
    assert "the runs one, two, few, none" in repr(together)


# ---------------------------------------------------------------------- what is refused


def test_runs_need_labels(folder: Path, tmp_path: Path) -> None:
    for sources in ({}, {"": folder / "one.zarr"}):
        with pytest.raises(StoreError, match="needs a label"):
            merge(sources, tmp_path / "m.zarr")
    with pytest.raises(StoreError, match="lone surrogate"):
        merge({"\ud800": folder / "one.zarr"}, tmp_path / "m.zarr")


def test_merged_runs_are_not_merged_again_nor_added_to(folder: Path, tmp_path: Path) -> None:
    merged(folder, tmp_path / "m.zarr")
    with pytest.raises(StoreError, match="holds merged runs already"):
        merge({"m": tmp_path / "m.zarr", "one": folder / "one.zarr"}, tmp_path / "n.zarr")
    with pytest.raises(StoreError, match="it is an archive"):
        RunWriter(tmp_path / "m.zarr", attrs={}, kinds=KINDS, keep=64, parameters=[], resume=True)
    with pytest.raises(StoreError, match="something is there already"):
        merge({"one": folder / "one.zarr"}, tmp_path / "m.zarr")


def test_runs_that_are_written_damaged_or_missing_are_refused(folder: Path, tmp_path: Path) -> None:
    one = folder / "one.zarr"
    with (
        RunWriter(tmp_path / "live.zarr", attrs={}, kinds=KINDS, keep=64, parameters=[]),
        pytest.raises(StoreError, match="is being written by this process"),
    ):
        merge({"one": one, "live": tmp_path / "live.zarr"}, tmp_path / "m.zarr")
    with pytest.raises(StoreError, match="There is no run at"):
        merge({"one": one, "gone": tmp_path / "gone.zarr"}, tmp_path / "m.zarr")
    shutil.copytree(one, tmp_path / "torn.zarr")
    chunk = next((tmp_path / "torn.zarr" / "steps" / "w16" / "status").glob("c.*"))
    chunk.write_bytes(chunk.read_bytes()[:-5])
    with pytest.raises(StoreError, match=r"torn\.zarr' is damaged: 'steps/w16/status'"):
        merge({"one": one, "torn": tmp_path / "torn.zarr"}, tmp_path / "m.zarr")
    with pytest.raises(StoreError, match="lies inside the run"):
        merge({"torn": tmp_path / "torn.zarr"}, tmp_path / "torn.zarr" / "m.zarr")
    assert not (tmp_path / "m.zarr").exists()


def test_a_value_in_the_wrong_place_is_found(
    monkeypatch: pytest.MonkeyPatch, folder: Path, tmp_path: Path, small_shards: None
) -> None:
    put = Directory.put

    def misplacing(self: Directory, key: str, data: bytes) -> None:
        put(self, key.replace("gradient/c.1.0.", "gradient/c.0.0."), data)

    monkeypatch.setattr(Directory, "put", misplacing)
    with pytest.raises(StoreError, match=r"'steps/w\d+/gradient' has other values"):
        merged(folder, tmp_path / "m.zarr")
    assert not (tmp_path / "m.zarr").exists()


@pytest.mark.parametrize(
    "change",
    [
        lambda runs, members: runs.pop("two"),
        lambda runs, members: runs.update(three=runs["two"]),
        lambda runs, members: runs.update(two=3),
        lambda runs, members: runs["two"].pop("axes"),
        lambda runs, members: runs["two"].pop("kinds"),
        lambda runs, members: runs["two"]["axes"]["steps"].update(group=[0, 1, 2, 99]),
        lambda runs, members: runs["two"]["axes"]["steps"].update(group=[0, 0, 1, 2]),
        lambda runs, members: runs["two"]["axes"]["steps"].update(group="all"),
        lambda runs, members: runs["two"]["axes"]["steps"].pop("kind"),
        lambda runs, members: runs["two"].update(committed={"steps": -1}),
        lambda runs, members: members["steps/w16"]["attributes"]["widths_of_runs"].update(two=[1]),
        lambda runs, members: members["steps/w16"]["attributes"]["widths_of_runs"].pop("two"),
        lambda runs, members: members["steps/w16"]["attributes"].pop("widths_of_runs"),
        lambda runs, members: members["steps/loss"].update(shape=[2, 99]),
        lambda runs, members: members["steps/loss"].update(dimension_names=["step", "run"]),
        lambda runs, members: members["steps/w16/gradient"].pop("codecs"),
    ],
)
def test_a_root_whose_parts_do_not_fit_together_is_damaged(
    folder: Path, tmp_path: Path, change: Callable[..., object]
) -> None:
    merged(folder, tmp_path / "m.zarr")
    document = json.loads((tmp_path / "m.zarr" / "zarr.json").read_text())
    change(document["attributes"]["runs"], document["consolidated_metadata"]["metadata"])
    (tmp_path / "m.zarr" / "zarr.json").write_text(json.dumps(document))
    with pytest.raises(StoreError, match="is damaged"):
        open_merged(keys_at(tmp_path / "m.zarr"))


def test_rows_that_are_not_those_that_were_committed_are_damage(folder: Path, tmp_path: Path) -> None:
    together = merged(folder, tmp_path / "m.zarr")
    (tmp_path / "m.zarr" / "steps" / "recorded" / "c.0.0").unlink()
    with pytest.raises(StoreError, match="is damaged"):
        _ = together.run("one").stream().steps


# ---------------------------------------------------------------------- any runs at all

names = st.lists(st.sampled_from(["a", "b", "c/d", "run", "é"]), min_size=1, max_size=4, unique=True)
groups = st.lists(st.sampled_from(["all", "x", "y", "z"]), min_size=1, max_size=4, unique=True)
any_run = st.tuples(st.sets(st.integers(0, 9), max_size=6), names, groups, st.integers(1, 20))


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(runs=st.lists(any_run, min_size=1, max_size=3))
def test_any_runs_come_back(small_shards: None, runs: list[Any]) -> None:
    sources = {f"r{place}": f"memory://{uuid.uuid4().hex}" for place in range(len(runs))}
    for place, (steps, parameters, names, width) in enumerate(runs):
        record(sources[f"r{place}"], sorted(steps), parameters, tuple(names), width=width, first=place)
    target = f"memory://{uuid.uuid4().hex}"
    merge(sources, target)
    together = open_merged(keys_at(target))
    for label, source in sources.items():
        assert_alike(open_run(source), together.run(label))
