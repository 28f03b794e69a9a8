"""The models that are measured, with a batch and a loss."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.benchmarks.gpt import GPT
from tests.benchmarks.resnet import resnet50 as build_resnet50

Problem = tuple[nn.Module, Tensor, Callable[[Any], Tensor]]
"""A model, a batch whose first axis counts samples, and the loss of the model's output."""

CHANNELS = (32, 64, 64, 128, 128, 256, 256, 512, 512)
POOLED = (32, 64, 128, 256)  # a pooling follows their last convolution: that of 512 channels has 4 positions a sample


def mlp() -> Problem:
    """1378 → 512 → 256 → 2, batch 64: a network on functional connectivity."""
    model = nn.Sequential(nn.Linear(1378, 512), nn.ReLU(), nn.Linear(512, 256), nn.ReLU(), nn.Linear(256, 2))
    return model, torch.randn(64, 1378), classified(64, classes=2)


class Recurrent(nn.Module):
    """An LSTM read out from the mean of its states."""

    def __init__(self, inputs: int, hidden: int, outputs: int) -> None:
        super().__init__()
        self.lstm = nn.LSTM(inputs, hidden, batch_first=True)
        self.head = nn.Linear(hidden, outputs)

    def forward(self, sequences: Tensor) -> Tensor:
        scores: Tensor = self.head(self.lstm(sequences)[0].mean(1))
        return scores


def lstm() -> Problem:
    """53 → 200, 150 steps, batch 32: a recurrent network on time courses."""
    return Recurrent(53, 200, 2), torch.randn(32, 150, 53), classified(32, classes=2)


def transformer() -> Problem:
    """An encoder of 4 layers, width 256, on 150 tokens, batch 32."""
    layer = nn.TransformerEncoderLayer(256, 4, 1024, dropout=0.0, batch_first=True)
    encoder = nn.TransformerEncoder(layer, 4, enable_nested_tensor=False)
    model = nn.Sequential(nn.Linear(53, 256), encoder, nn.Linear(256, 2))
    return model, torch.randn(32, 150, 53), lambda output: output.mean(1).square().mean()


def cnn2d() -> Problem:
    """Nine convolutions from 32 to 512 channels with batch norm on images of 3 x 32 x 32, batch 32."""
    layers: list[nn.Module] = []
    for place, (inner, outer) in enumerate(zip((3, *CHANNELS), CHANNELS, strict=False)):
        layers += [nn.Conv2d(inner, outer, 3, padding=1, bias=False), nn.BatchNorm2d(outer), nn.ReLU()]
        if outer in POOLED and outer not in CHANNELS[place + 1 :]:
            layers.append(nn.MaxPool2d(2))
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, 10))
    return model, torch.randn(32, 3, 32, 32), classified(32, classes=10)


def cnn3d() -> Problem:
    """Three convolutions to 64 channels on volumes of 32 x 32 x 32, batch 8."""
    layers: list[nn.Module] = []
    for inner, outer in ((1, 16), (16, 32), (32, 64)):
        layers += [nn.Conv3d(inner, outer, 3, padding=1), nn.ReLU(), nn.MaxPool3d(2)]
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool3d(1), nn.Flatten(), nn.Linear(64, 2))
    return model, torch.randn(8, 1, 32, 32, 32), lambda output: output.square().mean()


def gpt() -> Problem:
    """A causal language model of width 384, 6 layers, 6 heads, on 256 tokens of a vocabulary of 8192, batch 8."""
    tokens = torch.randint(8192, (8, 257))
    return GPT(8192, 256, width=384, layers=6, heads=6), tokens[:, :-1], next_token(tokens)


def gpt2() -> Problem:
    """GPT-2 small (124 M parameters) on 1024 tokens, batch 8."""
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, use_cache=False)
    tokens = torch.randint(config.vocab_size, (8, 1025))
    of_logits = next_token(tokens)
    return GPT2LMHeadModel(config), tokens[:, :-1], lambda output: of_logits(output.logits)


def resnet50() -> Problem:
    """ResNet-50 (25.6 M parameters) on images of 3 x 224 x 224, batch 32."""
    return build_resnet50(classes=1000), torch.randn(32, 3, 224, 224), classified(32, classes=1000)


def classified(samples: int, *, classes: int) -> Callable[[Tensor], Tensor]:
    """The mean cross-entropy to fixed classes."""
    target = torch.arange(samples) // 2 % classes
    return lambda scores: F.cross_entropy(scores, target)


def next_token(tokens: Tensor) -> Callable[[Tensor], Tensor]:
    """The mean cross-entropy of every token but a sequence's first, given those before it."""
    return lambda scores: F.cross_entropy(scores.flatten(0, 1), tokens[:, 1:].flatten())


MODELS = {"mlp": mlp, "lstm": lstm, "transformer": transformer, "cnn2d": cnn2d, "cnn3d": cnn3d, "gpt": gpt}
LARGE = {"gpt2": gpt2, "resnet50": resnet50}  # for a GPU: only when named


def problem(name: str, device: str = "cpu") -> Problem:
    """The model of that name with its batch and loss, the same at every call, made on `device`."""
    torch.manual_seed(0)
    with torch.device(device):
        return (MODELS | LARGE)[name]()
