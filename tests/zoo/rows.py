"""What the gradient of a group's rows is, for any model whose samples meet in batch norms or in the loss alone.

By definition it is, op by op, the real adjoint in the group's rows, pulled back through that op. Between two batch
norms samples are independent, so one backward pass makes all those pull-backs at once, if it starts with the real
cotangent of the output in the group's rows, and if at every batch norm what goes on to its input is the real adjoint
there, in the group's rows, instead of what the norm would pass on. The real adjoints are from one ordinary pass.
The batch norm's own scale and shift take part as always. None of this is gradtrace's doing.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.case import SAMPLES, Case, Problem
from tests.oracles import Gradients, forward, memberships

BATCH_NORM = F.batch_norm


class _Replaced(torch.autograd.Function):
    """The identity; its gradient is `given`, whatever comes."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, given: Tensor) -> Tensor:
        ctx.given = given
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return ctx.given, None


class _Adjoints:
    """The adjoints of one ordinary pass: at the input of every batch norm, in their order, and at the outputs."""

    def __init__(self, problem: Problem) -> None:
        self.inputs: list[Tensor | None] = []
        with _batch_norms(self._watched):
            output = forward(problem)
            leaves: dict[Tensor, Tensor] = {}
            apart = mapped(output, lambda t: leaves.setdefault(t, t.detach().requires_grad_()))
            problem.loss_fn(apart).backward()  # apart: an output may have been computed from another
            self.outputs = [leaf.grad for leaf in leaves.values()]
            pairs = [(y, leaf.grad) for y, leaf in leaves.items() if leaf.grad is not None]
            torch.autograd.backward([y for y, _ in pairs], [d for _, d in pairs])

    def _watched(self, x: Tensor) -> Tensor:
        place = len(self.inputs)
        self.inputs.append(None)
        x = x.view_as(x)  # an alias: what else becomes of x does not count here
        if x.requires_grad:
            x.register_hook(lambda gradient: self.inputs.__setitem__(place, gradient.clone()))
        return x


def rows_gradients(case: Case, dtype: torch.dtype) -> Gradients:
    """Gradients of the group's rows of every op's adjoint."""
    problem = case.build(dtype)
    real = _Adjoints(problem)
    whole = {name for name, p in problem.model.named_parameters() if p.grad is not None}
    found: Gradients = {}
    for group, mask in memberships(problem.labels).items():
        model = _masked_pass(case.build(dtype), real, mask)
        found[group] = {
            name: torch.zeros_like(p) if p.grad is None else p.grad
            for name, p in model.named_parameters()
            if name in whole
        }
    return found


def _masked_pass(problem: Problem, real: _Adjoints, mask: Tensor) -> nn.Module:
    given = iter(real.inputs)
    axis = problem.options.get("sample_dim", 0)

    def replaced(x: Tensor) -> Tensor:
        adjoint = next(given)
        return x if adjoint is None else _Replaced.apply(x, restricted(adjoint, mask, 0))

    with _batch_norms(replaced):
        outputs = _tensors(forward(problem))
        pairs = [(y, d) for y, d in zip(outputs, real.outputs, strict=True) if d is not None]
        torch.autograd.backward([y for y, _ in pairs], [restricted(d, mask, axis) for _, d in pairs])
    return problem.model


def restricted(adjoint: Tensor, mask: Tensor, axis: int) -> Tensor:
    """The adjoint in the group's rows, zero elsewhere; samples may be folded with what follows them on that axis."""
    assert adjoint.shape[axis] % SAMPLES == 0, f"no axis of {tuple(adjoint.shape)} counts the samples"
    rows = mask.repeat_interleave(adjoint.shape[axis] // SAMPLES)
    return torch.where(rows.view([-1 if a == axis else 1 for a in range(adjoint.dim())]), adjoint, 0)


def mapped(output: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """The output with every tensor that leads back to parameters changed."""
    if isinstance(output, Tensor):
        return change(output) if output.requires_grad else output
    if isinstance(output, dict):
        made = {key: mapped(value, change) for key, value in output.items()}
        return made if type(output) is dict else type(output)(**made)
    if isinstance(output, (tuple, list)):
        parts = [mapped(part, change) for part in output]
        return type(output)(*parts) if hasattr(output, "_fields") else type(output)(parts)
    if dataclasses.is_dataclass(output):
        names = [field.name for field in dataclasses.fields(output)]
        return dataclasses.replace(output, **{name: mapped(getattr(output, name), change) for name in names})
    return output


def _tensors(output: Any) -> list[Tensor]:
    found: dict[Tensor, None] = {}
    mapped(output, lambda t: found.setdefault(t, None) or t)
    return list(found)


@contextmanager
def _batch_norms(change: Any) -> Iterator[None]:
    """Batch norms that use the batch's statistics see `change(input)` instead of their input."""

    def batch_norm(x: Tensor, *given: Any, **named: Any) -> Tensor:
        training = given[4] if len(given) > 4 else named.get("training", False)
        return BATCH_NORM(change(x) if training else x, *given, **named)

    F.batch_norm = batch_norm
    try:
        yield
    finally:
        F.batch_norm = BATCH_NORM
