"""What group gradients must be, three times over, none of it gradtrace's own doing.

- `group_loss_gradients`: autograd of the group's share of the loss. Right where samples are independent.
- `sample_loop_gradients`: the same from batches of one sample, summed.
- `group_row_gradients`: the real adjoint of every layer, masked to the group's rows, through that layer alone. Right
  also where samples are coupled, for models made of layers whose leading axis is the sample.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from tests.case import SAMPLES, Case, Problem, call

SEED = 1234  # the random state at the start of every forward pass
Gradients = dict[str, dict[str, Tensor]]  # group -> parameter -> gradient


def memberships(labels: Mapping[str, Any]) -> dict[str, Tensor]:
    """Group name -> which samples belong to it, in gradtrace's names."""
    groups = {"all": torch.ones(SAMPLES, dtype=torch.bool)}
    for grouping, given in labels.items():
        values = given.tolist() if isinstance(given, Tensor) else list(given)
        for value in sorted(set(values)):
            groups[f"{grouping}={value}"] = torch.tensor([other == value for other in values])
    return groups


def forward(problem: Problem) -> Any:
    """The output of one forward pass from the fixed random state."""
    torch.manual_seed(SEED)
    return call(problem.model, problem.inputs)


def group_loss_gradients(case: Case, dtype: torch.dtype) -> Gradients:
    """Gradient of each group's share of the mean loss, by one backward pass each over a fresh model."""
    whole = _share(case, dtype, torch.ones(SAMPLES, dtype=torch.bool))
    groups = memberships(case.build(dtype).labels)
    return {name: _aligned(_share(case, dtype, mask), whole) for name, mask in groups.items()}


def sample_loop_gradients(case: Case, dtype: torch.dtype) -> Gradients:
    """The same, summed over batches of one sample."""
    singles = []
    for sample in range(SAMPLES):
        problem = case.build(dtype).of([sample])
        (problem.per_sample(forward(problem)).sum() / SAMPLES).backward()
        singles.append(_gradients(problem.model))
    zeros = {name: torch.zeros_like(g) for single in singles for name, g in single.items()}
    singles = [_aligned(single, zeros) for single in singles]
    return {
        group: {
            name: sum((one[name] for one, ours in zip(singles, mask, strict=True) if ours), zeros[name])
            for name in zeros
        }
        for group, mask in memberships(case.build(dtype).labels).items()
    }


def group_row_gradients(case: Case, dtype: torch.dtype) -> Gradients:
    """Gradient of each layer's weights from the group's rows of the layer's own adjoint."""
    problem = case.build(dtype)
    calls = watch(problem)
    result: Gradients = {}
    for group, mask in memberships(problem.labels).items():
        result[group] = sums = {}
        for layer, names, inputs, adjoint in calls:
            for name, gradient in zip(names, _pull_back(layer, inputs, adjoint, mask), strict=True):
                sums[name] = sums.get(name, 0) + gradient
    return result


def spectrum(gradient: Tensor) -> Tensor:
    """Singular values of a gradient as the matrix that gradtrace makes of it."""
    matrix = gradient.flatten(1) if gradient.dim() > 1 else gradient.reshape(1, -1)
    return torch.linalg.svdvals(matrix)


def _share(case: Case, dtype: torch.dtype, mask: Tensor) -> dict[str, Tensor]:
    problem = case.build(dtype)
    (problem.per_sample(forward(problem))[mask].sum() / SAMPLES).backward()
    return _gradients(problem.model)


def _gradients(model: nn.Module) -> dict[str, Tensor]:
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {name: grad.to_dense() if grad.is_sparse else grad for name, grad in grads.items()}


def _aligned(some: dict[str, Tensor], whole: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: some.get(name, torch.zeros_like(value)) for name, value in whole.items()}


LAYERS = (nn.Linear, nn.modules.conv._ConvNd, nn.modules.batchnorm._BatchNorm)
Call = tuple[nn.Module, list[str], Tensor, Tensor]


def watch(problem: Problem) -> list[Call]:
    """Every call of a layer in one step: the layer, its parameters' names, its input and its adjoint."""
    names = {id(p): name for name, p in problem.model.named_parameters()}
    seen: list[Call] = []

    def after(layer: nn.Module, args: tuple[Tensor], output: Tensor) -> Tensor:
        inputs = args[0].detach().clone()
        ours = [names[id(p)] for p in layer.parameters(recurse=False)]
        output.register_hook(lambda adjoint: seen.append((layer, ours, inputs, adjoint.clone())))
        # A linear layer's output on sequences is a view: an in-place activation would cut the hook out of the graph.
        return output.clone()

    for module in problem.model.modules():
        if next(module.parameters(recurse=False), None) is not None:
            assert isinstance(module, LAYERS), f"the oracle of rows does not know {type(module).__name__}"
            module.register_forward_hook(after)
    problem.loss_fn(forward(problem)).backward()
    return seen


def _pull_back(layer: nn.Module, inputs: Tensor, adjoint: Tensor, mask: Tensor) -> tuple[Tensor, ...]:
    """The layer's weight gradients for its adjoint in the group's rows alone."""
    hooks, layer._forward_hooks = layer._forward_hooks, type(layer._forward_hooks)()
    output = layer(inputs)
    layer._forward_hooks = hooks
    rows = mask.repeat_interleave(len(output) // len(mask))
    cotangent = torch.where(rows.view(-1, *[1] * (output.dim() - 1)), adjoint, 0)
    return torch.autograd.grad(output, list(layer.parameters(recurse=False)), cotangent)
