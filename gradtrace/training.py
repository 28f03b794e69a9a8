"""The plain training loop around a study: what `gradtrace train` runs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from os import PathLike
from typing import Any

import torch

import gradtrace as gt
from gradtrace.errors import GradtraceError, StudyError
from gradtrace.inputs import Inputs
from gradtrace.study import SHAPES, Study

Tick = Callable[[float, int | None], None]


def train_study(
    study: Study,
    path: str | PathLike[str],
    *,
    epochs: int = 1,
    seed: int | None = None,
    device: str = "auto",
    tick: Tick = lambda loss, total: None,
    **record: Any,
) -> int:
    """The number of optimizer steps taken while training the study's model and recording it at `path`.

    Raises a `StoreError` when the training is over if the store could not be written meanwhile.

    record: options of `gradtrace.record` (every, budget, kinds, ...). tick(loss, total) is called after each step;
    total is the number of steps of all epochs, or None while it is not known.
    """
    place = chosen_device(device)
    if seed is not None:
        torch.manual_seed(seed)
    model = model_of(study).to(place)
    optimizer = (study.optimizer or default_optimizer)(model.parameters())
    attrs = {"study": study.name} | ({} if seed is None else {"seed": seed})
    loop = _Loop(study, model, optimizer, place, tick)
    steps = 0
    with gt.record(model, path, attrs=attrs, **record) as recorder:
        for epoch in range(epochs):
            steps += loop.epoch(recorder, epoch=epoch, before=steps, epochs=epochs)
    if recorder.failure is not None:
        raise recorder.failure
    return steps


def default_optimizer(parameters: Iterable[torch.nn.Parameter]) -> torch.optim.Optimizer:
    """Adam with learning rate 1e-3."""
    return torch.optim.Adam(parameters, lr=1e-3)


class _Loop:
    """One study's training, an epoch at a time."""

    def __init__(
        self, study: Study, model: torch.nn.Module, optimizer: torch.optim.Optimizer, device: torch.device, tick: Tick
    ) -> None:
        self.study, self.model, self.optimizer, self.device, self.tick = study, model, optimizer, device, tick

    def epoch(self, recorder: gt.Recorder, *, epoch: int, before: int, epochs: int) -> int:
        """The number of steps of one epoch."""
        batches = batches_of(self.study)
        length = _length(batches) or (before // epoch if epoch else None)
        steps = 0
        self.model.train()
        for batch in batches:
            loss = self.step(recorder, moved(batch, self.device), epoch=epoch)
            steps += 1
            self.tick(loss, length and length * epochs)
        if not steps:
            again = " A generator is used up after one pass: batches() must make a new one at each call." * bool(epoch)
            raise StudyError(f"batches() of the study {self.study.target} yielded nothing in epoch {epoch}.{again}")
        return steps

    def step(self, recorder: gt.Recorder, batch: Any, *, epoch: int) -> float:
        """The loss of one recorded optimizer step."""
        inputs = Inputs.of(self.study.inputs(batch))
        with recorder.step(groups=self.study.groups(batch), epoch=epoch):
            loss = self.study.loss(self.model(*inputs.args, **inputs.kwargs), batch)
            loss_of(loss, self.study).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return float(loss.detach())


def model_of(study: Study) -> torch.nn.Module:
    """What `model()` of the study returns, if it is a model."""
    model = study.model()
    if isinstance(model, torch.nn.Module):
        return model
    raise StudyError(
        f"model() of the study {study.target} returned a {type(model).__name__}, not a torch.nn.Module. It should look "
        f"like: {SHAPES['model']}"
    )


def batches_of(study: Study) -> Iterable[Any]:
    """What `batches()` of the study returns, if it can be looped over."""
    batches = study.batches()
    if isinstance(batches, Iterable) or hasattr(batches, "__getitem__"):
        return batches
    raise StudyError(
        f"batches() of the study {study.target} returned {batches!r}, which cannot be looped over. It should look "
        f"like: {SHAPES['batches']}"
    )


def loss_of(loss: Any, study: Study) -> torch.Tensor:
    """What `loss(output, batch)` of the study returned, if it is a scalar."""
    if isinstance(loss, torch.Tensor) and loss.numel() == 1:
        return loss
    what = f"a tensor shaped {tuple(loss.shape)}" if isinstance(loss, torch.Tensor) else f"a {type(loss).__name__}"
    raise StudyError(
        f"loss(output, batch) of the study {study.target} returned {what}; return one number, as a tensor."
    )


def _length(batches: Any) -> int | None:
    try:
        return len(batches)
    except TypeError:
        return None


def moved(batch: Any, device: torch.device) -> Any:
    """The batch with its tensors on the device; what is no tensor, list, tuple or mapping stays as it is."""
    if isinstance(batch, torch.Tensor):
        return batch.to(device)
    if isinstance(batch, Inputs):
        return Inputs(moved(batch.args, device), moved(batch.kwargs, device))
    if isinstance(batch, Mapping):
        return {key: moved(value, device) for key, value in batch.items()}
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*(moved(value, device) for value in batch))
    if isinstance(batch, list | tuple):
        return type(batch)(moved(value, device) for value in batch)
    return batch


def chosen_device(name: str) -> torch.device:
    """The device of that name: cpu, cuda, or auto, which is cuda where there is one."""
    if name == "cuda" and not torch.cuda.is_available():
        raise GradtraceError("device cuda was asked for, and torch sees no CUDA device. Use cpu, or auto.")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")
