"""Writes a run while it goes on: rows are handed over cheaply, a thread of our own brings them to disk."""

from __future__ import annotations

import atexit
import os
import threading
import time
from collections import deque
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any, Self

from gradtrace.errors import StoreError, nearest
from gradtrace.store.places.lock import BEAT
from gradtrace.store.places.place import Where, explain, keys_at, may_pass
from gradtrace.store.rows import ParameterInfo, StepRow
from gradtrace.store.schema import MAIN_STREAM
from gradtrace.store.writing.checks import check_row, row_bytes, stream_path
from gradtrace.store.writing.commit import Commit
from gradtrace.store.writing.entry import TRACED, Recorded, digest, enter

QUEUE_BYTES = 64 << 20
COMMIT_SECONDS = 5.0
PATIENCE_SECONDS = 60.0  # that training waits for a disk that does nothing at all
RETRY_SECONDS = 5.0  # between two attempts where a disk is full, say


class RunWriter:
    """A run being written. Use it as a context manager, or call `close()`.

    path: of a directory, or a URL (see `gradtrace.store.places.place`). resume: go on with the run that is there, if
    one is; a number gives up what it holds of that step and later ones. shapes: of all parameters that rows may
    name, compared with those of the run that is gone on with; changed: go on though they are others.

    Rows become visible to readers in commits: every `flush_every` rows, after COMMIT_SECONDS at the latest, and on
    `flush()`. When the disk is slower than the training, `append` waits rather than letting memory grow: until a block
    is written, or for PATIENCE_SECONDS. While a disk is full or does not answer, rows wait, at most QUEUE_BYTES of
    them, and `trouble` says why; what comes on top is lost, and `lost` counts it. When writing fails for good, what was
    committed stays readable, and every later call says why by a StoreError, from which training can go on. Arrays
    handed over must not be changed afterwards.
    """

    def __init__(
        self,
        path: Where,
        *,
        attrs: Mapping[str, Any],
        kinds: Sequence[str],
        keep: int | None,
        parameters: Sequence[ParameterInfo],
        flush_every: int = 64,
        resume: bool | int = False,
        changed: bool = False,
        shapes: Mapping[str, Sequence[int]] | None = None,
    ) -> None:
        if flush_every < 1:
            raise StoreError(f"flush_every is {flush_every}; it counts the rows of a block and must be at least 1.")
        self._keys = keys_at(path)
        self.path = self._keys.name
        self._lock, self.past = enter(self._keys, resume, Recorded(kinds, keep, shapes), changed=changed)
        attrs = {**attrs, **({} if shapes is None else {TRACED: digest(shapes)})}
        self._commit = Commit(
            attrs=attrs, kinds=kinds, keep=keep, parameters=parameters, flush_every=flush_every, past=self.past,
            changed=changed,
        )  # fmt: skip
        self._flush_every = flush_every
        self._changed = threading.Condition()
        self._queue: deque[tuple[str, StepRow, int]] = deque()
        self._queued_bytes = 0
        self._last_step = self.past.last_steps if self.past else {}
        self._asked = self._served = self._tried = 0  # flushes, by number
        self._stopping = self._closed = False
        self._error: tuple[str, Exception] | None = None  # what to say, and its cause
        self.trouble: str | None = None  # why nothing can be written at present
        self.lost = 0  # rows that came while too many waited already
        self._pid = os.getpid()
        if not self._guard(self._open):
            self._lock.release()
            self._check_alive()
        self._thread = threading.Thread(target=self._work, name="gradtrace writer", daemon=True)
        self._thread.start()
        atexit.register(self._close_at_exit)

    @property
    def failed(self) -> bool:
        """Whether nothing can be written any more."""
        return self._error is not None

    def append(self, row: StepRow, stream: str = MAIN_STREAM) -> float:
        """Seconds waited for the disk; the row is written later.

        stream: "steps" for the training run, "probe/<name>" for a probe. Steps of one stream strictly increase.
        """
        path = stream_path(stream)
        size = row_bytes(row)
        started = time.perf_counter()
        with self._changed:
            self._check_usable()
            check_row(row, stream, known=self._commit.known, kinds=self._commit.kinds, last=self._last_step.get(path))
            self._changed.wait_for(lambda: self._error or self.trouble or self._has_room(size), PATIENCE_SECONDS)
            waited = time.perf_counter() - started
            self._check_usable()
            if not self._has_room(size):
                self.trouble = self.trouble or (
                    f"Writing {self.path!r} takes longer than {PATIENCE_SECONDS:.0f} s: the disk does not answer. Rows "
                    f"are lost until it does; {self._commit.summary()}"
                )
                self.lost += 1
                return waited
            self._queue.append((path, row, size))
            self._queued_bytes += size
            self._last_step[path] = row.step
            self._changed.notify_all()
        return waited

    def add_parameter(self, info: ParameterInfo) -> None:
        """Make a parameter known that was not there at the start; a known one keeps its place and is updated."""
        with self._changed:
            self._check_usable()
            self._commit.describe(info)
            self._changed.notify_all()

    def update_parameter(self, info: ParameterInfo) -> None:
        """Replace what is said about a known parameter, with the next commit."""
        with self._changed:
            self._check_usable()
            if info.name not in self._commit.known:
                raise StoreError(
                    f"There is no parameter {info.name!r} to update. {nearest(info.name, self._commit.known)} "
                    "A new one is made known by add_parameter()."
                )
            self._commit.describe(info)
            self._changed.notify_all()

    def update_attrs(self, attrs: Mapping[str, Any]) -> None:
        """Add to what is said about the run, or replace it, key by key, with the next commit."""
        with self._changed:
            self._check_usable()
            self._commit.tell(attrs)
            self._changed.notify_all()

    def flush(self) -> None:
        """Wait until everything handed over is committed."""
        with self._changed:
            self._check_usable()
            self._asked += 1
            mine = self._asked
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._error or max(self._served, self._tried) >= mine)
            self._check_alive()
            if self.trouble and self._served < mine:
                raise StoreError(self.trouble)

    def close(self) -> None:
        """Commit everything, set exact shapes and mark the run as closed. A second call does nothing."""
        if self._closed or os.getpid() != self._pid:  # a forked child has the object, but neither thread nor duty
            return
        with self._changed:
            self._stopping = True
            self._changed.notify_all()
        self._thread.join()
        if not self._error:
            self._guard(self._finish)
        self._lock.release()
        self._closed = True
        atexit.unregister(self._close_at_exit)
        self._check_alive()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            self.close()
        except StoreError as failed:
            if error is None:
                raise
            error.add_note(str(failed))

    def _close_at_exit(self) -> None:
        if not self._error:  # else it was told, and nothing can be saved
            self.close()

    def _check_alive(self) -> None:
        if self._error:
            raise StoreError(self._error[0]) from self._error[1]

    def _check_usable(self) -> None:
        self._check_alive()
        if self._closed or self._stopping:
            raise StoreError(f"The run {self.path!r} is closed; nothing can be added. Record into a new path.")

    def _open(self) -> bool:
        self._keys.begin()
        self._commit.open(self._keys)
        return True

    def _finish(self) -> bool:
        self._lock.check()
        self._commit.close(self._keys)
        return True

    def _work(self) -> None:
        """The thread: take rows, commit when it is time, until told to stop and nothing is left."""
        while self._guard(self._patiently):
            pass

    def _patiently(self) -> bool:
        """A turn; where it fails for a reason that may pass, another one after a while, unless it is time to stop."""
        asked = self._asked
        try:
            more = self._turn()
        except OSError as error:
            if not may_pass(error) or self._stopping:
                raise
            self._tell(f"Writing {self.path!r} fails: {explain(error)} Rows wait in memory; {self._commit.summary()}")
            with self._changed:
                self._tried = asked
                self._changed.notify_all()
                self._changed.wait_for(lambda: self._stopping or self._asked > asked, timeout=RETRY_SECONDS)
            return True
        self._tell(None)
        return more

    def _tell(self, trouble: str | None) -> None:
        with self._changed:
            self.trouble = trouble
            self._changed.notify_all()

    def _turn(self) -> bool:
        """Everything in it can be done again where it failed half-way."""
        with self._changed:
            due = self._commit.due_in(COMMIT_SECONDS)
            self._changed.wait_for(self._has_work, timeout=min(BEAT if due is None else due, self._lock.due_in))
            taken = self._queue[0] if self._queue else None
            asked, stop = self._asked, self._stopping and taken is None
            flush = taken is None and asked > self._served
        if self._lock.due_in == 0:
            self._lock.beat()
        if taken:
            self._commit.place(taken[0], taken[1], self._keys)
            with self._changed:
                self._queue.popleft()
                self._queued_bytes -= taken[2]
                self._changed.notify_all()
        if flush or stop or self._commit.pending >= self._flush_every or self._commit.due_in(COMMIT_SECONDS) == 0:
            self._lock.check()
            self._commit.commit(self._keys, lock=self._changed)
        with self._changed:
            self._served = asked if flush else self._served
            self._changed.notify_all()
        return not stop

    def _has_work(self) -> bool:
        return bool(self._queue) or self._stopping or self._asked > self._served

    def _has_room(self, size: int) -> bool:
        return not self._queue or self._queued_bytes + size <= QUEUE_BYTES

    def _guard(self, work: Any, *arguments: Any) -> bool:
        """What `work` returns; if it fails, False, and the failure is kept to be told to the caller's thread."""
        try:
            return bool(work(*arguments))
        except Exception as error:
            told = f"Writing {self.path!r} failed: {explain(error)} Recording has stopped; {self._commit.summary()}"
            with self._changed:
                self._error = (told, error)
                self._queue.clear()
                self._changed.notify_all()
            return False
