"""Everything that can be wrong with a store is found, and nothing where all is right."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result

import gradtrace as gt
from gradtrace.cli import main
from gradtrace.errors import StoreError
from gradtrace.metrics import WHOLE
from gradtrace.store.checking.finding import LEFTOVER, NOTE
from gradtrace.store.checking.repair import repair
from gradtrace.store.checking.verify import verify
from gradtrace.store.places.keys import Directory
from gradtrace.store.places.lock import LOCK_KEY
from gradtrace.store.reading.opened import open_run
from gradtrace.store.rows import KINDS
from tests.store.sound import (
    ROWS,
    assert_repaired,
    assert_same,
    change,
    change_member,
    change_values,
    chunk_of,
    contents,
    damage_in,
    edit,
    lay_out,
    leaves,
    make,
    members_of,
    write,
)
from tests.store.test_resume import kill


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A run that is whole, to be damaged."""
    return lay_out(tmp_path / "run.zarr")


# ---------------------------------------------------------------------- intact stores


def test_a_closed_run_is_found_whole(path: Path) -> None:
    assert verify(Directory(path)) == []


def test_an_empty_run_is_found_whole(tmp_path: Path) -> None:
    make(tmp_path / "run", 0).close()
    assert verify(Directory(tmp_path / "run")) == []


def test_a_run_that_is_being_written_is_looked_at_as_of_its_last_commit(tmp_path: Path) -> None:
    writer = make(tmp_path / "run", 0)
    for step in range(ROWS):
        write(writer, [step])
        writer.flush()
        (tmp_path / "run" / "steps" / "step" / "c.7").write_bytes(b"not yet committed")
        found = verify(Directory(tmp_path / "run"))
        assert [(one.severity, one.what[:34]) for one in found] == [(NOTE, "it is being written by this proces")]
    writer.close()


def test_a_killed_run_leaves_only_its_lock_and_what_it_did_not_commit(tmp_path: Path) -> None:
    writer = make(tmp_path / "run", 6)
    writer.flush()
    root = (tmp_path / "run" / "zarr.json").read_bytes()
    write(writer, range(6, 14))
    writer.flush()
    kill(writer)
    (tmp_path / "run" / "zarr.json").write_bytes(root)
    found = verify(Directory(tmp_path / "run"))
    assert {one.severity for one in found} == {LEFTOVER}
    assert LOCK_KEY in {one.array for one in found}
    assert "steps/w1/gradient" in {one.array for one in found}


def test_a_run_that_was_gone_on_with_or_rewound_is_found_whole(tmp_path: Path) -> None:
    writer = make(tmp_path / "run", 6)
    writer.flush()
    kill(writer)
    make(tmp_path / "run", 0, resume=True).close()
    assert verify(Directory(tmp_path / "run")) == []
    writer = make(tmp_path / "run", 0, resume=3)
    write(writer, range(3, 9))
    writer.close()
    assert verify(Directory(tmp_path / "run")) == []


def test_archives_and_merged_runs_are_found_whole_and_their_checksums_are_looked_at(path: Path, tmp_path: Path) -> None:
    from gradtrace.store.archives.compact import compact
    from gradtrace.store.archives.merge import merge

    compact(path, tmp_path / "archive")
    merge({"a": path, "b": path}, tmp_path / "merged")
    for name in ("archive", "merged"):
        assert verify(Directory(tmp_path / name)) == []
        chunk = chunk_of(tmp_path / name, "steps/loss")
        data = bytearray(chunk.read_bytes())
        data[20] ^= 1
        chunk.write_bytes(data)
        assert [one.what for one in damage_in(tmp_path / name) if "checksum is wrong" in one.what]


def test_what_a_recorder_writes_is_found_whole(tmp_path: Path) -> None:
    """Several dtypes, groups that come and go and are too small to be shown, gradients that are zero, tiny and NaN."""
    for dtype, keep in ((torch.float32, 2), (torch.float64, None)):
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(4, 9), torch.nn.ReLU(), torch.nn.Linear(9, 3)).to(dtype)
        with gt.record(model, tmp_path / str(dtype), keep=keep, min_samples=2) as recorder:
            for step in range(8):
                labels = [f"s{n % (1 + step // 2)}" for n in range(7)]
                scale = (1.0, 0.0, 1e-30, 1e12, float("nan"), 1e-12, 1.0, float("inf"))[step]
                with recorder.step(groups={"site": labels, "odd": [n % 2 for n in range(7)]}):
                    (model(torch.randn(7, 4, dtype=dtype)).square().mean() * scale).backward()
                model.zero_grad()
        assert verify(Directory(tmp_path / str(dtype))) == []


# ---------------------------------------------------------------------- damage


ROOT: dict[str, tuple[Callable[[Any], object], str]] = {
    "committed": (change("attributes", "committed", to="10"), "attribute 'committed' is '10'"),
    "closed": (change("attributes", "closed", to=1), "attribute 'closed' is 1, not true or false"),
    "kinds": (change("attributes", "kinds", to=["gradient", "gradient"]), "attribute 'kinds'"),
    "keep": (change("attributes", "keep", to=0), "attribute 'keep' is 0, not a positive number or null"),
    "parameters": (change("attributes", "parameters", 0, "shape", to=[-1]), "attribute 'parameters'"),
    "run": (change("attributes", "run", to=[]), "attribute 'run' is"),
    "format": (change("zarr_format", to=2), "it is no group of zarr's format 3"),
    "lacking": (lambda document: document["attributes"].pop("keep"), "its attributes lack keep"),
    "no members": (lambda document: document.pop("consolidated_metadata"), "does not say what is below it"),
    "a path": (change("consolidated_metadata", "metadata", "../x", to={}), "which is no path of a run"),
    "no node": (change("consolidated_metadata", "metadata", "steps/x", to={}), "neither an array nor a group"),
    "a probe": (
        lambda document: document["attributes"]["committed"].pop("probes/val"),
        "nothing is said about how many",
    ),
    "no group": (lambda d: d["consolidated_metadata"]["metadata"].pop("steps/w1"), "it lies in no group"),
    "no array": (lambda d: d["consolidated_metadata"]["metadata"].pop("steps/loss"), "the array is missing"),
    "dims": (change_member("steps/loss", "dimension_names", to=["epoch"]), "its dimensions are"),
    "dtype": (change_member("steps/loss", "data_type", to="float32"), "its type is 'float32', not float64"),
    "rows": (change_member("steps/loss", "shape", to=[9]), "it has 9 along 'step', and 10 rows are committed"),
    "groups": (change_member("steps/w4/gradient", "shape", 2, to=3), "it has 3 along 'group', and there are 4"),
    "metrics": (change_member("steps/w4/metrics", "shape", 4, to=9), "it has 9 along 'metric'"),
    "group_other": (change_member("steps/group_other", "shape", to=[2]), "it has 2 names, and 'group' has 4"),
    "widths": (change_member("steps/w4", "attributes", to={"widths": [2, 2]}), "not the widths of its 1 parameters"),
    "too wide": (change_member("steps/w4", "attributes", to={"widths": [9]}), "not the widths of its 1 parameters"),
    "chunks": (change_member("steps/loss", "chunk_grid", "configuration", "chunk_shape", to=[0]), "its chunk shape is"),
    "codecs": (change_member("steps/loss", "codecs", 1, "name", to="gzip"), "its codecs are bytes, gzip"),
    "fill": (change_member("steps/loss", "fill_value", to=0), "its fill_value is 0, not 'NaN'"),
    "keys": (change_member("steps/loss", "chunk_key_encoding", "name", to="v2"), "its chunk_key_encoding is"),
}


@pytest.mark.parametrize("case", ROOT)
def test_a_root_that_is_not_as_the_schema_says_is_found_and_not_opened(path: Path, case: str) -> None:
    edit(path, ROOT[case][0])
    words = ROOT[case][1]
    assert [one for one in damage_in(path) if words in one.what], damage_in(path)
    with pytest.raises(StoreError, match=re.escape(words)):
        open_run(path)
    before = leaves(path)
    with pytest.raises(StoreError, match="cannot be repaired"):
        repair(Directory(path))
    assert leaves(path) == before


@pytest.mark.parametrize("part", [b"", b"{", b"[]"])
def test_a_root_that_cannot_be_read_is_an_error(path: Path, part: bytes) -> None:
    (path / "zarr.json").write_bytes(part)
    for look in (verify, repair):
        with pytest.raises(StoreError):
            look(Directory(path))


OWN: dict[str, tuple[Callable[[Any], object], str]] = {
    "shape": (change("shape", to=[11]), "says otherwise than the root what its shape is"),
    "dtype": (change("data_type", to="float32"), "says otherwise than the root what its data_type is"),
    "mapping": (change("codecs", to=None), "says otherwise than the root what its codecs is"),
}


@pytest.mark.parametrize("case", OWN)
def test_an_arrays_own_metadata_is_compared_with_the_root(path: Path, case: str) -> None:
    words = OWN[case][1]
    edit(path, OWN[case][0], "steps/loss")
    assert [(one.array, one.what) for one in damage_in(path)] == [("steps/loss", f"its own zarr.json {words}")]
    assert_repaired(path, ROWS)


def test_own_metadata_that_is_missing_or_no_json_is_found_and_written_anew(path: Path) -> None:
    (path / "steps" / "w1" / "zarr.json").unlink()
    (path / "steps" / "kind" / "zarr.json").write_text("{")
    assert [one.array for one in damage_in(path)] == ["steps/kind", "steps/w1"]
    assert_repaired(path, ROWS)


def test_own_metadata_of_an_unfinished_run_may_have_room_but_not_less(tmp_path: Path) -> None:
    writer = make(tmp_path / "run", ROWS)
    writer.flush()
    kill(writer)
    assert damage_in(tmp_path / "run") == []
    edit(tmp_path / "run", change("shape", to=[9]), "steps/loss")
    assert [one.what for one in damage_in(tmp_path / "run")] == [
        "its own zarr.json has the shape [9], which is less than [10]"
    ]


def _names(alter: Callable[[list[str]], object]) -> Callable[[np.ndarray], object]:
    """A change of the names in a chunk."""

    def inside(values: np.ndarray) -> None:
        names = list(values)
        change(names)
        values[:] = names

    return inside


def _swap(values: np.ndarray) -> None:
    values[0], values[1] = values[1], values[0]


LABELS: dict[str, tuple[str, Callable[[np.ndarray], object], str, str]] = {
    "twice": ("steps/group", lambda v: v.__setitem__(1, "all"), "group", "the name 'all' is there twice"),
    "empty": ("steps/group", lambda v: v.__setitem__(1, ""), "group", "a name is empty"),
    "others": ("steps/group_other", _swap, "group_other", "its names are not those of 'group'"),
    "kinds": ("steps/kind", _swap, "kind", "its names are activation, gradient, adjoint, and the run has gradi"),
    "metric": ("steps/metric", lambda v: v.__setitem__(0, "frobenios"), "metric", "there is no metric 'frobenios'"),
    "parameter": (
        "steps/w4/parameter",
        lambda v: v.__setitem__(0, "no"),
        "w4/parameter",
        "it names 'no', which is not",
    ),
}


@pytest.mark.parametrize("case", LABELS)
def test_names_that_contradict_others_are_found(path: Path, case: str) -> None:
    array, alter, where, words = LABELS[case]
    change_values(path, array, alter)
    assert [one for one in damage_in(path) if one.array == where and words in one.what and one.row is None]


def _one(index: tuple[int, ...], to: float) -> Callable[[np.ndarray], object]:
    return lambda values: values.__setitem__(index, to)


def _times(index: Any, factor: float) -> Callable[[np.ndarray], object]:
    return lambda values: values.__setitem__(index, values[index] * factor)


def _sum_of_two(values: np.ndarray) -> None:
    """Two singular values of the same squares as before, and another sum."""
    row = values[0, 0, 0]
    change = 0.1 * row[1]
    row[0], row[1] = np.sqrt(row[0] ** 2 + row[1] ** 2 - (row[1] - change) ** 2), row[1] - change


KIND_METRIC = {name: place for place, name in enumerate(WHOLE)}


def _metric(name: str, factor: float, kind: int = 0) -> Callable[[np.ndarray], object]:
    return _times((0, 0, 0, kind, KIND_METRIC[name]), factor)


# the last block but one: rows 4 to 7. Of `fc.weight` (w4) all three singular values are stored, of `conv` (w16) five.
VALUES: dict[str, tuple[str, Callable[[np.ndarray], object], str]] = {
    "no such status": ("w4/status", _one((0, 0, 0, 0), 9), "status: it holds a code that there is not"),
    "absent": ("w4/status", _one((0, 0, 0, 0), 0), "status: a group with samples is said to be absent"),
    "not finite": ("w4/status", _one((0, 0, 0, 0), 3), "gradient: there are values where it is not said"),
    "without samples": ("w4/status", _one((1, 0, 3, 0), 1), "status: a group without samples is said to be measured"),
    "value lost": (
        "w4/gradient",
        _one((0, 0, 0), np.nan),
        "gradient: it is said to be measured, and there is no value",
    ),
    "rank lost": ("w4/adjoint", _one((0, 0, 0), np.nan), "adjoint: it is said to be measured, and there is no value"),
    "gap": ("w4/gradient", _one((0, 0, 0, 1), np.nan), "gradient: values are missing in between"),
    "negative": ("w4/gradient", _times((0, 0, 0, 2), -1), "gradient: singular values are negative"),
    "order": ("w4/gradient", _one((0, 0, 0, 1), 9), "gradient: singular values do not descend"),
    "first": ("w4/gradient", _times((0, 0, 0, 0), 1.001), "metrics: the stable_rank of the gradient"),
    "sum": ("w4/gradient", _sum_of_two, "metrics: the nuclear of the gradient contradicts"),
    "last": ("w16/gradient", _times((0, 0, 0, 4), 0.01), "metrics: the frobenius of the gradient contradicts"),
    "cut": ("w16/gradient", _times((0, 0, 0), 2), "metrics: the frobenius of the gradient contradicts"),
    "metric lost": (
        "w4/metrics",
        _one((0, 0, 0, 0, 3), np.nan),
        "metrics: the effective_rank of the measured",
    ),
    "metric of nothing": (
        "w4/metrics",
        _one((1, 0, 3, 1, 2), 1),
        "metrics: there is a stable_rank of the activation, which",
    ),
    "metric negative": ("w4/metrics", _metric("condition", -1), "metrics: the condition of the gradient is negative"),
    **{name: ("w4/metrics", _metric(name, 1.01), f"metrics: the {name} of the gradient contradicts") for name in WHOLE},
    "adjoint's": ("w4/metrics", _metric("nuclear", 0.99, kind=2), "metrics: the nuclear of the adjoint contradicts"),
    "cut frobenius": ("w16/metrics", _metric("frobenius", 0.9), "metrics: the frobenius of the gradient contradicts"),
    "cut nuclear": ("w16/metrics", _metric("nuclear", 0.5), "metrics: the nuclear of the gradient contradicts"),
    "cut stable": ("w16/metrics", _metric("stable_rank", 1.01), "metrics: the stable_rank of the gradient"),
    "cut effective": (
        "w16/metrics",
        _metric("effective_rank", 0.5),
        "metrics: the effective_rank of the gradient contra",
    ),
    "cut ratio": (
        "w16/metrics",
        _metric("participation_ratio", 0.5),
        "metrics: the participation_ratio of the",
    ),
    "cut rank": (
        "w16/metrics",
        _metric("numerical_rank", 1.1),
        "metrics: the numerical_rank of the gradient contradicts",
    ),
    "cut condition": ("w16/metrics", _metric("condition", 0.1), "metrics: the condition of the gradient contradicts"),
    "lopsided": ("w4/inner_product", _one((0, 0, 0, 1), 3), "inner_product: it is not symmetric"),
    "own": ("w4/inner_product", _times((0, 0, 0, 0), 1.001), "inner_product: a group's own is not its frobenius"),
    "none": (
        "w4/inner_product",
        _one((0, 0), np.nan),
        "inner_product: it is missing between groups that were measured",
    ),
    "of none": (
        "w4/inner_product",
        _one((1, 0, 3, 3), 1),
        "inner_product: there is one of a group that was not measured",
    ),
    "residual": ("w4/residual", _one((0, 0), -1), "residual: it is negative"),
    "owner": ("w1/owner_residual", _one((0, 0), -1), "owner_residual: it is negative"),
}


@pytest.mark.parametrize("case", VALUES)
def test_numbers_that_contradict_each_other_are_found_and_given_up(path: Path, case: str) -> None:
    array, alter, words = VALUES[case]
    change_values(path, f"steps/{array}", alter, number=1)
    name, what = words.split(": ")
    member = array.split("/")[0]
    found = [one for one in damage_in(path) if one.array == f"{member}/{name}" and one.what.startswith(what)]
    assert len(found) == 1, damage_in(path)
    assert found[0].stream == "steps"
    assert found[0].row in (4, 5)
    assert found[0].steps.startswith(str(found[0].row)), "steps are counted from 0 here"
    assert_repaired(path, min(one.row for one in damage_in(path) if one.row is not None))


def test_values_beyond_a_parameters_width_are_found(path: Path) -> None:
    edit(path, change_member("steps/w16", "attributes", to={"widths": [4]}))
    edit(path, change("attributes", to={"widths": [4]}), "steps/w16")
    assert sorted({one.what.split(" (")[0] for one in damage_in(path)}) == [
        "there are values beyond the parameter's width"
    ]


def test_rows_of_the_wrong_number_or_order_are_found(path: Path) -> None:
    change_values(path, "steps/step", lambda steps: steps.__setitem__(6, 3))
    assert [(one.array, one.what, one.row) for one in damage_in(path)] == [
        ("step", "steps do not increase: 5 is followed by 3", 6)
    ]
    assert_repaired(path, 6)


def test_numbers_of_samples_that_do_not_add_up_are_found(path: Path) -> None:
    change_values(path, "steps/n_samples", lambda counts: counts.__setitem__((7, 1), 9))
    found = damage_in(path)
    assert [(one.array, one.row) for one in found] == [("n_samples", 7)]
    assert found[0].what.startswith("the groups of a grouping do not add up to all (1 times, first at step 7)")
    assert_repaired(path, 7)


def test_negative_numbers_of_samples_are_found(path: Path) -> None:
    change_values(path, "steps/n_samples", lambda counts: counts.__setitem__((7, 1), -1))
    assert [one for one in damage_in(path) if one.array == "n_samples" and "it is negative" in one.what]


def test_epochs_that_go_back_are_noted(path: Path) -> None:
    change_values(path, "steps/epoch", lambda epochs: epochs.__setitem__(8, 0))
    assert [(one.severity, one.what) for one in verify(Directory(path))] == [(NOTE, "epochs go back, from 1 to 0")]


def test_a_probe_is_looked_at_too(path: Path) -> None:
    change_values(path, "probes/val/w1/gradient", lambda values: values.__setitem__((1, 0, 0), -1))
    found = damage_in(path)
    assert {one.stream for one in found} == {"probes/val"}
    before = contents(open_run(path))
    repair(Directory(path))
    after = contents(open_run(path))
    assert after["committed"] == {"steps": ROWS, "probe/val": 1}
    assert_same(before, after, {"steps": ROWS, "probe/val": 1})


# ---------------------------------------------------------------------- chunks

UNSEEN = ("loss", "epoch", "scalars", "cost", "residual", "owner_residual")
"""Arrays of which a chunk may be missing without anything contradicting that: all NaN is what they may hold."""


def chunks(path: Path) -> list[str]:
    return sorted(key for key in leaves(path) if not key.endswith("zarr.json"))


def test_a_missing_chunk_is_found_wherever_there_is_something_to_contradict_it(path: Path) -> None:
    for key in chunks(path):
        kept = (path / key).read_bytes()
        (path / key).unlink()
        found, array = damage_in(path), key.rpartition("/")[0]
        if array.rpartition("/")[2] in UNSEEN:
            assert found == [], key
        else:
            assert found, key
            explained = any(key.rpartition("/")[2] in one.what for one in found)
            assert explained or array.endswith("n_samples"), (key, found)
        (path / key).write_bytes(kept)


def broken(chunk: bytes) -> list[bytes]:
    return [chunk[: len(chunk) // 2], chunk[:-1], b"", b"x" * 40, chunk + b"x"]


def test_chunks_that_are_cut_off_or_no_chunks_are_found_everywhere(path: Path) -> None:
    kept = {key: (path / key).read_bytes() for key in chunks(path)}
    several = (*UNSEEN, "step", "status", "metrics", "inner_product", *KINDS)
    numbers = [key for key in kept if key.split("/")[-2] in several]
    names = [key for key in kept if key not in numbers and "n_samples" not in key]
    assert len(numbers) > 50
    assert len(names) > 10
    for number in range(5):
        for together in (numbers, *([key] for key in names[number::3])):  # without names, values are not looked at
            for key in together:
                (path / key).write_bytes(broken(kept[key])[number])
            assert sorted(one.key for one in damage_in(path) if "cannot be read" in one.what) == together
            for key in together:
                (path / key).write_bytes(kept[key])
    assert damage_in(path) == []


# ---------------------------------------------------------------------- the command


@pytest.fixture
def cli() -> Callable[..., Result]:
    return lambda *arguments: CliRunner().invoke(main, [str(a) for a in arguments], catch_exceptions=False)


def test_the_command_says_that_all_is_well(path: Path, cli: Callable[..., Result]) -> None:
    done = cli("verify", path)
    assert (done.exit_code, done.stdout) == (0, "")
    assert done.stderr == f"{path}: all is well.\n"
    assert json.loads(cli("verify", path, "--json").stdout) == []


def test_the_command_shows_damage_and_repairs_it(path: Path, cli: Callable[..., Result]) -> None:
    chunk_of(path, "steps/w4/gradient", 2).unlink()
    done = cli("verify", path, "--json")
    assert done.exit_code == 1
    (row,) = json.loads(done.stdout)
    assert {key: row[key] for key in ("severity", "stream", "array", "steps")} == {
        "severity": "damage", "stream": "steps", "array": "w4/gradient", "steps": "8:9"
    }  # fmt: skip
    assert row["what"].endswith("the chunk steps/w4/gradient/c.2.0.0.0 is missing")
    assert "do not fit" not in cli("verify", path).stdout
    mended = cli("verify", path, "--repair")
    assert (mended.exit_code, mended.stdout) == (0, "")
    assert mended.stderr.startswith("Gave up 2 of the 10 rows of 'steps': 8 are kept.\n")
    assert cli("verify", path, "--repair").stderr == f"Nothing was to be repaired.\n{path}: all is well.\n"


def test_the_command_leaves_torch_and_xarray_alone(path: Path) -> None:
    code = (
        "import sys; from gradtrace.cli import main; main(standalone_mode=False); print(*sys.modules, file=sys.stderr)"
    )
    command = [sys.executable, "-W", "error", "-c", code, "verify", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert not {"torch", "xarray", "pandas"} & set(done.stderr.split())


def test_members_of_the_intact_run_are_of_several_width_classes(path: Path) -> None:
    assert {"steps/w1", "steps/w4", "steps/w16", "probes/val"} <= members_of(path).keys()
