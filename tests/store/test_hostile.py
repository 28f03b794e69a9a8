"""Stores that are malformed, or made to do harm: an error that says so, and neither a hang, nor a huge allocation, nor
somebody else's code."""

from __future__ import annotations

import copy
import json
import os
import pickle
import resource
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gradtrace.cli import main
from gradtrace.errors import GradtraceError, StoreError
from gradtrace.store.opened import open_run
from tests.store.sound import lay_out

MOST = 400_000  # KiB that looking at a small store may take on top
ODD: list[Any] = [
    *(None, True, -1, 0, 1.5, 10**12, 2**63, 2**200, float("nan"), "", "x", "object", "|O", "../../outside", "/etc"),
    *("a\0b", "..", "w99999999", [], {}, [[]], [10**12] * 4, [-1, 3, 3, 3], {"a": {}}, ["x"] * 5, "NaN"),
    [{"name": "numcodecs.pickle", "configuration": {}}],
    [{"name": "bytes"}, {"name": "gzip", "configuration": {"level": 5}}],
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return lay_out(tmp_path_factory.mktemp("hostile") / "run.zarr")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return lay_out(tmp_path / "run.zarr")


def look(path: Path) -> None:
    """Everything that anybody asks a run."""
    run = open_run(path)
    repr(run)
    for name in (None, *run.probe_names):
        stream = run.stream(name)
        for array in ("loss", "epoch", "n_samples", "scalars", "cost"):
            stream.per_step(array)
        for parameter in stream.places:
            for variable in stream.variables(parameter):
                stream.read(parameter, variable)
    for node in run.tree.children.values():
        node.load()


def ends_well(path: Path) -> bool:
    """Whether the run could be read; what is raised otherwise is ours, and little memory was asked for."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    fine = True
    try:
        look(path)
    except GradtraceError:
        fine = False
    for command in (["ls"], ["info"], ["query", "--csv"], ["query", "--metric", "nuclear", "--json"]):
        done = CliRunner().invoke(main, [command[0], str(path), *command[1:]])
        assert done.exit_code in (0, 1, 3), (command, done.exception)
        assert isinstance(done.exception, (SystemExit, type(None))), (command, done.exception)
        assert "Traceback" not in done.output
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < MOST
    return fine


def places(value: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Where everything stands in a document."""
    if at:
        yield at
    items = value.items() if isinstance(value, Mapping) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield from places(item, (*at, key))


def put(document: Any, at: tuple[Any, ...], value: Any) -> None:
    for key in at[:-1]:
        document = document[key]
    document[at[-1]] = value


@settings(max_examples=150, deadline=20_000, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_any_change_of_the_root_ends_well(folder: Path, data: st.DataObject) -> None:
    root = folder / "zarr.json"
    whole = root.read_bytes()
    document = json.loads(whole)
    for _ in range(data.draw(st.integers(1, 3), label="changes")):
        at = data.draw(st.sampled_from(list(places(document))), label="where")
        value = data.draw(st.sampled_from(ODD), label="what")
        if data.draw(st.booleans(), label="renamed") and isinstance(at[-1], str):
            holder: Any = document
            for key in at[:-1]:
                holder = holder[key]
            holder[str(value)] = holder.pop(at[-1])
        else:
            put(document, at, copy.deepcopy(value))
    try:
        root.write_text(json.dumps(document))
        ends_well(folder)
    finally:
        root.write_bytes(whole)


@settings(max_examples=60, deadline=20_000, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_a_root_that_is_cut_off_or_scrambled_ends_well(folder: Path, data: st.DataObject) -> None:
    root = folder / "zarr.json"
    whole = root.read_bytes()
    broken = bytearray(whole[: data.draw(st.integers(0, len(whole)))])
    for _ in range(data.draw(st.integers(0, 4))):
        if broken:
            broken[data.draw(st.integers(0, len(broken) - 1))] = data.draw(st.integers(0, 255))
    try:
        root.write_bytes(bytes(broken))
        ends_well(folder)
    finally:
        root.write_bytes(whole)


def edit(path: Path, change: Any) -> None:
    root = path / "zarr.json"
    document = json.loads(root.read_bytes())
    change(document)
    root.write_text(json.dumps(document))


def members(document: Any) -> Any:
    return document["consolidated_metadata"]["metadata"]


def test_a_huge_shape_is_not_believed(path: Path) -> None:
    def change(document: Any) -> None:
        for member in members(document).values():
            if member["node_type"] == "array" and member["dimension_names"][0] == "step":
                member["shape"][0] = 10**12
        document["attributes"]["committed"] = {"steps": 10**12, "probes/val": 10**12}

    edit(path, change)
    assert not ends_well(path)


def test_chunks_larger_than_memory_are_not_made(path: Path) -> None:
    def change(document: Any) -> None:
        for member in members(document).values():
            if member["node_type"] == "array":
                grid = member["chunk_grid"]["configuration"]["chunk_shape"]
                grid[:] = [10**6] * len(grid)

    edit(path, change)
    assert not ends_well(path)


def test_a_document_without_an_end_is_refused(path: Path) -> None:
    (path / "zarr.json").write_text('{"attributes":' + "[" * 100_000 + "]" * 100_000 + "}")
    with pytest.raises(StoreError):
        open_run(path)
    edit_text = '{"attributes": {"gradtrace_schema": "1.0", "run": ' + '{"a":' * 500 + "1" + "}" * 500 + "}}"
    (path / "zarr.json").write_text(edit_text)
    assert not ends_well(path)


@pytest.mark.parametrize("name", ["../outside", "steps/../../outside", "/etc", "steps//w4", "steps/./w4", "steps/w4\0"])
def test_a_path_that_leads_out_is_refused(path: Path, name: str) -> None:
    (path.parent / "outside").mkdir()
    edit(path, lambda document: members(document).update({name: members(document)["steps"]}))
    assert not ends_well(path)


class Canary:
    """Unpickled, it leaves a mark."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return (os.mkdir, (str(self.mark),))


@pytest.mark.parametrize("codec", ["numcodecs.pickle", "pickle", "numcodecs.json2", "os.system"])
def test_nothing_is_unpickled(path: Path, codec: str) -> None:
    mark = path.parent / "mark"
    for chunk in path.rglob("c.*"):
        chunk.write_bytes(pickle.dumps(Canary(mark)))

    def change(document: Any) -> None:
        for member in members(document).values():
            if member["node_type"] == "array":
                member["codecs"] = [{"name": codec, "configuration": {"protocol": 5}}]

    edit(path, change)
    assert not ends_well(path)
    assert not mark.exists()


def test_objects_are_no_numbers(path: Path) -> None:
    def change(document: Any) -> None:
        members(document)["steps/w4/gradient"]["data_type"] = "object"

    edit(path, change)
    assert not ends_well(path)


def test_a_chunk_that_claims_to_be_gigabytes_is_not_unpacked(path: Path) -> None:
    chunk = next(iter(sorted((path / "steps/w4/gradient").glob("c.*"))))
    data = bytearray(chunk.read_bytes())
    data[4:8] = struct.pack("<I", 2**31 - 64)  # what blosc is to make of it
    chunk.write_bytes(bytes(data))
    assert not ends_well(path)


def test_a_chunk_of_garbage_is_named(path: Path) -> None:
    for chunk in (path / "steps/w4/gradient").glob("c.*"):
        chunk.write_bytes(os.urandom(200))
    with pytest.raises(StoreError, match="steps/w4/gradient"):
        look(path)
    assert not ends_well(path)


def test_what_is_no_file_is_not_waited_for(path: Path) -> None:
    """A pipe would never end."""
    chunk = next(iter(sorted((path / "steps/w4/gradient").glob("c.*"))))
    chunk.unlink()
    os.mkfifo(chunk)
    assert not ends_well(path)
    chunk.unlink()
    chunk.symlink_to(chunk)
    assert not ends_well(path)
    root = path / "zarr.json"
    root.unlink()
    os.mkfifo(root)
    assert not ends_well(path)


def test_strings_that_claim_to_be_endless_are_refused(path: Path) -> None:
    chunk = next(iter((path / "steps/group").glob("c.*")))
    for data in (struct.pack("<I", 2**32 - 1), struct.pack("<II", 3, 2**31), b"", b"\xff" * 64):
        chunk.write_bytes(data)
        assert not ends_well(path)
