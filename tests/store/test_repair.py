"""Repairing a store gives up what cannot be right, and leaves what is right as it is, to the last bit."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from gradtrace.errors import StoreError
from gradtrace.store.checking.finding import DAMAGE, NOTE
from gradtrace.store.checking.repair import repair
from gradtrace.store.checking.verify import verify
from gradtrace.store.places.keys import Directory
from gradtrace.store.places.place import keys_at
from gradtrace.store.reading.opened import open_run
from tests.store.sound import (
    ROWS,
    assert_repaired,
    assert_same,
    change,
    chunk_of,
    contents,
    damage_in,
    edit,
    lay_out,
    leaves,
    make,
    step_row,
    write,
)
from tests.store.test_resume import kill


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A run that is whole, to be damaged."""
    return lay_out(tmp_path / "run.zarr")


def test_repairing_removes_what_a_kill_left_and_nothing_else(tmp_path: Path) -> None:
    writer = make(tmp_path / "run", 6)
    writer.flush()
    root = (tmp_path / "run" / "zarr.json").read_bytes()
    write(writer, range(6, 14))
    writer.flush()
    kill(writer)
    (tmp_path / "run" / "zarr.json").write_bytes(root)
    foreign = ("notes.txt", "mine/c.0", "steps/readme")
    (tmp_path / "run" / "mine").mkdir()
    for name in foreign:
        (tmp_path / "run" / name).write_text("mine")
    (tmp_path / "run" / "steps" / ".c.0.1.partial").write_text("half")
    before, files = contents(Directory(tmp_path / "run")), leaves(tmp_path / "run")
    done, left = repair(Directory(tmp_path / "run"))
    assert left == []
    assert done[0] == "removed the lock of a writer that is gone"
    assert "files that the last commit does not know" in done[1]
    after = leaves(tmp_path / "run")
    assert set(foreign) <= after.keys()
    assert all(files[key] == data for key, data in after.items())
    assert_same(before, contents(Directory(tmp_path / "run")), before["committed"])
    assert not [key for key in after if "w16/gradient/c.3" in key or key.endswith(".partial")]


def test_a_run_that_is_being_written_is_not_repaired(tmp_path: Path) -> None:
    writer = make(tmp_path / "run", 6)
    writer.flush()
    with pytest.raises(StoreError, match="is being written by this process"):
        repair(Directory(tmp_path / "run"))
    writer.close()
    assert repair(Directory(tmp_path / "run")) == ([], [])


@pytest.mark.parametrize("array", ["loss", "epoch", "scalars", "cost"])
def test_what_stands_beside_the_measurements_is_given_up_without_rows(path: Path, array: str) -> None:
    before = contents(Directory(path))
    chunk_of(path, f"steps/{array}").write_bytes(b"broken")
    assert "give it up and keep the rest" in damage_in(path)[0].remedy
    done, left = repair(Directory(path))
    assert left == []
    assert done == [f"removed steps/{array}/c.{'0' if array in ('loss', 'epoch') else '0.0'}: the {array} of steps "
                    "0:9 could not be read"]  # fmt: skip
    after = contents(Directory(path))
    assert np.isnan(after.pop(f"steps|{array}")).all()
    before.pop(f"steps|{array}")
    assert_same(before, after, before["committed"])


@pytest.mark.parametrize("array", ["step", "n_samples", "group", "w4/parameter", "w4/gradient"])
def test_where_nothing_would_be_left_nothing_is_given_up(path: Path, array: str) -> None:
    chunk_of(path, f"steps/{array}").write_bytes(b"broken")
    before = leaves(path)
    assert {one.remedy for one in damage_in(path)} == {"Restore it from a copy."}
    done, left = repair(Directory(path))
    assert done == []
    assert {one.severity for one in left} == {DAMAGE}
    assert leaves(path) == before


def test_a_repaired_run_can_be_gone_on_with(path: Path) -> None:
    chunk_of(path, "steps/w4/status", 2).unlink()
    assert_repaired(path, 8)
    writer = make(path, 0, resume=8)
    write(writer, range(8, 14))
    writer.close()
    assert verify(Directory(path)) == []
    assert open_run(path).committed["steps"] == 14
    found = open_run(path).stream().read("fc.weight", "gradient")[13]
    np.testing.assert_array_equal(found, step_row(13).parameters["fc.weight"].spectra["gradient"].astype(np.float32))


def test_an_unfinished_run_is_repaired_and_stays_unfinished(tmp_path: Path) -> None:
    writer = make(tmp_path / "run", ROWS)
    writer.flush()
    kill(writer)
    chunk_of(tmp_path / "run", "steps/w16/adjoint", 2).write_bytes(b"")
    _, left = repair(Directory(tmp_path / "run"))
    assert left == []
    assert open_run(tmp_path / "run").committed["steps"] == 8
    assert not open_run(tmp_path / "run").closed


def test_newer_and_merged_runs_and_links_are_not_repaired(path: Path, tmp_path: Path) -> None:
    from gradtrace.store.archives.merge import merge

    merge({"a": path}, tmp_path / "merged")
    with pytest.raises(StoreError, match="holds merged runs"):
        repair(Directory(tmp_path / "merged"))
    (tmp_path / "run.zarr" / "steps" / "w1").rename(tmp_path / "w1")
    (tmp_path / "run.zarr" / "steps" / "w1").symlink_to(tmp_path / "w1")
    with pytest.raises(StoreError, match="'steps/w1' is a link that leads out of it"):
        repair(Directory(path))
    edit(path, change("attributes", "gradtrace_schema", to="1.99"))
    with pytest.raises(StoreError, match=r"has schema 1\.99"):
        repair(Directory(path))
    assert [one.severity for one in verify(Directory(path))] == [NOTE]


def test_bytes_in_memory_are_repaired_alike() -> None:
    make("memory://repair", ROWS).close()
    keys = keys_at("memory://repair")
    keys.delete("steps/w1/gradient/c.2.0.0.0")
    assert repair(keys).left == []
    assert open_run("memory://repair").committed["steps"] == 8
