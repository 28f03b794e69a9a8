"""What the writer refuses, how it waits, and what happens when the disk fails."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gradtrace.errors import StoreError
from gradtrace.store.places import keys as files
from gradtrace.store.reading.opened import open_run
from gradtrace.store.rows import KINDS, ParameterInfo, StepRow
from gradtrace.store.writing import writer as writer_module
from gradtrace.store.writing.writer import RunWriter
from tests.store.samples import infos, parameter_row, step_row

Make = Callable[..., RunWriter]


@pytest.mark.parametrize("closed", [True, False])
def test_a_run_is_never_overwritten(new_writer: Make, closed: bool) -> None:
    first = new_writer(["w"])
    if closed:
        first.close()
    with pytest.raises(StoreError, match="finished gradtrace run" if closed else "being written by this process"):
        new_writer(["w"])
    first.close()


def test_other_things_at_the_path_are_named(new_writer: Make, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("x")
    with pytest.raises(StoreError, match="it is a file"):
        new_writer(path=tmp_path / "file")
    with pytest.raises(StoreError, match="no gradtrace run"):
        new_writer(path=tmp_path / "full")
    with pytest.raises(StoreError, match="part of the path is a file"):
        new_writer(path=tmp_path / "file" / "run")
    with pytest.raises(StoreError, match="lost a slash"):
        new_writer(path=Path("s3://bucket/run.zarr"))
    with pytest.raises(StoreError, match="no place that runs can be at"):
        new_writer(path="ftp://host/run.zarr")


def test_an_empty_directory_and_missing_parents_are_fine(new_writer: Make, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for path in (tmp_path / "empty", tmp_path / "a" / "b" / "run"):
        new_writer(path=path).close()
        assert open_run(path).closed


@pytest.mark.parametrize("step", [3, 2])
def test_steps_must_increase(new_writer: Make, step: int) -> None:
    with new_writer(["w"]) as writer:
        writer.append(step_row(3, ["w"]))
        with pytest.raises(StoreError, match=f"Step {step} of 'steps' comes after step 3"):
            writer.append(step_row(step, ["w"]))
        writer.append(step_row(step, ["w"]), stream="probe/val")
    assert open_run(writer.path).committed == {"steps": 1, "probe/val": 1}


def _with(row: StepRow, **changes: Any) -> StepRow:
    return StepRow(**{**{name: getattr(row, name) for name in StepRow.__dataclass_fields__}, **changes})


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"parameters": {"fc1.wieght": parameter_row(0)}}, "fc1.weight"),
        ({"parameters": {"fc1.weight": parameter_row(0, groups=2)}}, "3 groups"),
        ({"parameters": {"fc1.weight": parameter_row(0, kinds=("curvature",))}}, "records gradient, activation"),
        ({"groups": ("all", "a", "a")}, "names a group twice"),
        ({"n_samples": np.ones(2, int)}, "n_samples has 2 entries"),
        ({"groups": ("all", "a", "\ud800")}, "lone surrogate"),
        ({"groups": ("all", "a", 3)}, "labels are strings"),
    ],
)
def test_wrong_rows_are_refused_where_they_are_handed_over(
    new_writer: Make, changes: dict[str, Any], complaint: str
) -> None:
    with new_writer() as writer:
        with pytest.raises(StoreError, match=complaint):
            writer.append(_with(step_row(0, ["fc1.weight"]), **changes))
        writer.append(step_row(0, ["fc1.weight"]))
    assert open_run(writer.path).committed == {"steps": 1}


def test_unknown_streams_parameters_and_attributes_are_refused(new_writer: Make) -> None:
    with new_writer() as writer:
        with pytest.raises(StoreError, match="no stream 'val'"):
            writer.append(step_row(0, []), stream="val")
        with pytest.raises(StoreError, match=r"Nearest: 'fc1\.bias'"):
            writer.update_parameter(ParameterInfo("fc1.bais", (3,)))
        with pytest.raises(StoreError, match=r"attrs\.model"):
            writer.update_attrs({"model": object()})
    with pytest.raises(StoreError, match="flush_every is 0"):
        new_writer(flush_every=0)


def test_nothing_can_be_added_after_close_and_closing_twice_is_fine(new_writer: Make) -> None:
    writer = new_writer(["w"])
    writer.append(step_row(0, ["w"]))
    writer.close()
    writer.close()
    with pytest.raises(StoreError, match="closed"):
        writer.append(step_row(1, ["w"]))
    assert open_run(writer.path).committed == {"steps": 1}


def test_flushed_rows_are_visible_and_others_are_not_yet(new_writer: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writer_module, "COMMIT_SECONDS", 1000.0)
    with new_writer(["w"]) as writer:
        assert open_run(writer.path).committed == {"steps": 0}
        assert len(open_run(writer.path).tree["step"]) == 0
        writer.append(step_row(0, ["w"]))
        writer.flush()
        writer.append(step_row(1, ["w"]))
        time.sleep(0.05)
        seen = open_run(writer.path)
        assert seen.committed == {"steps": 1}
        assert seen.stream().steps.tolist() == [0]
        writer.flush()
        assert seen.stream().read("w", "gradient").shape[0] == 1  # a run opened earlier stays as it was
        assert open_run(writer.path).stream().steps.tolist() == [0, 1]


def test_a_row_is_committed_after_a_while_without_being_asked(
    new_writer: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writer_module, "COMMIT_SECONDS", 0.05)
    with new_writer(["w"]) as writer:
        writer.append(step_row(0, ["w"]))
        deadline = time.monotonic() + 10
        while open_run(writer.path).committed["steps"] == 0 and time.monotonic() < deadline:
            time.sleep(0.01)
        assert open_run(writer.path).committed["steps"] == 1


def test_a_slow_disk_makes_append_wait_instead_of_growing_memory(
    new_writer: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    row_size = writer_module.row_bytes(step_row(0, ["w"]))
    monkeypatch.setattr(writer_module, "QUEUE_BYTES", 3 * row_size)
    put, held = files.Directory.put, []

    def slow(self: files.Directory, key: str, data: bytes) -> None:
        time.sleep(0.002)
        put(self, key, data)

    with new_writer(["w"], flush_every=1) as writer:
        monkeypatch.setattr(files.Directory, "put", slow)
        waited = 0.0
        for step in range(12):
            waited += writer.append(step_row(step, ["w"]))
            held.append(len(writer._queue))
        monkeypatch.setattr(files.Directory, "put", put)
    assert max(held) <= 3
    assert waited > 0.02
    assert open_run(writer.path).committed == {"steps": 12}


def _fail_with(code: int) -> Callable[..., None]:
    def put(self: files.Directory, key: str, data: bytes) -> None:
        raise OSError(code, os.strerror(code))

    return put


@pytest.mark.parametrize(
    ("code", "words"),
    [(errno.ENOSPC, "disk is full"), (errno.EROFS, "cannot be written to"), (errno.EIO, "Input/output error")],
)
def test_a_failing_disk_is_told_and_leaves_what_was_committed(
    new_writer: Make, monkeypatch: pytest.MonkeyPatch, code: int, words: str
) -> None:
    writer = new_writer(["w"])
    writer.append(step_row(0, ["w"]))
    writer.flush()
    monkeypatch.setattr(files.Directory, "put", _fail_with(code))
    writer.append(step_row(1, ["w"]))
    for call in (writer.flush, writer.close):
        with pytest.raises(StoreError, match=words) as caught:
            call()
        assert "1 steps committed" in str(caught.value)
    writer.close()  # told once
    run = open_run(writer.path)
    assert run.committed == {"steps": 1}
    assert not run.closed
    np.testing.assert_array_equal(run.stream().read("w", "gradient")[0], parameter_row(0).spectra["gradient"])


def test_what_waited_is_written_when_there_is_room_again(new_writer: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writer_module, "RETRY_SECONDS", 0.01)
    put, row_size = files.Directory.put, writer_module.row_bytes(step_row(0, ["w"]))
    monkeypatch.setattr(writer_module, "QUEUE_BYTES", 5 * row_size)
    with new_writer(["w"], flush_every=2) as writer:
        writer.append(step_row(0, ["w"]))
        writer.flush()
        monkeypatch.setattr(files.Directory, "put", _fail_with(errno.ENOSPC))
        for step in range(1, 5):
            writer.append(step_row(step, ["w"]))
        with pytest.raises(StoreError, match="disk is full"):
            writer.flush()
        assert "disk is full" in str(writer.trouble)
        for step in range(5, 30):
            assert writer.append(step_row(step, ["w"])) < 1.0, "training does not wait for a disk that is full"
        assert writer.lost > 15
        monkeypatch.setattr(files.Directory, "put", put)
        deadline = time.monotonic() + 10
        while writer.trouble and time.monotonic() < deadline:
            time.sleep(0.01)
        writer.append(step_row(30, ["w"]))
    steps = open_run(writer.path).stream().steps.tolist()
    assert steps[:5] == [0, 1, 2, 3, 4]
    assert steps[-1] == 30
    assert len(steps) == 31 - writer.lost
    for place, step in enumerate(steps):
        expected = parameter_row(1000 * step).spectra["gradient"]
        np.testing.assert_array_equal(open_run(writer.path).stream().read("w", "gradient")[place], expected)


def test_a_waiting_append_is_woken_when_the_disk_fails(new_writer: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writer_module, "QUEUE_BYTES", 1)
    writer = new_writer(["w"], flush_every=1)
    stuck = threading.Event()

    def put(self: files.Directory, key: str, data: bytes) -> None:
        stuck.wait(10)
        raise OSError(errno.ENOSPC, "full")

    monkeypatch.setattr(files.Directory, "put", put)
    writer.append(step_row(0, ["w"]))
    threading.Timer(0.05, stuck.set).start()

    for step in range(1, 10):
        assert writer.append(step_row(step, ["w"])) < 5
    assert writer.lost > 0
    with pytest.raises(StoreError, match="disk is full"):
        writer.close()


def test_a_disk_that_does_not_answer_is_not_waited_for_for_ever(
    new_writer: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writer_module, "QUEUE_BYTES", 1)
    monkeypatch.setattr(writer_module, "PATIENCE_SECONDS", 0.2)
    answers, put = threading.Event(), files.Directory.put
    with new_writer(["w"], flush_every=1) as writer:

        def hanging(self: files.Directory, key: str, data: bytes) -> None:
            answers.wait(60)
            put(self, key, data)

        monkeypatch.setattr(files.Directory, "put", hanging)
        began = time.monotonic()
        for step in range(20):
            writer.append(step_row(step, ["w"]))
        assert time.monotonic() - began < 10, "it is waited for once, and then not"
        assert "does not answer" in str(writer.trouble)
        lost = writer.lost
        assert lost >= 15
        answers.set()
        writer.flush()
        assert writer.trouble is None
        writer.append(step_row(20, ["w"]))
    assert open_run(writer.path).committed["steps"] == 21 - lost


def test_a_vanished_directory_is_told_and_not_brought_back(new_writer: Make) -> None:
    writer = new_writer(["w"])
    writer.append(step_row(0, ["w"]))
    writer.flush()
    shutil.rmtree(writer.path)
    writer.append(step_row(1, ["w"]))
    with pytest.raises(StoreError, match="vanished"):
        writer.close()
    assert not Path(writer.path).exists()


def test_the_users_own_error_is_not_replaced_by_the_stores(new_writer: Make) -> None:
    writer = new_writer(["w"])

    def train() -> None:
        with writer:
            shutil.rmtree(writer.path)
            writer.append(step_row(0, ["w"]))
            raise ZeroDivisionError("the user's")

    with pytest.raises(ZeroDivisionError, match="the user's") as caught:
        train()
    assert any("vanished" in note for note in caught.value.__notes__)


def test_a_closed_run_leaves_no_temporary_files_and_no_paths(new_writer: Make, tmp_path: Path) -> None:
    with new_writer(["w"], flush_every=2) as writer:
        for step in range(7):
            writer.append(step_row(step, ["w"]))
    assert not list(Path(writer.path).rglob("*.partial"))
    for document in Path(writer.path).rglob("zarr.json"):
        text = document.read_text()
        assert str(tmp_path) not in text
        assert str(os.getpid()) not in json.dumps(json.loads(text)["attributes"])


FORGETFUL = """
import sys
from gradtrace.store.writing.writer import RunWriter
from gradtrace.store.rows import KINDS
from tests.store.samples import infos, step_row
writer = RunWriter(sys.argv[1], attrs={}, kinds=KINDS, keep=None, parameters=infos(["w"]))
for step in range(5):
    writer.append(step_row(step, ["w"]))
{end}
"""


@pytest.mark.parametrize("end", ["", "raise SystemExit(0)", "del writer"])
def test_a_forgotten_writer_is_closed_when_the_interpreter_ends(tmp_path: Path, end: str) -> None:
    path = tmp_path / "run.zarr"
    ended = subprocess.run(
        [sys.executable, "-W", "error", "-c", FORGETFUL.replace("{end}", end), str(path)],
        capture_output=True,
        text=True,
    )
    assert (ended.returncode, ended.stderr) == (0, "")
    run = open_run(path)
    assert run.closed
    assert run.committed == {"steps": 5}


def test_a_forked_child_leaves_the_run_alone(new_writer: Make) -> None:
    with new_writer(["w"]) as writer:
        writer.append(step_row(0, ["w"]))
        writer.flush()
        writer._pid += 1  # what a forked child sees
        writer.close()
        writer._pid -= 1
        assert not open_run(writer.path).closed
    assert open_run(writer.path).closed


def test_the_store_is_written_without_zarr_xarray_or_torch(tmp_path: Path) -> None:
    check = FORGETFUL.replace("{end}", "print([m for m in ('torch', 'zarr', 'xarray') if m in sys.modules])")
    ended = subprocess.run(
        [sys.executable, "-c", check, str(tmp_path / "r")], capture_output=True, text=True, check=True
    )
    assert ended.stdout.strip() == "[]"


def test_kinds_not_recorded_stay_out(new_writer: Make) -> None:
    with new_writer(["w"], kinds=("gradient",)) as writer:
        row = StepRow(0, ("all",), np.array([2]), {"w": parameter_row(0, groups=1, kinds=("gradient",))})
        writer.append(row)
    run = open_run(writer.path)
    assert run.kinds == ("gradient",)
    assert not [name for name in run.stream().variables("w") if name.startswith(KINDS[1:])]
    assert [info.name for info in infos(["w"])] == list(run.parameters)
