"""Traces a model in anybody's own training loop, and writes what it finds behind it.

The only module that joins capture, measuring and the store.
"""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from gradtrace import __version__
from gradtrace.behind import Behind
from gradtrace.continuing import GROUPINGS, Continuation
from gradtrace.devices import device_of, synchronize
from gradtrace.errors import CaptureError, GradtraceError, StoreError
from gradtrace.finish import Pending, infos, judge, step_row
from gradtrace.interrupts import Interrupts
from gradtrace.metrics import described
from gradtrace.onset import Condition
from gradtrace.probing import measure_batches
from gradtrace.selection import select
from gradtrace.session import Session, constants_of
from gradtrace.settings import Recording
from gradtrace.sink import Sink
from gradtrace.store.writing.writer import RunWriter
from gradtrace.survey import Memory
from gradtrace.telling import Call, Telling

TRACING = ("survey", "reduce", "decompose", "waited")  # parts of the cost for which the training waits


class Step:
    """What `recorder.step` gives: one optimizer step, made of one or more batches."""

    def __init__(self, session: Session | None) -> None:
        self._session = session

    @property
    def recorded(self) -> bool:
        """Whether this step is measured."""
        return self._session is not None

    @contextmanager
    def batch(self, groups: Any = None) -> Iterator[None]:
        """One micro-batch of an accumulated step, with its own labels; they add up as in `p.grad`."""
        if self._session is not None:
            self._session.begin_batch(groups)
        yield


class Recorder:
    """Records one run. See `record`."""

    def __init__(self, model: nn.Module, path: str | os.PathLike[str], recording: Recording) -> None:
        self._model, self._as = model, recording
        traced, self._excluded = select(model, recording.parameters)
        self._memory = Memory()
        self._probe_memories: dict[str, Memory] = {}
        self._cadence = recording.cadence
        self._running = False
        self._closed = False
        self._waited = 0.0
        device = device_of(model)
        behind = device.type != "cpu" if recording.behind is None else recording.behind
        self._behind = Behind(device) if behind else None
        writer = RunWriter(
            path,
            attrs={**self._provenance(), **recording.attrs},
            kinds=recording.settings.kinds,
            keep=recording.keep,
            parameters=(),
            resume=recording.resume,
            changed=recording.changed,
            shapes={name: tuple(parameter.shape) for name, parameter in traced.items()},
        )
        self._before = Continuation(writer.past, recording.resume, changed=recording.changed)
        self._cadence = self._before.cadence(recording.cadence)
        self._next = self._before.first_step
        self._count = itertools.count(self._next)
        self._sink = Sink(writer)
        self._telling = Telling()
        self._interrupts = Interrupts()
        self._interrupts.install()

    def _provenance(self) -> dict[str, Any]:
        return {
            "gradtrace": __version__,
            "torch": torch.__version__,
            "seed": torch.initial_seed(),
            "model": type(self._model).__name__,
            **self._cadence.attrs(),
            "coupling": self._as.settings.coupling,
            "excluded": self._excluded,
            **({"metrics": described()} if described() else {}),
            **({} if self._as.min_samples == 1 else {"min_samples": self._as.min_samples}),
        }

    def __enter__(self) -> Recorder:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self.close()
        except Exception as failed:
            if error is None:
                raise
            if failed is not error:
                error.add_note(f"Closing the run failed too: {failed}")

    def close(self) -> None:
        """Commits every step and closes the store; a warning says if that cannot be done."""
        self._closed = True
        try:
            if self._behind is not None:
                self._behind.close()
        finally:
            self._sink.close()
            self._interrupts.remove()
        self._telling.tell()

    @property
    def steps_done(self) -> int:
        """The number of steps that have begun, those of a run that is gone on with included: that of the next one."""
        return self._next

    @property
    def failure(self) -> StoreError | None:
        """Why nothing is recorded any more, where the store could not be written; else None."""
        return self._sink.failure

    def flush(self) -> None:
        """Returns when every step so far is committed; raises a `StoreError` where that cannot be."""
        if self._behind is not None:
            self._behind.wait()
        self._sink.flush()
        self._telling.tell()

    def watch(self, condition: Condition, call: Call | None = None, *, probe: str | None = None) -> None:
        """From now on `call(event)` is called wherever the condition begins to hold; by default a `WatchWarning` comes.

        condition: one of `gradtrace.watch`, or an object with `events(row)`. probe: over the probe of that name instead
        of the training. Calls are made in the thread that trains: at the end of the recorded step, or, where steps are
        decomposed behind the training, at the beginning of a later one, in `flush` or in `close`. What a call raises
        stops the training there; the step that it is about is recorded.
        """
        traced, _ = select(self._model, self._as.parameters)
        self._telling.add(condition, call, probe, parameters=tuple(traced), kinds=self._as.settings.kinds)

    @contextmanager
    def step(
        self, groups: Any = None, *, epoch: float | None = None, scalars: Mapping[str, float] | None = None
    ) -> Iterator[Step]:
        """Spans the forward and backward passes of one optimizer step.

        groups: a mapping from grouping name to one label per sample of the batch, or one bare sequence; with several
        micro-batches give them to `step.batch`. epoch, scalars: stored with the step.
        """
        self._check_open()
        self._telling.tell()
        number = next(self._count)
        self._next = number + 1
        if not self._is_due(number) or self.failure is not None:
            yield Step(None)
            return
        with self._interrupts.whole(), self._recorded(number, groups, epoch, scalars or {}) as step:
            yield step
        self._telling.tell()

    @contextmanager
    def _recorded(self, number: int, groups: Any, epoch: float | None, scalars: Mapping[str, float]) -> Iterator[Step]:
        began = time.perf_counter()
        traced, _ = select(self._model, self._as.parameters)  # parameters may have been frozen or freed since
        constants, asked = constants_of(self._model), self._as
        session = Session(self._model, traced, constants, asked.settings, self._memory, asked.adapters)
        known = len(self._memory.transparent)
        self._running = True
        try:
            session.begin_batch(groups)
            with session.watching():
                yield Step(session)
            self._finish(session, number, epoch, scalars, began)
            self._memory.reconsider(known)
        finally:
            self._running = False
            session.close()
            session.discard()

    def _is_due(self, number: int) -> bool:
        """Whether this step, which begins now, is recorded; says so when that has settled a cadence."""
        calibrating = self._cadence.calibrating
        if calibrating:  # only then: a lap is to hold what it began
            synchronize(self._model)
        due = self._cadence.begin(number)
        if calibrating and not self._cadence.calibrating:
            self._sink.update_attrs(self._cadence.attrs())
        return due

    def _finish(
        self, session: Session, number: int, epoch: float | None, scalars: Mapping[str, float], began: float
    ) -> None:
        judge(session)
        if self._before.regrouped(session.cells.groupings):
            self._sink.update_attrs({GROUPINGS: list(session.cells.groupings)})
        scale = float(self._as.scaler.get_scale()) if self._as.scaler is not None else 1.0
        pending = Pending(
            session,
            step=number,
            keep=self._as.keep,
            min_samples=self._as.min_samples,
            loss_scale=scale,
            epoch=float("nan") if epoch is None else float(epoch),
            scalars={str(name): float(value) for name, value in scalars.items()},
        )
        session.memory.steps += 1
        self._sink.describe(infos(session))
        cost = {**session.cost, "waited": self._waited, "plain": self._cadence.plain, "period": self._cadence.period}
        if self._behind is None:
            row = pending.row()
            self._telling.look(row)
            cost |= {"decompose": row.cost["decompose"], "step": time.perf_counter() - began}
            self._waited = self._sink.append(replace(row, cost=cost))
        else:
            parting = time.perf_counter()
            pending.part()
            cost |= {"decompose": time.perf_counter() - parting, "step": time.perf_counter() - began}
            self._waited = self._behind.hand_over(lambda: self._write_behind(pending, cost))
        self._cadence.traced(sum(cost[name] for name in TRACING))

    def _write_behind(self, pending: Pending, cost: Mapping[str, float]) -> None:
        """On the thread behind the training: it waits for the disk, and where that is slow the training for it."""
        assert self._behind is not None
        row = pending.row(workers=self._behind.workers)
        self._telling.look(row)
        self._sink.append(replace(row, cost={**cost, "behind": row.cost["decompose"]}))

    def probe(
        self,
        name: str,
        batches: Iterable[Any],
        loss_fn: Callable[[Any, Any], Tensor],
        *,
        groups: Any = None,
        inputs: Callable[[Any], Any] | None = None,
        training: bool = False,
    ) -> None:
        """Measures a fixed set of batches at the present weights and stores it under `name`, at the present step.

        Gradients are of the mean loss over all samples of the set (each batch's mean loss weighted by its size). The
        model's gradients, buffers, mode and random state are left alone. Where a run that is gone on with has it of
        this very step, nothing is done.

        inputs: what the model is called with for a batch; by default its first entry when it is a tuple or list.
        loss_fn: `loss_fn(output, batch)`, a mean over the batch's samples. groups: `groups(batch)` gives the labels of
        one batch, or labels of the whole set in order. training: the mode the model is run in, stored.
        """
        self._check_open()
        if self.failure is not None or self._before.has_probe(name, self._next):
            return
        with self._cadence.paused():
            self._probe(name, batches, loss_fn, groups, inputs, training)
        self._telling.tell()

    def _probe(self, name: str, batches: Any, loss_fn: Any, groups: Any, inputs: Any, training: bool) -> None:
        began = time.perf_counter()
        memory = self._probe_memories.setdefault(name, Memory(label_types=self._memory.label_types))
        session, n_samples = measure_batches(
            self._model, batches, loss_fn, groups=groups, inputs=inputs, training=training,
            patterns=self._as.parameters, settings=self._as.settings, memory=memory, adapters=self._as.adapters,
        )  # fmt: skip
        row = step_row(
            session, step=self._next, keep=self._as.keep, min_samples=self._as.min_samples, loss_scale=float(n_samples)
        )
        memory.steps += 1
        self._sink.describe(i for i in infos(session) if not self._sink.knows(i.name))
        self._sink.update_attrs({f"probe/{name}": {"training": training, "samples": n_samples}})
        cost = {**row.cost, "probe": time.perf_counter() - began}
        self._telling.look(row, f"probe/{name}")
        self._sink.append(replace(row, cost=cost), stream=f"probe/{name}")

    def _check_open(self) -> None:
        if self._closed:
            raise GradtraceError("This recorder is closed; open another with gradtrace.record(model, path).")
        if self._running:
            raise CaptureError(
                "A step is already being recorded: a step cannot hold another, nor a probe. For gradient accumulation "
                "use `step.batch(groups=...)` inside one step."
            )
