"""What stands at a path instead of a run, or what has happened to it, is said plainly."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import zarr

from gradtrace.errors import SelectionError, StoreError
from gradtrace.store.queries.selection import Query, select
from gradtrace.store.reading.opened import open_run
from gradtrace.store.writing.writer import RunWriter
from tests.store.samples import step_row

Make = Callable[..., RunWriter]


@pytest.fixture
def run_path(new_writer: Make) -> Path:
    with new_writer(flush_every=4) as writer:
        for step in range(10):
            writer.append(step_row(step, ("fc1.weight", "fc1.bias")))
    return Path(writer.path)


def edit(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    document = json.loads((path / "zarr.json").read_text())
    change(document)
    (path / "zarr.json").write_text(json.dumps(document))


def test_missing_foreign_and_old_paths_are_told_apart(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    (tmp_path / "folder").mkdir()
    zarr.create_group(tmp_path / "other", zarr_format=3)
    zarr.create_group(tmp_path / "old", zarr_format=2)
    for name, words in {
        "nowhere": "There is no run at",
        "file": "is a file; a run is a directory",
        "folder": "it has no zarr.json",
        "other": "is a zarr store, but not a gradtrace run",
        "old": "format 2",
    }.items():
        with pytest.raises(StoreError, match=words) as caught:
            open_run(tmp_path / name)
        assert name in str(caught.value)


def test_a_newer_schema_is_refused_and_a_newer_minor_is_read(run_path: Path) -> None:
    edit(run_path, lambda document: document["attributes"].update(gradtrace_schema="1.9"))
    assert open_run(run_path).schema == "1.9"
    edit(run_path, lambda document: document["attributes"].update(gradtrace_schema="2.0"))
    with pytest.raises(StoreError, match=r"schema 2\.0.*Install a newer gradtrace"):
        open_run(run_path)
    edit(run_path, lambda document: document["attributes"].update(gradtrace_schema="new"))
    with pytest.raises(StoreError, match="schema version reads 'new'"):
        open_run(run_path)


def test_a_truncated_or_emptied_root_is_named_as_damage(run_path: Path) -> None:
    whole = (run_path / "zarr.json").read_bytes()
    for part in (whole[: len(whole) // 2], b"", b"[]", b"null", b"\xff\xfe"):
        (run_path / "zarr.json").write_bytes(part)
        with pytest.raises(StoreError):
            open_run(run_path)
    (run_path / "zarr.json").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(StoreError, match=r"damaged: its zarr\.json is no JSON"):
        open_run(run_path)


@pytest.mark.parametrize("attribute", ["committed", "closed", "parameters", "run"])
def test_missing_attributes_are_named(run_path: Path, attribute: str) -> None:
    edit(run_path, lambda document: document["attributes"].pop(attribute))
    with pytest.raises(StoreError, match=f"its attributes lack {attribute}"):
        open_run(run_path)


def test_missing_or_broken_metadata_of_members_is_damage(run_path: Path) -> None:
    copy = run_path.with_name("copy")
    shutil.copytree(run_path, copy)
    edit(run_path, lambda document: document.pop("consolidated_metadata"))
    with pytest.raises(StoreError, match="damaged"):
        open_run(run_path)
    edit(copy, lambda document: document["consolidated_metadata"]["metadata"]["steps/step"].pop("chunk_grid"))
    with pytest.raises(StoreError, match="damaged"):
        open_run(copy)


def test_a_lost_chunk_of_steps_is_noticed(run_path: Path) -> None:
    (run_path / "steps" / "step" / "c.0").unlink()
    with pytest.raises(StoreError, match="steps of 'steps' do not increase"):
        _ = open_run(run_path).stream().steps


def test_a_truncated_chunk_is_named(run_path: Path) -> None:
    chunk = next((run_path / "steps" / "w16" / "gradient").glob("c.0.*"))
    chunk.write_bytes(chunk.read_bytes()[:20])
    with pytest.raises(StoreError, match="'steps/w16/gradient' cannot be read"):
        open_run(run_path).stream().read("fc1.weight", "gradient")
    with pytest.raises(StoreError, match="'steps/w16/gradient' cannot be read"):
        _ = open_run(run_path).tree["fc1.bias"]["gradient"].values
    assert open_run(run_path).tree["fc1.bias"]["adjoint"].shape == (10, 3, 5)


def test_a_lost_chunk_of_values_is_noticed_by_queries(run_path: Path) -> None:
    from gradtrace.store.queries.query import records

    next((run_path / "steps" / "w16" / "gradient").glob("c.1.*")).unlink()
    selected = select(open_run(run_path), Query(kinds=["gradient"]))
    with pytest.raises(StoreError, match="marked as measured"):
        list(records(selected))


def test_unknown_names_are_answered_with_the_nearest(run_path: Path) -> None:
    run = open_run(run_path)
    with pytest.raises(SelectionError, match=r"no parameter 'fc1\.wieght'.*Nearest: 'fc1\.weight'"):
        run.parameter("fc1.wieght")
    with pytest.raises(SelectionError, match="no probe 'val'"):
        run.stream("val")
    with pytest.raises(SelectionError, match="no measured parameter"):
        run.stream().read("fc2.weight", "gradient")
