"""The two matrices whose product a layer's gradient is, from module hooks: one row per output position.

For linear layers and plain convolutions that run once in a step, with samples one after the other on the first axis.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.case import SAMPLES, Problem
from tests.oracles import forward

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
Matrices = tuple[Tensor, Tensor]


def matrices(problem: Problem) -> Iterator[tuple[str, Matrices]]:
    """(weight's name, (A, D)), both (samples, positions, width), of every layer that can be told from its hooks."""
    calls: dict[str, list[list[Tensor]]] = defaultdict(list)
    modules = {name: module for name, module in problem.model.named_modules() if _plain(module)}
    for name, module in modules.items():
        module.register_forward_hook(partial(_watch, calls[name]))
    problem.loss_fn(forward(problem)).backward()
    for name, found in calls.items():
        if len(found) == 1 and len(found[0]) == 2 and len(found[0][0]) % SAMPLES == 0:
            inputs, adjoint = found[0]
            yield f"{name}.weight", _rows(modules[name], inputs, adjoint)


def _plain(module: nn.Module) -> bool:
    if isinstance(module, CONVOLUTIONS):
        return module.groups == 1 and module.padding_mode == "zeros" and not isinstance(module.padding, str)
    return isinstance(module, nn.Linear)


def _watch(calls: list[list[Tensor]], module: nn.Module, args: tuple[Tensor], output: Tensor) -> Tensor:
    seen = [args[0].detach().clone()]
    calls.append(seen)
    if output.requires_grad:
        output.register_hook(lambda adjoint: seen.append(adjoint.clone()))
    return output.clone()  # an in-place activation would cut the hook out of the graph


def _rows(module: nn.Module, inputs: Tensor, adjoint: Tensor) -> Matrices:
    if isinstance(module, CONVOLUTIONS):
        inputs, adjoint = patches(module, inputs, adjoint.shape[2:]), adjoint.movedim(1, -1)
    return tuple(part.reshape(SAMPLES, -1, part.shape[-1]) for part in (inputs, adjoint))  # type: ignore[return-value]


def patches(module: Any, inputs: Tensor, sizes: tuple[int, ...]) -> Tensor:
    """(samples, *positions, channels · kernel): what the kernel lies over at every position."""
    dims = len(sizes)
    windows = F.pad(inputs, [side for side in reversed(module.padding) for _ in range(2)])
    for axis, (size, stride, dilation) in enumerate(zip(sizes, module.stride, module.dilation, strict=True)):
        starts = torch.arange(size) * stride
        taps = [windows.index_select(2 + axis, starts + k * dilation) for k in range(module.kernel_size[axis])]
        windows = torch.stack(taps, dim=-1)
    return windows.movedim(1, 1 + dims).flatten(1 + dims)
