"""Whatever is done to a run, in whatever order: what was committed is there, and nothing else."""

from __future__ import annotations

import json
import shutil
import tempfile
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from gradtrace.store.archives.compact import compact
from gradtrace.store.places.keys import Directory
from gradtrace.store.places.lock import LOCK_KEY
from gradtrace.store.places.orphans import orphans
from gradtrace.store.reading.opened import open_run
from gradtrace.store.reading.reader import Run
from gradtrace.store.rows import KINDS, Status, StepRow
from gradtrace.store.writing import writer as writer_module
from gradtrace.store.writing.past import Past
from gradtrace.store.writing.writer import RunWriter
from tests.store.samples import infos, parameter_row

GROUPS = ("all", "diagnosis=HC", "diagnosis=SZ", "ort=Köln / Süd", "site=1", "site=2", "site=3")
NAMES = ("fc.weight", "fc.bias", "a/b c.ü", "late")
WIDTHS = (1, 3, 16, 17)


class Lives(RuleBasedStateMachine):
    """A run with writers that come and go; `rows` is what it should hold, `committed` how much of that is safe."""

    @initialize(flush_every=st.sampled_from([1, 3, 4, 8]))
    def begin(self, flush_every: int) -> None:
        self.folder = Path(tempfile.mkdtemp())
        self.path = self.folder / "a run"
        self.flush_every, self.seed = flush_every, 0
        self.rows: list[StepRow] = []
        self.committed = 0
        self.writer: RunWriter | None = self.opened(False)

        # by time nothing is committed, or chance would decide what a kill takes away
        self.patch = pytest.MonkeyPatch()
        self.patch.setattr(writer_module, "COMMIT_SECONDS", 1e6)

    def opened(self, resume: bool | int) -> RunWriter:
        return RunWriter(
            self.path, attrs={}, kinds=KINDS, keep=16, parameters=infos(NAMES), flush_every=self.flush_every,
            resume=resume,
        )  # fmt: skip

    # ------------------------------------------------------------------ what may happen

    @precondition(lambda self: self.writer is not None)
    @rule(
        count=st.integers(1, 5),
        gap=st.integers(1, 3),
        groups=st.sets(st.sampled_from(GROUPS), min_size=1),
        names=st.sets(st.sampled_from(NAMES)),
        width=st.sampled_from(WIDTHS),
    )
    def write(self, count: int, gap: int, groups: set[str], names: set[str], width: int) -> None:
        for _ in range(count):
            self.seed += 1
            present = tuple(sorted(groups))
            parameters = {
                name: parameter_row(1000 * self.seed + i, groups=len(present), width=width)
                for i, name in enumerate(sorted(names))
            }
            step = self.rows[-1].step + gap if self.rows else gap - 1
            row = StepRow(step, present, np.arange(1, len(present) + 1) + self.seed, parameters, loss=float(self.seed))
            assert self.writer is not None
            self.writer.append(row)
            self.rows.append(row)

    @precondition(lambda self: self.writer is not None)
    @rule()
    def flush(self) -> None:
        assert self.writer is not None
        self.writer.flush()
        self.committed = len(self.rows)

    @precondition(lambda self: self.writer is not None)
    @rule()
    def close(self) -> None:
        assert self.writer is not None
        self.writer.close()
        self.committed, self.writer = len(self.rows), None
        assert open_run(self.path).closed
        assert not (self.path / LOCK_KEY).exists()
        keys = Directory(self.path)
        assert list(orphans(keys.list(), Past(keys, None).members)) == []

    @precondition(lambda self: self.writer is not None)
    @rule(half=st.booleans())
    def kill(self, half: bool) -> None:
        """The thread is gone, and what was not committed; the lock is left, and perhaps a half-written file."""
        writer, self.writer = self.writer, None
        assert writer is not None
        while writer._queue or writer._commit.pending >= self.flush_every:
            time.sleep(0.001)
        writer._commit.commit = lambda *_, **__: None  # type: ignore[method-assign]
        with writer._changed:
            writer._error, writer._stopping = ("killed", RuntimeError("killed")), True
            writer._changed.notify_all()
        writer._thread.join()
        writer._closed = True
        lock = json.loads((self.path / LOCK_KEY).read_text())
        (self.path / LOCK_KEY).write_text(json.dumps({**lock, "token": "gone", "process": 2**22 + 1}))
        if half:
            (self.path / "steps" / ".c.0.0123.partial").write_bytes(b"half")
        kept = open_run(self.path).committed["steps"]
        assert self.committed <= kept <= len(self.rows)
        assert kept == len(self.rows) - (len(self.rows) - self.committed) % self.flush_every
        self.committed = kept
        del self.rows[kept:]

    @precondition(lambda self: self.writer is None)
    @rule()
    def resume(self) -> None:
        self.writer = self.opened(True)
        assert self.writer.past is not None
        assert self.writer.past.next_step == (self.rows[-1].step + 1 if self.rows else 0)

    @precondition(lambda self: self.writer is None)
    @rule(data=st.data())
    def rewind(self, data: st.DataObject) -> None:
        last = self.rows[-1].step if self.rows else 0
        step = data.draw(st.integers(0, last + 2))
        self.writer = self.opened(step)
        self.rows = [row for row in self.rows if row.step < step]
        self.committed = len(self.rows)
        assert open_run(self.path).committed["steps"] == self.committed

    @precondition(lambda self: self.writer is None)
    @rule()
    def compact(self) -> None:
        """The archive holds what the run does, and the run can be gone on with."""
        archive = self.folder / "archive"
        compact(self.path, archive)
        check(open_run(archive), self.rows)
        shutil.rmtree(archive)

    # ------------------------------------------------------------------ what always holds

    @invariant()
    def what_is_read_is_right(self) -> None:
        if not hasattr(self, "path"):
            return
        run = open_run(self.path)
        count = run.committed["steps"]
        assert self.committed <= count <= len(self.rows)
        check(run, self.rows[:count])

    def teardown(self) -> None:
        if getattr(self, "writer", None) is not None:
            assert self.writer is not None
            self.writer.close()
            check(open_run(self.path), self.rows)
        if hasattr(self, "folder"):
            self.patch.undo()
            shutil.rmtree(self.folder)


def check(run: Run, rows: list[StepRow]) -> None:
    """Every number of a run is that of its row, and where rows have none there is none."""
    stream = run.stream()
    assert stream.steps.tolist() == [row.step for row in rows]
    assert stream.per_step("loss").tolist() == [row.loss for row in rows]
    for name in stream.places:
        values = {v: stream.read(name, v) for v in ("gradient", "adjoint_status", "nuclear", "inner_product")}
        for place, row in enumerate(rows):
            here = {v: found[place] for v, found in values.items()}
            measured = row.parameters.get(name)
            if measured is None:
                assert np.isnan(here["gradient"]).all()
                assert (here["adjoint_status"] == Status.GROUP_ABSENT).all()
                continue
            at = [stream.groups.index(group) for group in row.groups]
            spectra = measured.spectra["gradient"][:, :16]
            np.testing.assert_array_equal(here["gradient"][at][:, : spectra.shape[1]], spectra)
            nuclear = measured.metrics["gradient"]["nuclear"].astype(np.float32)
            np.testing.assert_array_equal(here["nuclear"][at], nuclear)
            np.testing.assert_array_equal(
                here["inner_product"][np.ix_(at, at)], measured.inner_product.astype(np.float32)
            )
            others = np.setdiff1d(np.arange(len(stream.groups)), at)
            assert np.isnan(here["gradient"][others]).all()
            assert np.isnan(here["gradient"][at][:, spectra.shape[1] :]).all()
            assert (here["adjoint_status"][others] == Status.GROUP_ABSENT).all()


Lives.TestCase.settings = settings(max_examples=20, stateful_step_count=25, deadline=None)
TestLives = Lives.TestCase
