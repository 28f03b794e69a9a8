"""Commands beside a writer see one commit at a time, also where rows are given up meanwhile."""

from __future__ import annotations

import csv
import io
import json
import subprocess
import sys
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from gradtrace.cli import main
from gradtrace.errors import StoreError
from gradtrace.store.places.keys import Directory
from gradtrace.store.queries.query import records
from gradtrace.store.queries.selection import Query, select
from gradtrace.store.reading.snapshot import Rewound, Snapshot, consistent
from gradtrace.store.rows import KINDS, StepRow
from gradtrace.store.writing.writer import RunWriter
from tests.store.samples import parameter_row, step_row

NAMES = ("v", "w")
SECONDS = 12.0

# The epoch says which generation wrote a row, and the values follow from step and generation.
CHILD = """
import random, sys, time
from gradtrace.store.writing.writer import RunWriter
from gradtrace.store.rows import KINDS, StepRow
from tests.store.samples import infos, step_row
path, generations = sys.argv[1], int(sys.argv[2])
names, chance, start, end = ["v", "w"], random.Random(0), 0, 0
for generation in range(generations):
    resume = start if generation else False
    about = {"attrs": {}, "kinds": KINDS, "keep": 16, "parameters": infos(names)}
    with RunWriter(path, flush_every=4, resume=resume, **about) as writer:
        end = start + (chance.randrange(3, 40) if generations > 1 else 100_000)
        for step in range(start, end):
            row = step_row(step + 1000 * generation, names, epoch=float(generation))
            writer.append(StepRow(**{**vars(row), "step": step}))
            if step % 4 == 3:
                writer.flush()
                print(step, flush=True)
    time.sleep(chance.uniform(0, 0.2))
    start = chance.randrange(max(0, end - 30), end)
"""


@pytest.fixture
def child(tmp_path: Path) -> object:
    started: list[subprocess.Popen[str]] = []

    def start(generations: int) -> subprocess.Popen[str]:
        command = [sys.executable, "-c", CHILD, str(tmp_path / "run.zarr"), str(generations)]
        started.append(subprocess.Popen(command, stdout=subprocess.PIPE, text=True))
        assert started[0].stdout is not None
        started[0].stdout.readline()
        return started[0]

    yield start
    for process in started:
        process.kill()
        process.communicate()


def table(*arguments: object) -> list[dict[str, str]]:
    done = CliRunner().invoke(main, [*map(str, arguments), "--csv"], catch_exceptions=False)
    assert done.exit_code in (0, 3), done.output
    return list(csv.DictReader(io.StringIO(done.stdout)))


@cache
def expected(step: int, generation: int, name: str, kind: str) -> list[list[float]]:
    row = parameter_row(1000 * (step + 1000 * generation) + NAMES.index(name))
    return [list(map(float, spectrum)) for spectrum in row.spectra[kind].astype("U32")]


def check(rows: list[dict[str, str]], groups: tuple[str, ...] = ("all", "diagnosis=HC", "diagnosis=SZ")) -> list[int]:
    """The generation of each step: every value is right, none is missing, and all parameters agree."""
    found: dict[tuple[int, str, str, str], list[float]] = {}
    generations: dict[int, int] = {}
    for row in rows:
        step, generation = int(row["step"]), int(float(row["epoch"]))
        assert generations.setdefault(step, generation) == generation
        found.setdefault((step, row["parameter"], row["kind"], row["group"]), []).append(float(row["value"]))
    assert sorted(generations) == list(range(len(generations)))
    assert len(found) == len(generations) * len(NAMES) * len(KINDS) * len(groups)
    for (step, name, kind, group), values in found.items():
        assert values == expected(step, generations[step], name, kind)[groups.index(group)]
    order = [generations[step] for step in sorted(generations)]
    assert order == sorted(order)
    return order


def test_queries_beside_a_writer_see_whole_commits_and_ever_more_of_them(
    child: Callable[[int], subprocess.Popen[str]], tmp_path: Path
) -> None:
    process, path = child(1), tmp_path / "run.zarr"
    seen, listed = [], []
    end = time.monotonic() + SECONDS / 2
    while time.monotonic() < end:
        seen.append(len(check(table("query", path))))
        rows = table("ls", path)
        assert [row["parameter"] for row in rows] == list(NAMES)
        assert {(row["steps"], row["groups"], row["components"]) for row in rows} == {(rows[0]["steps"], "3", "5")}
        listed.append(int(rows[0]["steps"]))
    assert process.poll() is None
    assert len(set(seen)) >= 3
    both = [number for pair in zip(seen, listed, strict=True) for number in pair]
    assert both == sorted(both)


def test_queries_beside_rewinds_see_one_commit_each(
    child: Callable[[int], subprocess.Popen[str]], tmp_path: Path
) -> None:
    process, path = child(100_000), tmp_path / "run.zarr"
    seen = []
    end = time.monotonic() + SECONDS
    while time.monotonic() < end:
        seen.append(check(table("query", path)))
        rows = table("ls", path)
        assert {(row["steps"], row["groups"]) for row in rows} in ({(rows[0]["steps"], "3")}, {("0", "0")})
        done = CliRunner().invoke(main, ["info", str(path), "--json"], catch_exceptions=False)
        about = json.loads(done.stdout)
        counted = about["recorded"]["rows of steps"] * len(NAMES) * 3
        assert about["status"] == {kind: {"measured": counted} if counted else {} for kind in KINDS}
    assert process.poll() is None
    assert len({len(order) for order in seen}) >= 3
    generations = [order[-1] for order in seen if order]
    assert generations[-1] > generations[0] + 3, "there were too few rewinds for a test"


def write(writer: RunWriter, steps: range, generation: int = 0) -> None:
    for step in steps:
        row = step_row(step + 1000 * generation, NAMES, epoch=float(generation))
        writer.append(StepRow(**{**vars(row), "step": step}))


@pytest.fixture
def keys(new_writer: Callable[..., RunWriter]) -> Directory:
    with new_writer(NAMES, flush_every=4) as writer:
        write(writer, range(12))
    return Directory(Path(writer.path))


def test_what_is_read_of_a_rewound_run_is_refused(new_writer: Callable[..., RunWriter], keys: Directory) -> None:
    snapshot = Snapshot(keys)
    assert snapshot.holds
    with new_writer(NAMES, flush_every=4, resume=6) as writer:
        write(writer, range(6, 20), generation=1)
    assert not snapshot.holds
    with pytest.raises(Rewound, match="rewound to an earlier step"), snapshot.whole():
        snapshot.run.stream().read("v", "gradient")
    found = []
    with pytest.raises(Rewound):
        found += records(select(snapshot.run, Query()), snapshot.whole)
    assert found == []


def test_damage_that_a_rewind_made_is_not_called_damage(new_writer: Callable[..., RunWriter], keys: Directory) -> None:
    snapshot = Snapshot(keys)
    new_writer(NAMES, flush_every=4, resume=3).close()
    with pytest.raises(StoreError, match="damaged"):
        _ = snapshot.run.stream().steps
    with pytest.raises(Rewound), snapshot.whole():
        _ = snapshot.run.stream().steps


def test_a_run_that_only_grows_stays_readable(new_writer: Callable[..., RunWriter], keys: Directory) -> None:
    snapshot = Snapshot(keys)
    with new_writer(NAMES, flush_every=4, resume=True) as writer:
        assert snapshot.holds
        write(writer, range(12, 15), generation=3)
    with snapshot.whole():
        values = snapshot.run.stream().read("v", "gradient")
    assert len(values) == 12
    np.testing.assert_array_equal(values[11], parameter_row(11_000).spectra["gradient"])


def test_a_run_that_was_deleted_or_replaced_does_not_hold(
    new_writer: Callable[..., RunWriter], keys: Directory
) -> None:
    first = Snapshot(keys)
    other = new_writer(NAMES, path=Path(keys.name).with_name("other.zarr"))
    write(other, range(3))
    other.close()
    root = (Path(other.path) / "zarr.json").read_bytes()
    (keys.root / "zarr.json").write_bytes(root)
    assert not first.holds
    (keys.root / "zarr.json").write_bytes(b'{"attributes": {}}')
    assert not first.holds
    (keys.root / "zarr.json").unlink()
    assert not first.holds


def test_it_is_looked_again_until_nothing_was_given_up(
    new_writer: Callable[..., RunWriter], keys: Directory, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = iter((9, 6))

    def look(snapshot: Snapshot) -> int:
        for step in steps:
            new_writer(NAMES, flush_every=4, resume=step).close()
            break
        return len(snapshot.run.stream().steps)

    assert consistent(keys, look) == 6
    monkeypatch.setattr("gradtrace.store.reading.snapshot.ATTEMPTS", 3)
    endless = iter((5, 4, 3))
    with pytest.raises(StoreError, match="again and again"):
        consistent(keys, lambda snapshot: new_writer(NAMES, flush_every=4, resume=next(endless)).close())
