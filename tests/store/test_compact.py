"""An archive holds what its run holds, to the last bit, or there is none."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from math import ceil, prod
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xarray as xr
import zarr
from hypothesis import given
from hypothesis import strategies as st

from gradtrace.errors import StoreError
from gradtrace.store.archives import shards
from gradtrace.store.archives.compact import compact
from gradtrace.store.metadata import ArraySpec, array_document
from gradtrace.store.places.keys import Directory, Memory
from gradtrace.store.reading.opened import open_run
from gradtrace.store.reading.snapshot import Rewound
from gradtrace.store.rows import KINDS, ParameterInfo, StepRow
from gradtrace.store.writing.writer import RunWriter
from tests.store.alike import assert_alike
from tests.store.samples import infos, parameter_row, step_row

Make = Callable[..., RunWriter]
WIDTHS = {"wide": 70, "narrow": 12, "late": 14, "a/b": 3, "bias": 1}
NAMES = tuple(WIDTHS)


def row_of(step: int) -> StepRow:
    """Parameters of several widths, one that comes late and one that skips steps; groups and scalars that come."""
    groups = ("all", "a", "b", "c")[: 2 + step // 9]
    names = [name for name in NAMES if (name != "late" or step > 12) and (name != "bias" or step % 3)]
    rows = {name: parameter_row(100 * step + i, groups=len(groups), width=WIDTHS[name]) for i, name in enumerate(names)}
    scalars = {"lr": -0.0, "é": step / 7} if step % 2 else {}
    return StepRow(2 * step, groups, np.arange(len(groups)), rows, loss=1 / (step + 1), epoch=step, scalars=scalars)


def write(writer: RunWriter, steps: range) -> None:
    for step in steps:
        writer.append(row_of(step))
        if step % 5 == 0:
            writer.append(step_row(step, NAMES[:2], groups=("all", f"site={step // 10}")), stream="probe/val 1/x")


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    unseen = ParameterInfo("frozen", (3, 4), {"rung": "ungrouped", "reason": "it is frozen"})
    path, about = tmp_path_factory.mktemp("recorded") / "run.zarr", {"attrs": {"seed": 7}, "kinds": KINDS, "keep": None}
    with RunWriter(path, parameters=[*infos(NAMES), unseen], flush_every=4, **about) as writer:  # type: ignore[arg-type]
        write(writer, range(31))
    return path


@pytest.fixture
def run_path(recorded: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(recorded, tmp_path / "run.zarr"))


@pytest.fixture
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several shards an array, of several chunks each."""
    monkeypatch.setattr(shards, "CHUNK_BYTES", 6000)
    monkeypatch.setattr(shards, "SHARD_BYTES", 30000)
    monkeypatch.setattr(shards, "LEAST_STEPS", 8)


def contents(path: Path) -> dict[str, bytes]:
    return {str(found.relative_to(path)): found.read_bytes() for found in path.rglob("*") if found.is_file()}


def test_an_archive_holds_what_its_run_holds(run_path: Path, tmp_path: Path) -> None:
    before = contents(run_path)
    done = compact(run_path, tmp_path / "archive.zarr")
    assert contents(run_path) == before
    assert_alike(open_run(run_path), open_run(tmp_path / "archive.zarr"))
    after = contents(tmp_path / "archive.zarr")
    assert done.before == (len(before), sum(map(len, before.values())))
    assert done.after == (len(after), sum(map(len, after.values())))
    assert len(after) < len(before) / 2


def test_an_archive_in_many_shards_holds_the_same(run_path: Path, tmp_path: Path, small_shards: None) -> None:
    compact(run_path, tmp_path / "archive.zarr")
    assert_alike(open_run(run_path), open_run(tmp_path / "archive.zarr"))
    gradient = zarr.open_array(tmp_path / "archive.zarr", path="steps/w256/gradient", mode="r")
    assert gradient.shards is not None
    assert prod(gradient.shards) > prod(gradient.chunks)
    assert len(list((tmp_path / "archive.zarr" / "steps" / "w256" / "gradient").glob("c.*"))) > 1


def test_xarray_finds_the_same_in_an_archive_as_in_its_run(run_path: Path, tmp_path: Path, small_shards: None) -> None:
    compact(run_path, tmp_path / "archive.zarr")
    for consolidated in (None, True):
        run, archive = (
            xr.open_datatree(path, engine="zarr", consolidated=consolidated)
            for path in (run_path, tmp_path / "archive.zarr")
        )
        for node in run.subtree:
            if node.path != "/":
                xr.testing.assert_identical(node.to_dataset(), archive[node.path].to_dataset())
    alone = xr.open_dataset(tmp_path / "archive.zarr", engine="zarr", group="steps/w16", consolidated=False)
    assert alone["gradient"].shape == (31, 2, 4, 14)


def test_the_root_says_that_it_is_an_archive_and_all_that_the_run_says(run_path: Path, tmp_path: Path) -> None:
    compact(run_path, tmp_path / "archive.zarr")
    before, after = (json.loads((path / "zarr.json").read_text()) for path in (run_path, tmp_path / "archive.zarr"))
    assert after["attributes"] == {**before["attributes"], "archive": "compact"}
    assert list(after["consolidated_metadata"]["metadata"]) == list(before["consolidated_metadata"]["metadata"])


def test_a_run_without_rows_has_an_archive(new_writer: Make, tmp_path: Path) -> None:
    new_writer().close()
    compact(tmp_path / "run.zarr", tmp_path / "archive.zarr")
    assert_alike(open_run(tmp_path / "run.zarr"), open_run(tmp_path / "archive.zarr"))


def test_a_run_that_went_on_and_was_rewound_has_an_archive(new_writer: Make, run_path: Path, tmp_path: Path) -> None:
    with new_writer(NAMES, keep=None, flush_every=3, resume=41) as writer:
        write(writer, range(40, 47))
    compact(run_path, tmp_path / "archive.zarr")
    found = open_run(tmp_path / "archive.zarr")
    assert_alike(open_run(run_path), found)
    assert found.stream().steps.tolist() == [*range(0, 41, 2), *range(80, 94, 2)]


def test_the_archive_of_a_killed_run_holds_what_was_committed_and_stays_unfinished(
    new_writer: Make, tmp_path: Path
) -> None:
    with new_writer(NAMES, keep=None, flush_every=8) as writer:
        write(writer, range(21))
        writer.flush()
        shutil.copytree(writer.path, tmp_path / "killed.zarr", ignore=shutil.ignore_patterns("gradtrace.lock"))
    (tmp_path / "killed.zarr" / "steps" / "step" / ".c.0.0123.partial").write_bytes(b"half")
    compact(tmp_path / "killed.zarr", tmp_path / "archive.zarr")
    assert_alike(open_run(tmp_path / "killed.zarr"), open_run(tmp_path / "archive.zarr"))
    assert not open_run(tmp_path / "archive.zarr").closed
    plain = xr.open_datatree(tmp_path / "archive.zarr", engine="zarr", consolidated=False)
    assert plain["steps"].sizes["step"] == 21


def test_an_archive_can_be_compacted_again(run_path: Path, tmp_path: Path, small_shards: None) -> None:
    compact(run_path, tmp_path / "one.zarr")
    compact(tmp_path / "one.zarr", tmp_path / "two.zarr")
    assert contents(tmp_path / "one.zarr") == contents(tmp_path / "two.zarr")


def test_archives_can_be_made_in_memory_and_of_what_is_there(run_path: Path, tmp_path: Path) -> None:
    name = f"memory://{tmp_path.name}"
    done = compact(run_path, name)
    assert done.after.files == len(list(Memory(tmp_path.name).list()))
    assert_alike(open_run(run_path), open_run(name))
    assert compact(name, tmp_path / "back.zarr").before == done.after
    assert_alike(open_run(run_path), open_run(tmp_path / "back.zarr"))


def test_progress_ends_at_the_whole_of_both_passes(run_path: Path, tmp_path: Path, small_shards: None) -> None:
    told: dict[str, list[tuple[int, int]]] = {}
    compact(run_path, tmp_path / "archive.zarr", progress=lambda what, *n: told.setdefault(what, []).append(n))
    assert list(told) == ["Writing", "Comparing"]
    for numbers in told.values():
        assert numbers == sorted(numbers)
        assert numbers[-1][0] == numbers[-1][1] == numbers[0][1] > 0


# ---------------------------------------------------------------------- what is refused


@pytest.mark.parametrize("what", ["file", "run", "folder", "archive"])
def test_nothing_is_overwritten(run_path: Path, tmp_path: Path, what: str) -> None:
    target = tmp_path / "target"
    if what == "file":
        target.write_text("mine")
    elif what == "run":
        shutil.copytree(run_path, target)
    elif what == "folder":
        target.mkdir()
        (target / "notes.txt").write_text("mine")
    else:
        compact(run_path, target)
    before = target.read_text() if what == "file" else contents(target)
    with pytest.raises(StoreError, match="something is there already, and nothing is overwritten"):
        compact(run_path, target)
    assert before == (target.read_text() if what == "file" else contents(target))


def test_an_archive_is_not_made_inside_its_run(run_path: Path) -> None:
    before = contents(run_path)
    for target in (run_path, run_path / "archive.zarr", run_path.parent / "." / "run.zarr" / "x"):
        with pytest.raises(StoreError, match="lies inside the run"):
            compact(run_path, target)
    assert contents(run_path) == before


def test_a_run_that_is_being_written_is_refused(new_writer: Make, tmp_path: Path) -> None:
    with new_writer(NAMES, keep=None) as writer:
        write(writer, range(3))
        writer.flush()
        with pytest.raises(StoreError, match=r"is being written by this process.*lack what is still to come"):
            compact(writer.path, tmp_path / "archive.zarr")
    assert not (tmp_path / "archive.zarr").exists()


def test_a_run_of_a_newer_schema_is_refused(run_path: Path, tmp_path: Path) -> None:
    document = json.loads((run_path / "zarr.json").read_text())
    document["attributes"]["gradtrace_schema"] = "1.999"
    (run_path / "zarr.json").write_text(json.dumps(document))
    with pytest.raises(StoreError, match=r"has schema 1\.999.*would lack what is new there"):
        compact(run_path, tmp_path / "archive.zarr")


def test_a_damaged_run_is_refused_and_the_array_named(run_path: Path, tmp_path: Path) -> None:
    chunk = next((run_path / "steps" / "w16" / "adjoint").glob("c.2.*"))
    chunk.write_bytes(chunk.read_bytes()[:20])
    with pytest.raises(StoreError, match="'steps/w16/adjoint' cannot be read"):
        compact(run_path, tmp_path / "archive.zarr")
    assert not (tmp_path / "archive.zarr").exists()


@pytest.mark.parametrize("resume", [True, 4, False])
def test_nothing_is_added_to_an_archive(new_writer: Make, run_path: Path, tmp_path: Path, resume: bool | int) -> None:
    compact(run_path, tmp_path / "archive.zarr")
    before = contents(tmp_path / "archive.zarr")
    with pytest.raises(StoreError, match="it is an archive, to which nothing is added"):
        new_writer(NAMES, keep=None, path=tmp_path / "archive.zarr", resume=resume)
    assert contents(tmp_path / "archive.zarr") == before


# ---------------------------------------------------------------------- what goes wrong on the way


def failing_put(monkeypatch: pytest.MonkeyPatch, number: int, error: BaseException) -> None:
    """Directory.put fails from the given call on, except for the lock's."""
    put, calls = Directory.put, iter(range(10**9))

    def failing(self: Directory, key: str, data: bytes) -> None:
        if next(calls) >= number:
            raise error
        put(self, key, data)

    monkeypatch.setattr(Directory, "put", failing)


@pytest.mark.parametrize("number", [0, 1, 30, 70, 95])
def test_a_full_disk_leaves_nothing_behind(
    monkeypatch: pytest.MonkeyPatch, run_path: Path, tmp_path: Path, number: int
) -> None:
    before = contents(run_path)
    assert compact(run_path, tmp_path / "whole.zarr").after.files > 95
    failing_put(monkeypatch, number, OSError(errno.ENOSPC, "No space left on device"))
    with pytest.raises(StoreError, match=r"Writing .*archive\.zarr' failed: the disk is full.*Nothing of it is left"):
        compact(run_path, tmp_path / "archive.zarr")
    assert not (tmp_path / "archive.zarr").exists()
    assert contents(run_path) == before


def test_an_interrupt_leaves_nothing_behind(monkeypatch: pytest.MonkeyPatch, run_path: Path, tmp_path: Path) -> None:
    failing_put(monkeypatch, 80, KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        compact(run_path, tmp_path / "archive.zarr")
    assert not (tmp_path / "archive.zarr").exists()


@pytest.mark.parametrize("key", ["steps/w16/gradient/c.0.0.0.0", "steps/group/c.0", "steps/w4/zarr.json", "zarr.json"])
@pytest.mark.parametrize("place", [0.1, 0.95])
def test_a_byte_that_changes_on_its_way_is_found(
    monkeypatch: pytest.MonkeyPatch, run_path: Path, tmp_path: Path, key: str, place: float
) -> None:
    put = Directory.put

    def flipping(self: Directory, name: str, data: bytes) -> None:
        if name == key:
            at = int(place * len(data))
            data = data[:at] + bytes([data[at] ^ 4]) + data[at + 1 :]
        put(self, name, data)

    monkeypatch.setattr(Directory, "put", flipping)
    with pytest.raises(StoreError, match="does not read back as it was written") as caught:
        compact(run_path, tmp_path / "archive.zarr")
    assert key.rpartition("/")[0] in str(caught.value)
    assert not (tmp_path / "archive.zarr").exists()


@pytest.mark.parametrize("change", [lambda values: values * np.float32(1 + 2**-23), np.abs, np.zeros_like])
def test_a_value_that_is_encoded_wrongly_is_found(
    monkeypatch: pytest.MonkeyPatch, run_path: Path, tmp_path: Path, change: Callable[[Any], Any]
) -> None:
    """Also the last bit of a number, and a zero's sign: the checksum is right, and would not tell."""
    encode = shards.Encoder.encode

    def wrong(self: shards.Encoder, region: shards.Region, values: np.ndarray) -> dict[str, bytes]:
        return encode(self, region, change(values) if values.dtype == np.float64 else values)

    monkeypatch.setattr(shards.Encoder, "encode", wrong)
    with pytest.raises(StoreError, match=r"'(steps|probes/val 1%2Fx)/\w+' has other values at \[0:"):
        compact(run_path, tmp_path / "archive.zarr")
    assert not (tmp_path / "archive.zarr").exists()


def test_a_run_that_is_rewound_meanwhile_has_no_archive(new_writer: Make, run_path: Path, tmp_path: Path) -> None:
    def rewind(what: str, done: int, total: int) -> None:
        if (what, done) == ("Comparing", total):
            new_writer(NAMES, keep=None, resume=20).close()

    with pytest.raises(Rewound, match=r"was rewound.*Nothing is left"):
        compact(run_path, tmp_path / "archive.zarr", progress=rewind)
    assert not (tmp_path / "archive.zarr").exists()


def test_bytes_that_change_later_are_not_read_as_values(run_path: Path, tmp_path: Path) -> None:
    """In a chunk as a run has them, most such changes show as other numbers."""
    compact(run_path, tmp_path / "archive.zarr")
    chunk = tmp_path / "archive.zarr" / "steps" / "w16" / "gradient" / "c.0.0.0.0"
    whole = chunk.read_bytes()
    for at in range(0, len(whole), len(whole) // 20):
        chunk.write_bytes(whole[:at] + bytes([whole[at] ^ 16]) + whole[at + 1 :])
        with pytest.raises(StoreError, match="'steps/w16/gradient' cannot be read"):
            open_run(tmp_path / "archive.zarr").stream().read("narrow", "gradient")


SLOW = """
import sys, time
from gradtrace.store.places.keys import Directory
from gradtrace.store.archives.compact import compact
put = Directory.put
def slow(self, key, data):
    put(self, key, data)
    print(key, flush=True)
    time.sleep(0.01)
Directory.put = slow
compact(sys.argv[1], sys.argv[2], progress=lambda what, *_: what == "Comparing" and print(what, flush=True))
"""


@pytest.mark.parametrize("puts", [1, 60, 110])
def test_a_kill_leaves_nothing_that_looks_like_a_run(run_path: Path, tmp_path: Path, puts: int) -> None:
    target = tmp_path / "archive.zarr"
    command = [sys.executable, "-c", SLOW, str(run_path), str(target)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        for _ in range(puts):
            assert child.stdout.readline()
        time.sleep(0.002)
        os.kill(child.pid, signal.SIGKILL)
    assert contents(target)
    with pytest.raises(StoreError, match=r"it has no zarr\.json"):
        open_run(target)
    compact(run_path, target)
    assert_alike(open_run(run_path), open_run(target))
    assert not [name for name in contents(target) if name.endswith((".partial", ".lock"))]


def test_two_do_not_write_one_archive(run_path: Path, tmp_path: Path) -> None:
    def again(what: str, done: int, total: int) -> None:
        if done == total:
            with pytest.raises(StoreError, match="is being written by this process"):
                compact(run_path, tmp_path / "archive.zarr")

    compact(run_path, tmp_path / "archive.zarr", progress=again)
    assert_alike(open_run(run_path), open_run(tmp_path / "archive.zarr"))


# ---------------------------------------------------------------------- how arrays are cut


@given(
    shape=st.tuples(
        st.integers(0, 5), st.integers(0, 200_000), st.integers(0, 3000), st.integers(0, 40), st.integers(0, 300)
    ),
    dtype=st.sampled_from(["float32", "float64", "uint8", "int64"]),
    dims=st.sampled_from([0, 1, 2]),
)
def test_shards_are_of_whole_chunks_and_small_enough_to_hold(shape: tuple[int, ...], dtype: str, dims: int) -> None:
    names = ("run", "step", "parameter", "group", "component")[dims:]
    document = array_document(ArraySpec("x", names, dtype, (1,) * len(names)), shape[dims:])
    cut = shards.sharded(document)
    outer = cut["chunk_grid"]["configuration"]["chunk_shape"]
    settings = cut["codecs"][0].get("configuration", {})
    inner = settings.get("chunk_shape", outer)
    size, cell = np.dtype(dtype).itemsize, prod(max(1, n) for n in shape[3:])
    assert all(whole % part == 0 for whole, part in zip(outer, inner, strict=True))
    assert prod(inner) * size <= max(shards.CHUNK_BYTES, cell * size)
    assert prod(outer) * size <= max(shards.SHARD_BYTES, cell * size)
    assert outer[-2:] == [max(1, n) for n in shape[-2:]]
    assert all(
        whole < length + part for whole, part, length in zip(outer, inner, document["shape"], strict=True) if length
    )


@given(
    shape=st.lists(st.integers(0, 9), min_size=1, max_size=3), cuts=st.lists(st.integers(1, 4), min_size=3, max_size=3)
)
def test_every_value_is_in_one_region(shape: list[int], cuts: list[int]) -> None:
    document = {"shape": shape, "chunk_grid": {"configuration": {"chunk_shape": cuts[: len(shape)]}}}
    times = np.zeros(shape, dtype=int)
    for region in shards.regions(document):
        times[region] += 1
    assert (times == 1).all()
    assert len(list(shards.regions(document))) == prod(ceil(n / cut) for n, cut in zip(shape, cuts, strict=False))
