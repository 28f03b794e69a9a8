"""The demo's three networks, in plain torch: nothing in them knows that it is being watched."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Recurrent(nn.Module):
    """A GRU over time that reads the left regions and tells the right ones, volume by volume."""

    def __init__(self, regions: int, *, hidden: int = 48) -> None:
        super().__init__()
        self.gru = nn.GRU(regions, hidden, batch_first=True)
        self.readout = nn.Linear(hidden, regions)

    def forward(self, left: Tensor) -> Tensor:
        return self.readout(self.gru(left)[0])


class Block(nn.Module):
    """Self-attention over time and a small perceptron, each behind a layer norm and beside a skip connection."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.before_attention, self.before_mlp = nn.LayerNorm(width), nn.LayerNorm(width)
        self.query, self.key, self.value = nn.Linear(width, width), nn.Linear(width, width), nn.Linear(width, width)
        self.out = nn.Linear(width, width)
        self.widen, self.narrow = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        seen = self.before_attention(x)
        q, k, v = (
            layer(seen).unflatten(-1, (self.heads, -1)).transpose(1, 2) for layer in (self.query, self.key, self.value)
        )
        x = x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return x + self.narrow(F.gelu(self.widen(self.before_mlp(x))))


class Attention(nn.Module):
    """A transformer over the volumes of a window."""

    def __init__(self, regions: int, time: int, *, width: int = 48, heads: int = 4, layers: int = 2) -> None:
        super().__init__()
        self.embed = nn.Linear(regions, width)
        self.position = nn.Parameter(0.02 * torch.randn(time, width))
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(layers)))
        self.norm = nn.LayerNorm(width)
        self.readout = nn.Linear(width, regions)

    def forward(self, left: Tensor) -> Tensor:
        return self.readout(self.norm(self.blocks(self.embed(left) + self.position)))


class FeedForward(nn.Module):
    """A perceptron from the left half's features (connectivity, pixels) to the right half's."""

    def __init__(self, features: int, *, hidden: int = 128) -> None:
        super().__init__()
        self.first = nn.Linear(features, hidden)
        self.second = nn.Linear(hidden, hidden)
        self.readout = nn.Linear(hidden, features)
        self.dropout = nn.Dropout(0.5)  # few people, many features: without it the network learns them by heart

    def forward(self, left: Tensor) -> Tensor:
        x = self.dropout(F.relu(self.first(self.dropout(left))))
        return self.readout(F.relu(self.second(x)))
