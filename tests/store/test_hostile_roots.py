"""Roots that are malformed, foreign or hostile give a clear error: no hang, no huge allocation, no code run."""

from __future__ import annotations

import copy
import functools
import json
import os
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gradtrace.errors import StoreError
from gradtrace.store.checking.repair import repair
from gradtrace.store.places.keys import Directory
from gradtrace.store.reading.opened import open_run
from gradtrace.store.schema import STEP
from tests.store.hostile import bounded, explore, put_in_memory, small
from tests.store.sound import change, change_member, edit, members_of

HUGE = 10**12


@pytest.fixture
def path(tmp_path: Path) -> Path:
    for key, data in small().items():
        (tmp_path / "run" / key).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "run" / key).write_bytes(data)
    return tmp_path / "run"


def test_the_run_is_fine_as_it_is(path: Path) -> None:
    assert explore(path) == {"works"}
    assert explore(put_in_memory({})) == {"works"}


# ---------------------------------------------------------------------- roots


def nested(depth: int) -> Any:
    value: Any = 0
    for _ in range(depth):
        value = [value]
    return value


VALUES: list[Any] = [
    *(None, True, False, -1, 0, 1, 3, 2**31, HUGE, 10**30, 1e308, float("nan"), float("inf")),
    *("", "x", "steps", "gradient", "../../../etc/passwd", "/etc/passwd", "a\0b", "\ud800", "object", "|O", "float16"),
    *([], {}, [[]], [-1], [0], [1], [HUGE], [HUGE] * 4, [1] * 1000, [2**40] * 3, {"name": "numcodecs.pickle"}),
    *(nested(70), nested(300), {"": {}}, {"name": "bytes", "configuration": {"endian": "big"}}, {"steps": HUGE}),
]
NAMES = ["..", ".", "", "../../x", "/abs", "a\0b", "steps/../x", "\ud800", "__class__", "con:", "x" * 5000, "w4", "w0"]


def places(value: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Where something stands in a document: the keys that lead there."""
    if at:
        yield at
    if isinstance(value, dict | list):
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            yield from places(item, (*at, key))


def mutated(document: Any, data: st.DataObject) -> Any:
    """The document with one thing replaced, removed, renamed, or exchanged for another one of it."""
    found = list(places(document))
    at = found[data.draw(st.integers(0, len(found) - 1))]
    home = functools.reduce(lambda value, key: value[key], at[:-1], document)
    how = data.draw(st.sampled_from(["replace"] * 4 + ["remove", "rename", "exchange"]))
    if how == "replace":
        home[at[-1]] = copy.deepcopy(data.draw(st.sampled_from(VALUES)))
    elif how == "exchange":
        other = found[data.draw(st.integers(0, len(found) - 1))]
        home[at[-1]] = copy.deepcopy(functools.reduce(lambda value, key: value[key], other, document))
    else:
        kept = home.pop(at[-1])
        if how == "rename" and isinstance(home, dict):
            home[data.draw(st.sampled_from(NAMES))] = kept
    return document


@settings(max_examples=60, deadline=None, derandomize=True)
@given(data=st.data())
def test_any_mutated_root_works_or_is_a_clear_error(data: st.DataObject) -> None:
    document = json.loads(small()["zarr.json"])
    for _ in range(data.draw(st.integers(1, 2))):
        document = mutated(document, data)
    explore(put_in_memory({"zarr.json": json.dumps(document).encode()}))


@settings(max_examples=40, deadline=None, derandomize=True)
@given(part=st.binary(max_size=40), at=st.integers(0, 10**6), cut=st.booleans())
def test_any_bytes_in_a_root_work_or_are_a_clear_error(part: bytes, at: int, cut: bool) -> None:
    data = small()["zarr.json"]
    place = at % len(data)
    rest = b"" if cut else data[place + len(part) :]
    explore(put_in_memory({"zarr.json": data[:place] + part + rest}))


def declare(lengths: dict[str, int]) -> Callable[[Any], object]:
    """A change of a root that claims these lengths of its axes everywhere, consistently."""

    def inside(document: Any) -> None:
        for path, member in document["consolidated_metadata"]["metadata"].items():
            if "shape" in member and path.startswith("steps/"):
                dims = member["dimension_names"]
                member["shape"] = [lengths.get(dim, size) for dim, size in zip(dims, member["shape"], strict=True)]
            elif path.startswith("steps/") and "parameter" in lengths and member["attributes"].get("widths"):
                member["attributes"]["widths"] = [1] * lengths["parameter"]
        if STEP in lengths:
            document["attributes"]["committed"]["steps"] = lengths[STEP]

    return inside


@pytest.mark.parametrize(
    ("lengths", "words"),
    [
        ({STEP: HUGE}, "the steps of 'steps' do not increase"),
        ({STEP: 10**7}, "the steps of 'steps' do not increase"),
        ({STEP: 2**48 + 1}, "its attribute 'committed'"),
        ({"group": HUGE, "group_other": HUGE}, "names; at most 1048576 are read"),
        ({"group": 10**6, "group_other": 10**6}, "the names in 'steps/group' are not all different"),
        ({"component": HUGE}, "components; at most 1048576 are read"),
        ({"parameter": 10**5}, "are not all different"),
        ({"metric": HUGE}, "names; at most 1048576 are read"),
    ],
)
def test_shapes_that_nothing_stands_behind_are_refused(path: Path, lengths: dict[str, int], words: str) -> None:
    edit(path, declare(lengths))
    said = explore(path)
    assert any(words in text for text in said), said


def test_a_read_that_is_too_large_is_refused_and_smaller_ones_are_not(path: Path) -> None:
    """Of components as many as are allowed, of which no chunk is there."""
    width = 1 << 20
    edit(path, declare({"component": width}))
    edit(path, change_member("steps/w1", "attributes", to={"widths": [width]}))
    for kind in ("gradient", "activation", "adjoint"):
        for chunk in (path / "steps" / "w1" / kind).glob("c.*"):
            chunk.unlink()
        chunks = ("chunk_grid", "configuration", "chunk_shape")
        edit(path, change_member(f"steps/w1/{kind}", *chunks, to=[1, 1, 1, 1]))
    stream = open_run(path).stream()
    with bounded(), pytest.raises(StoreError, match="too large to be read at a time"):
        stream.read("bias", "gradient")


def test_chunks_larger_than_memory_are_refused(path: Path) -> None:
    for member, document in members_of(path).items():
        if "shape" in document:
            edit(
                path,
                change_member(
                    member, "chunk_grid", "configuration", "chunk_shape", to=[10**6] * len(document["shape"])
                ),
            )
    assert all("its chunks are of shape" in said for said in explore(path))


@pytest.mark.parametrize("text", [b"[" * 10**5, b'{"attributes":' * 10**5, b'{"a":' * 500 + b"1" + b"}" * 500])
def test_a_root_nested_without_end_is_no_json(path: Path, text: bytes) -> None:
    (path / "zarr.json").write_bytes(text)
    assert all("damaged" in said or "not a gradtrace run" in said for said in explore(path))


def test_an_attribute_nested_deeply_is_refused(path: Path) -> None:
    edit(path, change("attributes", "run", "seed", to=nested(200)))
    assert any("it is nested more than 64 levels deep" in said for said in explore(path))


@pytest.mark.parametrize("name", ["../../outside", "/outside", "steps/../../outside", "steps/w4/a\0b", "C:/outside"])
def test_names_that_lead_out_of_the_run_are_refused(path: Path, name: str) -> None:
    outside = path.parent / "outside"
    outside.mkdir()
    (outside / "c.0").write_bytes((path / "steps" / "loss" / "c.0").read_bytes())
    member = members_of(path)["steps/loss"]
    edit(path, change_member(name, to=member))
    assert all("which is no path of a run" in said for said in explore(path))
    with pytest.raises(StoreError, match="cannot be repaired"):
        repair(Directory(path))
    assert [file.name for file in outside.iterdir()] == ["c.0"]


@pytest.mark.parametrize("stream", ["probes/../x", "probes/", "../steps", "probes/a/b"])
def test_streams_that_lead_elsewhere_are_refused(path: Path, stream: str) -> None:
    edit(path, lambda document: document["attributes"]["committed"].update({stream: 3}))
    assert "works" not in explore(path)


# ---------------------------------------------------------------------- code


class Canary:
    """What runs code when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.mkdir, (self.path,)


@pytest.mark.parametrize("codec", ["numcodecs.pickle", "pickle", "numcodecs.msgpack2", "object", "../evil"])
@pytest.mark.parametrize("dtype", ["float64", "object", "numpy.object", "|O"])
def test_pickled_objects_are_never_loaded(path: Path, codec: str, dtype: str) -> None:
    canary = path.parent / "canary"
    (path / "steps" / "loss" / "c.0").write_bytes(pickle.dumps(Canary(canary)))
    for document in ("", "steps/loss"):
        change_codec = change("codecs", to=[{"name": codec, "configuration": {}}])
        change_dtype = change("data_type", to=dtype)
        for alter in (change_codec, change_dtype):
            here = (lambda a: lambda d: a(d["consolidated_metadata"]["metadata"]["steps/loss"]))(alter)
            edit(path, alter if document else here, document)
    said = explore(path)
    assert all("damaged: 'steps/loss'" in text for text in said)
    assert not canary.exists()
    pickle.loads(pickle.dumps(Canary(canary)))
    assert canary.exists(), "the canary works"


def test_a_store_of_format_2_with_pickled_objects_is_foreign(tmp_path: Path) -> None:
    folder, canary = tmp_path / "old", tmp_path / "canary"
    (folder / "steps").mkdir(parents=True)
    (folder / ".zgroup").write_text('{"zarr_format": 2}')
    (folder / ".zattrs").write_text('{"gradtrace_schema": "1.0"}')
    array = {"zarr_format": 2, "shape": [1], "chunks": [1], "dtype": "|O", "fill_value": None, "order": "C"}
    (folder / "steps" / ".zarray").write_text(
        json.dumps({**array, "compressor": None, "filters": [{"id": "pickle", "protocol": 5}]})
    )
    (folder / "steps" / "0").write_bytes(pickle.dumps(Canary(canary)))
    assert all("format 2" in said for said in explore(folder))
    assert not canary.exists()


# ---------------------------------------------------------------------- what newer versions may add


def test_what_a_newer_minor_version_adds_is_ignored_or_shown(path: Path) -> None:
    members = members_of(path)
    strange = {**members["steps/loss"], "data_type": "complex128", "codecs": [{"name": "new"}]}
    alike = members["steps/w1/residual"]
    additions = {
        "steps/w1/phase": strange,
        "steps/w1/extra": alike,
        "steps/w1/other": {**alike, "dimension_names": ["step", "layer"]},
        "steps/w1/misfit": {**alike, "dimension_names": ["parameter", "step"]},
        "steps/w1/loss": alike,
        "steps/angles": {"zarr_format": 3, "node_type": "group", "attributes": {}},
        "steps/angles/x": strange,
        "later": {"zarr_format": 3, "node_type": "group", "attributes": {"a": 1}, "new": 1},
    }
    edit(path, lambda document: document["consolidated_metadata"]["metadata"].update(additions))
    edit(path, lambda document: document["attributes"].update(gradtrace_schema="1.999", new={"a": [1]}))
    order = lambda d: d["consolidated_metadata"].update(  # noqa: E731 - zarr loses members that are not in order
        metadata=dict(sorted(d["consolidated_metadata"]["metadata"].items(), key=lambda m: (m[0].count("/"), m[0])))
    )
    edit(path, order)
    run = open_run(path)
    assert "extra" in run.stream().variables("bias")
    assert not {"phase", "misfit", "loss", "other"} & run.stream().variables("bias").keys()
    assert explore(path) == {"works"}
