"""The models that are measured, with a batch and a loss."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

Problem = tuple[nn.Module, Tensor, Callable[[Tensor], Tensor]]


def transformer() -> Problem:
    """An encoder of 4 layers, width 256, on 150 tokens, batch 32."""
    layer = nn.TransformerEncoderLayer(256, 4, 1024, dropout=0.0, batch_first=True)
    encoder = nn.TransformerEncoder(layer, 4, enable_nested_tensor=False)
    model = nn.Sequential(nn.Linear(53, 256), encoder, nn.Linear(256, 2))
    return model, torch.randn(32, 150, 53), lambda output: output.mean(1).square().mean()


def cnn3d() -> Problem:
    """Three convolutions to 64 channels on volumes of 32 x 32 x 32, batch 8."""
    layers: list[nn.Module] = []
    for inner, outer in ((1, 16), (16, 32), (32, 64)):
        layers += [nn.Conv3d(inner, outer, 3, padding=1), nn.ReLU(), nn.MaxPool3d(2)]
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool3d(1), nn.Flatten(), nn.Linear(64, 2))
    return model, torch.randn(8, 1, 32, 32, 32), lambda output: output.square().mean()


MODELS = {"transformer": transformer, "cnn3d": cnn3d}
