"""A study's model, first batch and labels, and one plain step of it: what is the study's own fault shows here."""

from __future__ import annotations

import sys
import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter

from gradtrace.errors import GradtraceError, StudyError
from gradtrace.evidence import GraphFacts, facts_of
from gradtrace.groups import Labels
from gradtrace.inputs import Inputs
from gradtrace.standin import Standin
from gradtrace.study import Study
from gradtrace.training import batches_of, loss_of, model_of, moved
from gradtrace.untouched import attributes_kept, random_state_kept

BATCHES = 8  # of so many the labels are looked at; the first is measured
WARM = 0.5  # seconds: a shorter step is run once more, since the first one also loads libraries
END = object()


@dataclass(frozen=True)
class Subject:
    """A study's model and first batch, and the labels of its first batches."""

    study: Study
    model: nn.Module
    batch: Any
    inputs: Inputs
    groups: Any
    labels: tuple[Labels | None, ...]

    @classmethod
    def of(cls, study: Study, device: torch.device) -> Subject:
        """What the study's functions return; StudyError where they fail."""
        with _told(study, "model()"):
            model = model_of(study).to(device)
        _refuse_uninitialised(study, model)
        with _told(study, "batches()"):
            batches = iter(islice(batches_of(study), BATCHES))
            batch = moved(next(batches, END), device)
        if batch is END:
            raise StudyError(f"batches() of the study {study.target} yielded nothing; yield at least one batch.")
        with _told(study, "inputs(batch)"):
            inputs = Inputs.of(study.inputs(batch))
        with _told(study, "groups(batch)"):
            groups = study.groups(batch)
        labels = [Labels.read(groups), *_labels_of(study, batches)]
        return cls(study, model, batch, inputs, groups, tuple(labels))

    def loss(self, output: Any) -> Tensor:
        """The study's loss of a model output."""
        return loss_of(self.study.loss(output, self.batch), self.study)


def _labels_of(study: Study, batches: Iterator[Any]) -> Iterator[Labels | None]:
    """The labels of batches, of which none is kept."""
    while True:
        with _told(study, "batches()"):
            batch = next(batches, END)
        if batch is END:
            return
        with _told(study, "groups(batch)"):
            groups = study.groups(batch)
        yield Labels.read(groups)


def _refuse_uninitialised(study: Study, model: nn.Module) -> None:
    lazy = [name for name, p in model.named_parameters() if isinstance(p, UninitializedParameter)]
    if lazy:
        raise StudyError(
            f"model() of the study {study.target} returns parameters that are not initialised yet: "
            f"{', '.join(lazy[:5])}{f' and {len(lazy) - 5} more' if len(lazy) > 5 else ''}. Run one batch through the "
            "model in model(), before returning it."
        )


@contextmanager
def _told(study: Study, what: str) -> Iterator[None]:
    """An exception of the study's own code becomes a StudyError that names the function and the place."""
    try:
        yield
    except GradtraceError:
        raise
    except Exception as error:
        why = f"{type(error).__name__}: {str(error).rstrip('.')}{_place(error)}"
        raise StudyError(f"{what} of the study {study.target} failed: {why}. Correct it, and ask again.") from error


def _place(error: Exception) -> str:
    """The line outside torch and gradtrace that came last, or else the module that was running."""
    foreign = tuple(str(Path(package.__file__ or "").parent) for package in (torch, sys.modules["gradtrace"]))
    last, running = None, None
    for frame, line in traceback.walk_tb(error.__traceback__):
        if not frame.f_code.co_filename.startswith(foreign):
            last = f"{Path(frame.f_code.co_filename).name}, line {line}"
        running = frame.f_locals["self"] if isinstance(frame.f_locals.get("self"), nn.Module) else running
    return f" ({last})" if last else f" (in {running})" if running is not None else ""


def plain_step(subject: Subject, patterns: str | Sequence[str] | None) -> tuple[GraphFacts, float, float]:
    """What the graph of an untraced step tells, its loss, and the seconds that it takes.

    A short step is run twice, for its time. What fails here is the study's, not the tracing's.
    """
    facts, loss, seconds = _plain_step(subject, patterns)
    if seconds < WARM:
        seconds = min(seconds, _plain_step(subject, patterns)[2])
    return facts, loss, seconds


def _plain_step(subject: Subject, patterns: str | Sequence[str] | None) -> tuple[GraphFacts, float, float]:
    study, standin, given = subject.study, Standin(subject.model, patterns), subject.inputs

    def step(model: nn.Module) -> tuple[GraphFacts, float, float]:
        began = time.perf_counter()
        with _told(study, "the forward pass of the model"):
            output = model(*given.args, **given.kwargs)
        with _told(study, "loss(output, batch)"):
            loss = subject.loss(output)
        forward = time.perf_counter()
        facts = facts_of(loss, standin.leaves)
        asked = time.perf_counter() - forward
        if loss.requires_grad:  # the traced step says it better where it does not
            with _told(study, "the backward pass from loss(output, batch)"):
                loss.backward()
        value = float(loss.detach())
        if loss.is_cuda:
            torch.cuda.synchronize(loss.device)
        return facts, value, time.perf_counter() - began - asked

    eager = torch.compiler.set_stance("force_eager") if "torch._dynamo" in sys.modules else nullcontext()
    with random_state_kept(), attributes_kept(subject.model), torch.enable_grad(), eager:
        found: tuple[GraphFacts, float, float] = standin.applied(step)
    return found
