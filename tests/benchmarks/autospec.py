"""AutoSpec's way: hooks, masks, and a full decomposition of every group's full gradient.

*Source*: Baker, Calhoun & Plis 2024, arXiv:2406.11825, read generously: a mask picks the group's samples instead of
multiplying the others by zero, nothing is written, and only singular values are computed. As in the original only
the weights of linear and convolution modules are measured, gradients alone here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import grad
from torch.utils.hooks import RemovableHandle

CONVOLUTIONS: dict[type[nn.Module], Callable[..., Tensor]] = {
    nn.Conv1d: grad.conv1d_weight,
    nn.Conv2d: grad.conv2d_weight,
    nn.Conv3d: grad.conv3d_weight,
}
MEASURED: tuple[type[nn.Module], ...] = (nn.Linear, *CONVOLUTIONS)

Spectra = dict[str, dict[str, Tensor]]  # parameter -> group -> singular values


def possible(model: nn.Module) -> bool:
    """Whether the way is defined for the model: a recurrent module's gradient is no product of its input and output."""
    return not any(isinstance(module, nn.RNNBase) for module in model.modules())


def group_gradient(module: nn.Module, inputs: Tensor, adjoint: Tensor) -> Tensor:
    """The gradient of a module's weight that these samples give."""
    if isinstance(module, nn.Linear):
        return adjoint.flatten(0, -2).T @ inputs.flatten(0, -2)
    weight: Any = module.weight
    of_weight = next(function for kind, function in CONVOLUTIONS.items() if isinstance(module, kind))
    geometry: Any = {name: getattr(module, name) for name in ("stride", "padding", "dilation", "groups")}
    return of_weight(inputs, weight.shape, adjoint, **geometry)


class AutoSpec:
    """Watches a model's modules until `close`; call `spectra` after each backward pass."""

    def __init__(self, model: nn.Module) -> None:
        self._uses: dict[str, list[tuple[nn.Module, Tensor, Tensor]]] = {}
        self._handles: list[RemovableHandle] = []
        for name, module in model.named_modules():
            if isinstance(module, MEASURED):
                self._handles.append(module.register_forward_hook(self._watch(f"{name}.weight")))

    def _watch(self, name: str) -> Callable[[nn.Module, tuple[Any, ...], Any], None]:
        def forward(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            inputs = args[0].detach()

            def backward(adjoint: Tensor) -> None:
                self._uses.setdefault(name, []).append((module, inputs, adjoint.detach()))

            output.register_hook(backward)

        return forward

    def spectra(self, groups: Mapping[str, Sequence[str]]) -> Spectra:
        """The singular values of every weight's gradient, for all samples and each group; the factors are let go."""
        masks = masks_of(groups)
        found: Spectra = {}
        for name, uses in self._uses.items():
            found[name] = {}
            for group, mask in masks.items():
                parts = [group_gradient(m, _of(a, mask), _of(d, mask)) for m, a, d in uses]
                found[name][group] = torch.linalg.svdvals(sum(parts[1:], start=parts[0]).flatten(1))
        self._uses.clear()
        return found

    def close(self) -> None:
        """Takes the hooks off."""
        for handle in self._handles:
            handle.remove()


def masks_of(groups: Mapping[str, Sequence[str]]) -> dict[str, Tensor | None]:
    """Group name -> which samples belong to it; None for all."""
    masks: dict[str, Tensor | None] = {"all": None}
    for grouping, labels in groups.items():
        for label in dict.fromkeys(labels):
            masks[f"{grouping}={label}"] = torch.tensor([one == label for one in labels])
    return masks


def _of(factor: Tensor, mask: Tensor | None) -> Tensor:
    return factor if mask is None else factor[mask.to(factor.device)]
