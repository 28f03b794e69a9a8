"""A run that goes on: after a kill, after it was closed, and from an earlier step."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gradtrace.errors import StoreError
from gradtrace.store.places.keys import Directory, Memory
from gradtrace.store.places.lock import LOCK_KEY, Holder
from gradtrace.store.reading.opened import open_run
from gradtrace.store.reading.reader import Run
from gradtrace.store.rows import ParameterInfo, StepRow
from gradtrace.store.writing.writer import RunWriter
from tests.store.samples import parameter_row, step_row

Make = Callable[..., RunWriter]


def kill(writer: RunWriter) -> None:
    """What a kill leaves of a writer: no thread and no closing, and a lock of a process that is gone."""
    writer._error = ("killed", RuntimeError("killed"))
    with writer._changed:
        writer._stopping = True
        writer._changed.notify_all()
    writer._thread.join()
    writer._closed = True
    lock = Path(writer.path) / LOCK_KEY
    gone = json.loads(lock.read_text())
    lock.write_text(json.dumps({**gone, "process": 2**22 + 1, "token": "gone"}))


def groups_of(step: int) -> tuple[str, ...]:
    return ("all", "a", "b", "c", "d")[: 2 + step // 6]


def names_of(step: int) -> tuple[str, ...]:
    return ("v", "w", "x")[: 1 + step // 5]


def row_of(step: int, generation: int = 0) -> StepRow:
    """Groups and parameters that join as steps go by; another generation has other numbers."""
    return step_row(step + 1000 * generation, names_of(step), groups=groups_of(step), width=1 + step % 6)


def write(writer: RunWriter, steps: Sequence[int], generation: int = 0) -> None:
    for step in steps:
        row = row_of(step, generation)
        writer.append(StepRow(**{**vars(row), "step": step}))


def check(run: Run, generations: Sequence[int]) -> None:
    """Every row is of the generation that wrote it last, to the last number, and nothing else is there."""
    stream = run.stream()
    assert stream.steps.tolist() == list(range(len(generations)))
    for name in stream.places:
        values, status = stream.read(name, "gradient"), stream.read(name, "status")
        for step, generation in enumerate(generations):
            groups = len(groups_of(step))
            if name not in names_of(step):
                assert np.isnan(values[step]).all()
                assert (status[step] == 0).all()
                continue
            expected = row_of(step, generation).parameters[name].spectra["gradient"]
            np.testing.assert_array_equal(values[step, :groups, : expected.shape[1]], expected)
            assert np.isnan(values[step, groups:]).all()
            assert np.isnan(values[step, :, expected.shape[1] :]).all()
            assert (status[step, :groups] == 1).all()
            assert (status[step, groups:] == 0).all()


NAMES = ("v", "w", "x")


@pytest.mark.parametrize("end", [0, 1, 3, 4, 7, 8, 13])
@pytest.mark.parametrize("closed", [True, False])
def test_a_run_goes_on_where_it_ended(new_writer: Make, end: int, closed: bool) -> None:
    writer = new_writer(NAMES, flush_every=4)
    write(writer, range(end))
    if closed:
        writer.close()
    else:
        writer.flush()
        kill(writer)
    with new_writer(NAMES, flush_every=4, resume=True) as writer:
        assert writer.past is not None
        assert writer.past.next_step == end
        assert not open_run(writer.path).closed
        write(writer, range(end, 20))
    check(open_run(writer.path), [0] * 20)
    assert open_run(writer.path).closed
    assert open_run(writer.path).attrs["segments"] == [{"step": end, "row": end, "rewound": False}]


@pytest.mark.parametrize("uncommitted", [1, 5, 9])
def test_rows_that_were_never_committed_are_gone(new_writer: Make, uncommitted: int) -> None:
    """Their chunks may be there: they must not show when the run grows over them."""
    writer = new_writer(NAMES, flush_every=4)
    write(writer, range(6))
    writer.flush()
    root = (Path(writer.path) / "zarr.json").read_bytes()
    write(writer, range(6, 6 + uncommitted), generation=5)
    writer.flush()
    kill(writer)
    (Path(writer.path) / "zarr.json").write_bytes(root)
    (Path(writer.path) / "steps" / ".c.0.123.partial").write_bytes(b"half")
    with new_writer(NAMES, flush_every=4, resume=True) as writer:
        assert not list(Path(writer.path).rglob("*.partial"))
        write(writer, range(6, 7), generation=1)
        # steps without this parameter, where an old chunk had numbers
        empty = StepRow(7, ("all",), np.array([3]), {})
        writer.append(empty)
    values = open_run(writer.path).stream().read("v", "gradient")
    assert np.isfinite(values[6, :2]).any()
    assert np.isnan(values[7]).all()
    check_until = open_run(writer.path).stream().steps.tolist()
    assert check_until == list(range(8))


@pytest.mark.parametrize("step", [0, 1, 4, 6, 11, 12, 40])
def test_a_run_is_rewound_to_a_step(new_writer: Make, step: int) -> None:
    with new_writer(NAMES, flush_every=4) as writer:
        write(writer, range(12))
    with new_writer(NAMES, flush_every=4, resume=step) as writer:
        kept = min(step, 12)
        assert open_run(writer.path).committed == {"steps": kept}
        check(open_run(writer.path), [0] * kept)
        write(writer, range(kept, 15), generation=1)
    check(open_run(writer.path), [0] * kept + [1] * (15 - kept))
    assert open_run(writer.path).attrs["segments"][0]["rewound"] is (step < 12)


def test_a_rewound_run_that_is_killed_at_once_is_whole(new_writer: Make) -> None:
    with new_writer(NAMES, flush_every=4) as writer:
        write(writer, range(12))
    kill(new_writer(NAMES, flush_every=4, resume=6))
    check(open_run(writer.path), [0] * 6)
    with new_writer(NAMES, flush_every=4, resume=True) as writer:
        write(writer, range(6, 9), generation=2)
    check(open_run(writer.path), [0] * 6 + [2] * 3)


def test_probes_go_on_and_are_rewound_too(new_writer: Make) -> None:
    with new_writer(["w"], flush_every=4) as writer:
        for step in range(9):
            writer.append(step_row(step, ["w"]))
            if step % 3 == 2:
                writer.append(step_row(step + 1, ["w"]), stream="probe/a/b")
    with new_writer(["w"], flush_every=4, resume=6) as writer:
        writer.append(step_row(6, ["w"]))
        writer.append(step_row(7, ["w"]), stream="probe/a/b")
    run = open_run(writer.path)
    assert run.stream("a/b").steps.tolist() == [3, 6, 7]
    expected = [parameter_row(1000 * step).spectra["gradient"] for step in (3, 6, 7)]
    np.testing.assert_array_equal(run.stream("a/b").read("w", "gradient"), expected)


def test_where_nothing_is_yet_a_run_begins(new_writer: Make, tmp_path: Path) -> None:
    """The same script starts a run and goes on with it."""
    with new_writer(["w"], resume=True) as writer:
        assert writer.past is None
        writer.append(step_row(0, ["w"]))
    assert "segments" not in open_run(writer.path).attrs


def test_a_run_that_was_killed_before_its_first_commit_begins_anew(new_writer: Make, tmp_path: Path) -> None:
    writer = new_writer(["w"])
    kill(writer)
    (Path(writer.path) / "zarr.json").unlink()
    with new_writer(["w"]) as writer:
        writer.append(step_row(0, ["w"]))
    assert open_run(writer.path).committed == {"steps": 1}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"kinds": ("gradient",)}, r"kinds was \['gradient', 'activation', 'adjoint'\] and is \['gradient'\]"),
        ({"keep": None}, "keep was 64 and is None"),
    ],
)
def test_other_kinds_or_widths_are_refused(new_writer: Make, options: dict[str, Any], words: str) -> None:
    new_writer(["w"]).close()
    with pytest.raises(StoreError, match=words):
        new_writer(["w"], resume=True, **options)
    new_writer(["w"], resume=True).close()


def test_a_parameter_of_another_shape_is_refused_or_begins_a_segment(new_writer: Make) -> None:
    with new_writer(["w"]) as writer:
        writer.append(step_row(0, ["w"]))
    other = ParameterInfo("w", (7, 3))
    with (
        new_writer(["w"], resume=True) as writer,
        pytest.raises(StoreError, match=r"has shape \(7, 3\) and had \(11, 5\)"),
    ):
        writer.add_parameter(other)
    with new_writer(["w"], resume=True, changed=True, attrs={"seed": 8}) as writer:
        writer.add_parameter(other)
        writer.append(step_row(1, ["w"], width=30))
    run = open_run(writer.path)
    assert run.parameters["w"].shape == (7, 3)
    assert run.attrs["seed"] == 7
    assert run.attrs["segments"][-1] == {"step": 1, "row": 1, "rewound": False, "seed": 8}
    assert run.stream().read("w", "gradient").shape == (2, 3, 30)


def test_a_newer_minor_schema_is_read_but_not_gone_on_with(new_writer: Make) -> None:
    with new_writer(["w"]) as writer:
        writer.append(step_row(0, ["w"]))
    root = Path(writer.path) / "zarr.json"
    root.write_text(root.read_text().replace('"gradtrace_schema":"1.', '"gradtrace_schema":"1.9'))
    assert open_run(writer.path).committed == {"steps": 1}
    with pytest.raises(StoreError, match="Install a newer gradtrace"):
        new_writer(["w"], resume=True)


# ---------------------------------------------------------------------- one writer


def test_a_second_writer_is_kept_out_and_told_who_writes(new_writer: Make) -> None:
    with new_writer(["w"]) as writer:
        for resume in (False, True, 0):
            with pytest.raises(StoreError, match=r"is being written by this process.*Close the other recorder"):
                new_writer(["w"], resume=resume)
        writer.append(step_row(0, ["w"]))
    assert open_run(writer.path).committed == {"steps": 1}
    assert not (Path(writer.path) / LOCK_KEY).exists(), "a closed run has no lock"


def held_by(path: str, **changes: Any) -> None:
    holder = vars(Holder.here()) | changes
    (Path(path) / LOCK_KEY).write_text(json.dumps(holder))


@pytest.mark.parametrize(
    ("changes", "alive"),
    [
        ({"process": os.getppid(), "started": 1.0}, False),  # a number that was given again
        ({"process": 2**22 + 1}, False),
        ({"machine": "elsewhere"}, True),
        ({"machine": "elsewhere", "beat": 1.0}, False),
    ],
)
def test_locks_of_the_dead_are_told_from_those_of_the_living(
    new_writer: Make, changes: dict[str, Any], alive: bool
) -> None:
    writer = new_writer(["w"])
    writer.close()
    held_by(writer.path, **changes)
    if alive:
        with pytest.raises(StoreError, match=r"on another machine \(last sign of life 0 s ago\).*wait until 60 s"):
            new_writer(["w"], resume=True)
    else:
        new_writer(["w"], resume=True).close()


def test_a_writer_whose_lock_was_taken_stops(new_writer: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    writer = new_writer(["w"])
    writer.append(step_row(0, ["w"]))
    writer.flush()
    held_by(writer.path)
    writer.append(step_row(1, ["w"]))
    with pytest.raises(StoreError, match="Another process has taken over"):
        writer.close()
    assert open_run(writer.path).committed == {"steps": 1}
    assert (Path(writer.path) / LOCK_KEY).exists(), "it is somebody else's"


def test_no_name_of_a_host_or_user_is_in_a_lock(new_writer: Make) -> None:
    import getpass
    import platform

    with new_writer(["w"]) as writer:
        text = (Path(writer.path) / LOCK_KEY).read_text()
    for name in (platform.node(), getpass.getuser()):
        assert len(name) < 3 or name not in text


def test_of_several_that_come_at_once_one_writes(tmp_path: Path) -> None:
    from concurrent.futures import ThreadPoolExecutor

    keys = Directory(tmp_path / "run")
    keys.begin()
    with ThreadPoolExecutor(8) as pool:
        for count in range(30):
            assert sum(pool.map(lambda i, c=count: keys.put_new(f"new{c}", str(i).encode()), range(8))) == 1
            old = keys.get(f"new{count}") or b""
            swapped = list(pool.map(lambda i, c=count, o=old: keys.swap(f"new{c}", o, b"x"), range(8)))
            assert sum(swapped) == 1
            assert keys.get(f"new{count}") == b"x"
    assert sorted(keys.list()) == sorted(f"new{count}" for count in range(30))


@pytest.mark.parametrize("kind", ["directory", "memory"])
def test_keys(tmp_path: Path, kind: str) -> None:
    keys = Directory(tmp_path / "a b" / "ü") if kind == "directory" else Memory(str(tmp_path))
    assert not keys.exists()
    keys.begin()
    keys.make("x/y")
    keys.put("x/y/k", b"1")
    assert keys.get("x/y/k") == b"1"
    assert keys.get("x/none") is None
    assert not keys.put_new("x/y/k", b"2")
    assert keys.put_new("x/n", b"2")
    assert not keys.swap("x/n", b"1", b"3")
    assert not keys.swap("x/none", b"1", b"3")
    assert keys.swap("x/n", b"2", b"3")
    assert sorted(keys.list()) == ["x/n", "x/y/k"]
    assert sorted(keys.list("x/y/")) == ["x/y/k"]
    assert keys.swap("x/n", b"3", None)
    keys.delete("x/y/k")
    keys.delete("x/y/k")
    assert list(keys.list()) == []


def test_a_run_in_memory() -> None:
    with RunWriter("memory://here", attrs={}, kinds=("gradient",), keep=3, parameters=[]) as writer:
        writer.append(StepRow(0, ("all",), np.array([3]), {}))
    assert open_run("memory://here").stream().steps.tolist() == [0]
    with pytest.raises(StoreError, match="There is no run"):
        open_run("memory://elsewhere")


def test_a_file_url_is_a_directory(new_writer: Make, tmp_path: Path) -> None:
    path = tmp_path / "with space ü"
    with new_writer(["w"], path=path.as_uri()) as writer:
        writer.append(step_row(0, ["w"]))
    assert open_run(path).committed == open_run(path.as_uri()).committed == {"steps": 1}
