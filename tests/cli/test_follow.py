"""`gradtrace query --follow` gives every row once, in the order of the steps, for as long as somebody writes."""

from __future__ import annotations

import csv
import io
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from gradtrace.cli import main
from gradtrace.store.places.keys import Directory
from gradtrace.store.places.lock import LOCK_KEY
from gradtrace.store.queries.follow import Follower
from gradtrace.store.queries.query import Record
from gradtrace.store.queries.selection import Query, Span
from gradtrace.store.rows import KINDS, StepRow
from gradtrace.store.writing.writer import RunWriter
from tests.store.samples import infos, step_row

Cli = Callable[..., Result]
NAMES = ("v", "w", "x")
REFERENCE = Path(__file__).parents[2] / "docs" / "reference" / "cli-query.md"


@pytest.fixture(autouse=True)
def often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gradtrace.store.queries.follow.POLL", 0.01)


def new_writer(path: Path, **options: object) -> RunWriter:
    about = {"attrs": {}, "kinds": KINDS, "keep": 64, "parameters": infos(NAMES), "flush_every": 4}
    return RunWriter(path, **{**about, **options})  # type: ignore[arg-type]


def row_of(step: int, generation: int = 0) -> StepRow:
    """Parameters and groups that join as steps go by; the epoch is the generation."""
    groups = ("all", "a", "b")[: 1 + step // 5]
    row = step_row(step + 1000 * generation, NAMES[: 1 + step // 7], groups=groups, epoch=float(generation))
    return StepRow(**{**vars(row), "step": step})


def write(writer: RunWriter, steps: Sequence[int], generation: int = 0, stream: str = "steps") -> None:
    for step in steps:
        writer.append(row_of(step, generation), stream=stream)


def expected(steps: Sequence[int], generation: int = 0) -> list[tuple[int, int, str, str]]:
    """(step, generation, parameter, group) of the rows of one metric and kind, in order."""
    rows = [(step, row_of(step)) for step in steps]
    return [(step, generation, name, group) for step, row in rows for name in row.parameters for group in row.groups]


@pytest.fixture
def beside(tmp_path: Path) -> Iterator[Callable[..., None]]:
    """Runs something in a thread, some time after now."""
    threads: list[threading.Thread] = []

    def start(work: Callable[[], None], after: float = 0.3) -> None:
        threads.append(threading.Timer(after, work))
        threads[-1].start()

    yield start
    for thread in threads:
        thread.join()


@pytest.mark.parametrize("form", ["csv", "tsv", "jsonl"])
def test_every_row_comes_once_and_in_order(cli: Cli, tmp_path: Path, beside: Callable[..., None], form: str) -> None:
    path = tmp_path / "run.zarr"
    writer = new_writer(path)
    write(writer, range(6))
    writer.flush()

    def go_on() -> None:
        for step in range(6, 21):
            write(writer, [step])
            if step % 3 == 0:
                writer.flush()
                time.sleep(0.05)
        writer.close()

    beside(go_on)
    result = cli("query", path, "--follow", "--metric", "nuclear", "--kind", "gradient", "--format", form)
    assert result.exit_code == 0
    assert "is closed: no more rows will come" in result.stderr
    if form == "jsonl":
        rows = [json.loads(line) for line in result.stdout.splitlines()]
    else:
        rows = list(csv.DictReader(io.StringIO(result.stdout), delimiter="," if form == "csv" else "\t"))
    found = [(int(row["step"]), int(float(row["epoch"])), row["parameter"], row["group"]) for row in rows]
    assert found == expected(range(21))
    plain = cli("query", path, "--metric", "nuclear", "--kind", "gradient", "--format", form).stdout.splitlines()
    assert sorted(result.stdout.splitlines()) == sorted(plain)


def test_a_run_is_waited_for(cli: Cli, tmp_path: Path, beside: Callable[..., None]) -> None:
    path = tmp_path / "run.zarr"

    def begin() -> None:
        with new_writer(path) as writer:
            write(writer, range(3))
            write(writer, [2], stream="probe/val")

    beside(begin)
    result = cli("query", path, "v", "--probe", "val", "--follow", "--csv", "--kind", "adjoint")
    assert result.exit_code == 0
    assert result.stderr.count("There is no run at") == 1
    assert [row["step"] for row in csv.DictReader(io.StringIO(result.stdout))] == ["2"] * 5


def test_names_that_are_not_there_yet_are_waited_for(cli: Cli, tmp_path: Path, beside: Callable[..., None]) -> None:
    path = tmp_path / "run.zarr"
    writer = new_writer(path)
    write(writer, range(4))
    writer.flush()

    def go_on() -> None:
        write(writer, range(4, 8))
        writer.close()

    beside(go_on)
    result = cli("query", path, "--follow", "--metric", "sigma1", "--group", "a", "--kind", "gradient", "--csv")
    assert [row["step"] for row in csv.DictReader(io.StringIO(result.stdout))] == ["5", "6", "7", "7"]
    assert result.stderr.count("There is no group 'a' in this run. Nearest: 'all'. Waiting for it.") == 1


def test_a_table_begins_with_the_last_step_and_grows(cli: Cli, tmp_path: Path, beside: Callable[..., None]) -> None:
    path = tmp_path / "run.zarr"
    writer = new_writer(path)
    write(writer, range(3))
    writer.flush()

    def go_on() -> None:
        write(writer, range(3, 6))
        writer.close()

    beside(go_on)
    result = cli("query", path, "--follow", "--kind", "gradient", "--components", 2)
    lines = [line.split() for line in result.stdout.splitlines()]
    assert lines[0] == ["step", "epoch", "parameter", "kind", "group", "sigma1", "sigma2", "status"]
    assert [line[0] for line in lines[1:]] == ["2", "3", "4", "5", "5"]
    assert len({line.rindex("measured") for line in result.stdout.splitlines()[1:]}) == 1, "columns are not aligned"
    assert "Showing the last step, then every step as it is committed" in result.stderr


def test_a_range_of_steps_ends_it(cli: Cli, tmp_path: Path) -> None:
    path = tmp_path / "run.zarr"
    with new_writer(path) as writer:
        write(writer, range(5))
        writer.flush()
        result = cli("query", path, "--follow", "--metric", "sigma1", "--step", "2:3", "--kind", "gradient", "--csv")
    assert [row["step"] for row in csv.DictReader(io.StringIO(result.stdout))] == ["2", "3"]
    assert "Step 4 is there" in result.stderr


def test_nothing_for_a_while_ends_it_where_that_is_asked_for(cli: Cli, tmp_path: Path) -> None:
    result = cli("query", tmp_path / "none", "--follow", "--timeout", 0.1, "--csv")
    assert result.exit_code == 3
    assert result.stdout == "step,epoch,parameter,kind,group,component,value,status\n"
    assert "There is no run at" in result.stderr
    assert "Nothing came for 0.1 s" in result.stderr
    with new_writer(tmp_path / "run.zarr") as writer:
        write(writer, range(2))
        writer.flush()
        result = cli("query", tmp_path / "run.zarr", "--follow", "--timeout", 0.1, "--format", "jsonl")
    assert result.exit_code == 0
    assert len(result.stdout.splitlines()) == 2 * 3 * 5


@pytest.mark.parametrize(
    "arguments", [["--json"], ["--format", "parquet", "-o", "x.parquet"], ["--timeout", "x"], ["--timeout", "-1"]]
)
def test_formats_that_have_an_end_are_refused(cli: Cli, run_path: Path, arguments: list[str]) -> None:
    assert cli("query", run_path, "--follow", *arguments).exit_code == 2
    assert cli("query", run_path, "--timeout", 3).exit_code == 2


def test_what_is_no_run_is_not_waited_for(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "zarr.json").write_text('{"zarr_format": 3, "node_type": "group", "attributes": {}}')
    result = cli("query", tmp_path, "--follow", "--csv")
    assert result.exit_code == 1
    assert "not a gradtrace run" in result.stderr
    result = cli("query", tmp_path / "zarr.json", "--follow", "--csv")
    assert result.exit_code == 1
    assert "zarr.json' is a file" in result.stderr


CHILD = """
import sys, time
from pathlib import Path
from tests.cli.test_follow import new_writer, write
writer = new_writer(Path(sys.argv[1]))
write(writer, range(10))
writer.flush()
print("there", flush=True)
time.sleep(600)
"""


@pytest.fixture
def writing(tmp_path: Path) -> Iterator[tuple[subprocess.Popen[str], Path]]:
    """A process that has written 10 steps and does not go on."""
    path = tmp_path / "run.zarr"
    child = subprocess.Popen([sys.executable, "-c", CHILD, str(path)], stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    assert child.stdout.readline() == "there\n"
    yield child, path
    child.kill()
    child.communicate()


def test_a_writer_that_was_killed_ends_it(cli: Cli, writing: tuple[subprocess.Popen[str], Path]) -> None:
    child, path = writing
    threading.Timer(0.5, child.kill).start()
    started = time.monotonic()
    result = cli("query", path, "v", "--follow", "--metric", "sigma1", "--kind", "gradient", "--group", "all", "--csv")
    assert result.exit_code == 0
    assert time.monotonic() - started > 0.4
    assert "is gone without having closed it, after 10 rows" in result.stderr
    assert len(result.stdout.splitlines()) == 1 + 10


def test_an_interrupt_ends_it_with_whole_lines_and_no_traceback(
    writing: tuple[subprocess.Popen[str], Path],
) -> None:
    code = "from gradtrace.cli import main; main()"
    command = [sys.executable, "-W", "error", "-c", code, "query", str(writing[1]), "-f", "--format", "jsonl"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as reader:
        assert reader.stdout is not None
        assert reader.stderr is not None
        lines = [reader.stdout.readline()]
        time.sleep(0.5)
        os.kill(reader.pid, signal.SIGINT)
        lines += reader.stdout.readlines()
        assert reader.stderr.read().strip() == "Interrupted."
    assert reader.returncode == 130
    rows = [row_of(step) for step in range(10)]
    assert len(list(map(json.loads, lines))) == sum(15 * len(row.groups) * len(row.parameters) for row in rows)


# ---------------------------------------------------------------------- look by look


def keys_of(found: Iterator[Record]) -> list[tuple[int, int, str, str]]:
    return [(r.step, int(r.epoch), r.parameter, r.group) for r in found if r.kind == "gradient"]


def leave(writer: RunWriter) -> None:
    """Let another writer go on without having closed the run."""
    writer.flush()
    writer._error = ("left", RuntimeError("left"))
    writer.close = lambda: None  # type: ignore[method-assign]
    with writer._changed:
        writer._stopping = True
        writer._changed.notify_all()
    writer._thread.join()
    (Path(writer.path) / LOCK_KEY).unlink()


def test_a_rewind_is_told_and_what_comes_then_is_new(tmp_path: Path) -> None:
    path, told = tmp_path / "run.zarr", list[str]()
    follower = Follower(Directory(path), Query(metrics=["sigma1"]), tell=told.append)
    writer = new_writer(path)
    write(writer, range(12))
    leave(writer)
    assert keys_of(follower.news()) == expected(range(12))
    writer = new_writer(path, resume=6)
    write(writer, range(6, 14), generation=1)
    leave(writer)
    assert keys_of(follower.news()) == expected(range(6, 14), 1)
    assert len(told) == 1
    assert "rows from step 6 on, which were given already, are no longer in it" in told[0]
    writer = new_writer(path, resume=13)  # twice between two looks, and behind what was given
    write(writer, range(13, 20), generation=2)
    leave(writer)
    with new_writer(path, resume=15) as writer:
        write(writer, range(15, 18), generation=3)
    assert keys_of(follower.news()) == expected([13, 14], 2) + expected(range(15, 18), 3)
    assert "rows from step 13 on" in told[1]
    assert follower.ended is not None
    assert len(told) == 2


def test_a_resume_that_gives_nothing_up_is_not_told(tmp_path: Path) -> None:
    path, told = tmp_path / "run.zarr", list[str]()
    follower = Follower(Directory(path), Query(metrics=["sigma1"]), tell=told.append)
    writer = new_writer(path)
    write(writer, range(5))
    leave(writer)
    assert keys_of(follower.news()) == expected(range(5))
    with new_writer(path, resume=True) as writer:
        assert keys_of(follower.news()) == []
        write(writer, range(5, 8))
    assert keys_of(follower.news()) == expected(range(5, 8))
    assert told == []


def test_a_rewind_while_its_rows_are_read_gives_none_of_them_wrong(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gradtrace.store.queries.query.BLOCK_VALUES", 1)  # a step at a time
    path, told = tmp_path / "run.zarr", list[str]()
    follower = Follower(Directory(path), Query(metrics=["sigma1"], kinds=["gradient"]), tell=told.append)
    writer = new_writer(path)
    write(writer, range(12))
    leave(writer)
    news = follower.news()
    begun = [next(news) for _ in expected(range(8))]
    assert keys_of(iter(begun)) == expected(range(8))
    with new_writer(path, resume=4) as writer:
        write(writer, range(4, 10), generation=1)
        assert keys_of(news) == []
    assert keys_of(follower.news()) == expected(range(4, 10), 1)
    assert "rows from step 4 on" in told[0]


def test_probes_are_rewound_with_the_run(tmp_path: Path) -> None:
    path, told = tmp_path / "run.zarr", list[str]()
    follower = Follower(Directory(path), Query(metrics=["sigma1"], probe="val"), tell=told.append)
    writer = new_writer(path)
    write(writer, range(8))
    assert keys_of(follower.news()) == []
    write(writer, [4, 8], stream="probe/val")
    leave(writer)
    assert keys_of(follower.news()) == expected([4, 8])
    with new_writer(path, resume=6) as writer:
        write(writer, range(6, 8), generation=1)
        write(writer, [8], generation=1, stream="probe/val")
    assert keys_of(follower.news()) == expected([8], 1)
    assert "rows from step 8 on" in told[-1]


def test_another_run_in_its_place_is_followed_from_its_beginning(tmp_path: Path) -> None:
    import shutil

    path, told = tmp_path / "run.zarr", list[str]()
    follower = Follower(Directory(path), Query(metrics=["sigma1"]), tell=told.append)
    writer = new_writer(path)
    write(writer, range(6))
    leave(writer)
    assert keys_of(follower.news()) == expected(range(6))
    shutil.rmtree(path)
    with new_writer(path) as writer:
        write(writer, range(3), generation=1)
    assert keys_of(follower.news()) == expected(range(3), 1)
    assert "rows from step 0 on" in told[0]
    shutil.rmtree(path)
    assert list(follower.news()) == []
    assert follower.ended is not None
    assert "was deleted" in follower.ended


def test_a_span_of_one_step_is_waited_for(tmp_path: Path) -> None:
    path = tmp_path / "run.zarr"
    follower = Follower(Directory(path), Query(metrics=["sigma1"], steps=Span(5, 5)), tell=list[str]().append)
    writer = new_writer(path)
    write(writer, range(3))
    writer.flush()
    assert keys_of(follower.news()) == []
    write(writer, range(3, 7))
    writer.close()
    assert keys_of(follower.news()) == expected([5])


def test_the_reference_shows_the_help_as_it_is() -> None:
    done = CliRunner().invoke(main, ["query", "--help"], terminal_width=80, prog_name="gradtrace")
    assert f"```text\n{done.stdout}```" in REFERENCE.read_text()
    assert "-f, --follow " in done.stdout
