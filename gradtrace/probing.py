"""A fixed set of batches, measured at constant weights: the clean comparison across training."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from gradtrace.adapters import Registry
from gradtrace.errors import CaptureError, GroupError
from gradtrace.finish import judge
from gradtrace.groups import Labels
from gradtrace.inputs import Inputs
from gradtrace.outlets import sample_axis
from gradtrace.session import Session
from gradtrace.settings import Settings
from gradtrace.standin import Standin
from gradtrace.survey import Memory
from gradtrace.untouched import attributes_kept, random_state_kept
from gradtrace.values import tensors_in

ATTEMPTS = 4  # each takes one more constant for what it is, or one more parameter down a rung


def measure_batches(
    model: nn.Module,
    batches: Iterable[Any],
    loss_fn: Callable[[Any, Any], Tensor],
    *,
    groups: Any,
    inputs: Callable[[Any], Any] | None,
    training: bool,
    patterns: str | Sequence[str] | None,
    settings: Settings,
    memory: Memory,
    adapters: Registry,
) -> tuple[Session, int]:
    """What all batches gathered, each batch's loss times its number of samples, and the number of samples in all."""
    call = inputs or _first
    labels = _Cursor(groups)
    total = 0
    with random_state_kept(), attributes_kept(model):
        model.train(training)
        standin = Standin(model, patterns)
        session: Session | None = None
        for batch in batches:
            given = labels.of(batch, call(batch))
            if session is None:
                _settle(standin, batch, call, loss_fn, given, settings, memory, adapters)
                session = standin.session(settings, memory, adapters)
            total += _add(session, standin, batch, call, loss_fn, given)
        labels.check_used(total)
    if session is None:
        raise CaptureError("The probe got no batch; give at least one. A generator can be used only once: pass a list.")
    judge(session)
    return session, total


def _settle(
    standin: Standin,
    batch: Any,
    call: Any,
    loss_fn: Any,
    given: Any,
    settings: Settings,
    memory: Memory,
    adapters: Registry,
) -> None:
    """Runs the first batch until every rung is decided, the first time this probe is used."""
    if memory.steps:
        return
    for _ in range(ATTEMPTS):
        before = len(memory.transparent)
        trial = standin.session(settings, memory, adapters)
        with random_state_kept():
            _add(trial, standin, batch, call, loss_fn, given)
        judge(trial)
        standin.clear_gradients()
        if not trial.retrace:
            return
        memory.reconsider(before)


def _add(session: Session, standin: Standin, batch: Any, call: Any, loss_fn: Any, given: Any) -> int:
    labels, arguments = Labels.read(given), Inputs.of(call(batch))

    def step(model: nn.Module) -> int:
        output = model(*arguments.args, **arguments.kwargs)
        size = labels.n_samples if labels else _samples(output, session.settings.sample_dim)
        (loss_fn(output, batch) * size).backward()
        return size

    session.begin_batch(given)
    with torch.enable_grad(), session.watching():
        size = int(standin.applied(step))
    session.close()
    return size


def _samples(output: Any, sample_dim: int | None) -> int:
    for tensor in tensors_in(output):
        axis = sample_axis(tuple(tensor.shape), None, sample_dim)
        if axis is not None:
            return int(tensor.shape[axis])
    raise CaptureError("The model's output has no sample axis to count; give groups=, with one label per sample.")


def _first(batch: Any) -> Any:
    return batch[0] if isinstance(batch, (tuple, list)) and len(batch) else batch


class _Cursor:
    """Labels of one batch after the other, from a function or from the labels of the whole set."""

    def __init__(self, groups: Any) -> None:
        self._function = groups if callable(groups) else None
        self._whole = None if callable(groups) or groups is None else Labels.read(groups)
        self._at = 0

    def of(self, batch: Any, inputs: Any) -> Any:
        if self._function is not None:
            return self._function(batch)
        if self._whole is None:
            return None
        size = self._batch_size(inputs)
        part = {name: values[self._at : self._at + size] for name, values in self._whole.of.items()}
        self._at += size
        return part

    @staticmethod
    def _batch_size(inputs: Any) -> int:
        given = Inputs.of(inputs)
        first: Iterator[Tensor] = tensors_in((given.args, given.kwargs))
        return int(next(first).shape[0])

    def check_used(self, total: int) -> None:
        if self._whole is not None and self._at != self._whole.n_samples:
            raise GroupError(
                f"The probe has {self._whole.n_samples} labels and its batches hold {total} samples. Give one label "
                "per sample of the whole set, in order, or a function groups(batch)."
            )
