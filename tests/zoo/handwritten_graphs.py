"""Graphs, sets, splines, tables, and weights that are made of parameters."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

from tests.case import FEATURES, HIDDEN, OUTPUT, SAMPLES, TIME, Problem
from tests.zoo.handwritten_case import written

NODES = (2, 5, 3, 1, 4, 6, 2)


def graphs() -> dict[str, Tensor]:
    """A batch of small graphs: features of all nodes, edges within graphs, edge features, and the batch vector."""
    batch = torch.repeat_interleave(torch.arange(SAMPLES), torch.tensor(NODES))
    pairs = torch.randint(len(batch), (2, 149))
    edges = pairs[:, batch[pairs[0]] == batch[pairs[1]]]
    return {
        "x": torch.randn(len(batch), FEATURES),
        "edge_index": edges,
        "edge_attr": torch.randn(edges.shape[1], 3),
        "batch": batch,
    }


def scatter_softmax(scores: Tensor, index: Tensor, size: int) -> Tensor:
    """Softmax of the edges that end in one node."""
    shape = (size, scores.shape[1])
    where = index[:, None].expand_as(scores)
    top = scores.new_full(shape, -torch.inf).scatter_reduce(0, where, scores.detach(), "amax")
    weights = torch.exp(scores - top[index])
    return weights / scores.new_zeros(shape).index_add(0, index, weights)[index]


class MessagePassing(nn.Module):
    """GIN-like layers with edge features, and a readout per graph (mean and max)."""

    def __init__(self, layers: int = 2) -> None:
        super().__init__()
        self.stem, self.edge = nn.Linear(FEATURES, HIDDEN), nn.Linear(3, HIDDEN)
        self.updates = nn.ModuleList(
            nn.Sequential(nn.Linear(HIDDEN, 17), nn.ReLU(), nn.Linear(17, HIDDEN)) for _ in range(layers)
        )
        self.eps = nn.ParameterList(nn.Parameter(torch.tensor(0.1)) for _ in range(layers))
        self.norms = nn.ModuleList(nn.LayerNorm(HIDDEN) for _ in range(layers))
        self.readout = nn.Linear(2 * HIDDEN, OUTPUT)

    def forward(self, x: Tensor, edge_index: Tensor, edge_attr: Tensor, batch: Tensor) -> Tensor:
        source, target = edge_index
        h, edges = self.stem(x), self.edge(edge_attr)
        for update, eps, norm in zip(self.updates, self.eps, self.norms, strict=True):
            messages = torch.relu(h[source] + edges)
            total = torch.zeros_like(h).scatter_add(0, target[:, None].expand_as(messages), messages)
            h = h + norm(update((1 + eps) * h + total))
        size = int(batch.max()) + 1
        count = torch.bincount(batch, minlength=size)[:, None].to(h)
        mean = h.new_zeros(size, HIDDEN).index_add(0, batch, h) / count
        where = batch[:, None].expand_as(h)
        top = h.new_full((size, HIDDEN), -torch.inf).scatter_reduce(0, where, h, "amax")
        return self.readout(torch.cat([mean, top], dim=1))


@written("Message passing on graphs (GIN)", loop=False)
def message_passing() -> Problem:
    """Graph network with a batch vector."""
    return Problem(MessagePassing(), graphs())


class GraphAttention(nn.Module):
    """GAT: additive attention over neighbours, several heads."""

    def __init__(self, inner: int, outer: int, heads: int) -> None:
        super().__init__()
        self.heads, self.outer = heads, outer
        self.lin = nn.Linear(inner, heads * outer, bias=False)
        self.att_src = nn.Parameter(0.3 * torch.randn(1, heads, outer))
        self.att_dst = nn.Parameter(0.3 * torch.randn(1, heads, outer))
        self.bias = nn.Parameter(torch.zeros(heads * outer))

    def forward(self, x: Tensor, edge_index: Tensor) -> Tensor:
        source, target = edge_index
        h = self.lin(x).view(-1, self.heads, self.outer)
        scores = (h * self.att_src).sum(-1)[source] + (h * self.att_dst).sum(-1)[target]
        weights = scatter_softmax(F.leaky_relu(scores, 0.2), target, len(x))
        out = torch.zeros_like(h).index_add(0, target, weights[..., None] * h[source])
        return out.flatten(1) + self.bias


class GraphClassifier(nn.Module):
    """Two attention layers and attention pooling per graph."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = GraphAttention(FEATURES, 4, 2), GraphAttention(8, 5, 1)
        self.gate, self.head = nn.Linear(5, 1), nn.Linear(5, OUTPUT)

    def forward(self, x: Tensor, edge_index: Tensor, edge_attr: Tensor, batch: Tensor) -> Tensor:
        h = F.elu(self.second(F.elu(self.first(x, edge_index)), edge_index))
        size = int(batch.max()) + 1
        weights = scatter_softmax(self.gate(h), batch, size)
        return self.head(h.new_zeros(size, 5).index_add(0, batch, weights * h))


@written("GAT", loop=False)
def graph_attention() -> Problem:
    return Problem(GraphClassifier(), graphs())


class GraphConvolution(nn.Module):
    """GCN on the connectome of every person: normalised adjacency times features times weight."""

    def __init__(self) -> None:
        super().__init__()
        self.weights = nn.ParameterList([nn.Parameter(0.3 * torch.randn(5, HIDDEN)), nn.Parameter(torch.eye(HIDDEN))])
        self.head = nn.Linear(HIDDEN, OUTPUT)

    def forward(self, adjacency: Tensor, x: Tensor) -> Tensor:
        a = adjacency.abs() + torch.eye(adjacency.shape[1]).to(adjacency)
        degree = a.sum(-1).rsqrt()
        a = degree[:, :, None] * a * degree[:, None, :]
        for weight in self.weights:
            x = torch.relu(a @ (x @ weight))
        return self.head(x.mean(1))


@written("GCN on connectomes")
def graph_convolution() -> Problem:
    inputs = {"adjacency": torch.randn(SAMPLES, FEATURES, FEATURES), "x": torch.randn(SAMPLES, FEATURES, 5)}
    return Problem(GraphConvolution(), inputs)


class DeepSet(nn.Module):
    """Elements of a set, of different sizes by mask, pooled by gated attention (multiple-instance learning)."""

    def __init__(self) -> None:
        super().__init__()
        self.phi = nn.Sequential(nn.Linear(FEATURES, HIDDEN), nn.ReLU())
        self.v, self.u, self.w = nn.Linear(HIDDEN, 5), nn.Linear(HIDDEN, 5), nn.Linear(5, 1)
        self.rho = nn.Linear(HIDDEN, OUTPUT)

    def forward(self, x: Tensor, there: Tensor) -> Tensor:
        h = self.phi(x)
        score = self.w(torch.tanh(self.v(h)) * torch.sigmoid(self.u(h))).masked_fill(~there[..., None], -torch.inf)
        return self.rho((torch.softmax(score, dim=1) * h).sum(1))


@written("Multiple-instance learning (gated attention)")
def multiple_instance_learning() -> Problem:
    there = torch.arange(TIME) < torch.tensor([5, 3, 1, 4, 2, 5, 3])[:, None]
    return Problem(DeepSet(), (torch.randn(SAMPLES, TIME, FEATURES), there))


class SplineLayer(nn.Module):
    """A Kolmogorov-Arnold layer: a B-spline on every edge, beside a plain SiLU part."""

    grid: Tensor

    def __init__(self, inner: int, outer: int, intervals: int = 4, order: int = 3) -> None:
        super().__init__()
        self.order = order
        grid = torch.arange(-order, intervals + order + 1) * (2 / intervals) - 1
        self.register_buffer("grid", grid.expand(inner, -1).contiguous())
        self.base_weight = nn.Parameter(0.3 * torch.randn(outer, inner))
        self.spline_weight = nn.Parameter(0.1 * torch.randn(outer, inner, intervals + order))
        self.spline_scaler = nn.Parameter(torch.ones(outer, inner))

    def bases(self, x: Tensor) -> Tensor:
        x, grid = x.unsqueeze(-1), self.grid
        b = ((x >= grid[:, :-1]) & (x < grid[:, 1:])).to(x.dtype)
        for k in range(1, self.order + 1):
            left = (x - grid[:, : -(k + 1)]) / (grid[:, k:-1] - grid[:, : -(k + 1)]) * b[..., :-1]
            b = left + (grid[:, k + 1 :] - x) / (grid[:, k + 1 :] - grid[:, 1:-k]) * b[..., 1:]
        return b

    def forward(self, x: Tensor) -> Tensor:
        weight = self.spline_weight * self.spline_scaler.unsqueeze(-1)
        splines = F.linear(self.bases(x).flatten(1), weight.flatten(1))
        return F.linear(F.silu(x), self.base_weight) + splines


@written("Kolmogorov–Arnold network")
def kolmogorov_arnold_network() -> Problem:
    return Problem(nn.Sequential(SplineLayer(5, 7), SplineLayer(7, OUTPUT)), torch.randn(SAMPLES, 5))


class Recommender(nn.Module):
    """Wide and deep: tables of categories, bags of items, crossed and dense features, a factorisation machine."""

    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.tables = nn.ModuleList(nn.Embedding(size, width) for size in (5, 7))
        self.history = nn.EmbeddingBag(11, width, mode="mean")
        self.dense = nn.Linear(3, width)
        self.deep = nn.Sequential(nn.Linear(4 * width, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, 1))
        self.wide = nn.ModuleList(nn.Embedding(size, 1) for size in (5, 7))
        self.bias = nn.Parameter(torch.zeros(1))

    def forward(self, categories: Tensor, items: Tensor, offsets: Tensor, numbers: Tensor) -> Tensor:
        parts = [table(categories[:, n]) for n, table in enumerate(self.tables)]
        fields = torch.stack([*parts, self.history(items, offsets), self.dense(numbers)], dim=1)
        pairs = 0.5 * (fields.sum(1).square() - fields.square().sum(1)).sum(1, keepdim=True)
        wide = sum(table(categories[:, n]) for n, table in enumerate(self.wide))
        return self.deep(fields.flatten(1)) + pairs + wide + self.bias


@written("Wide and deep recommender", loop=False)
def wide_and_deep_recommender() -> Problem:
    categories = torch.stack([torch.randint(5, (SAMPLES,)), torch.randint(7, (SAMPLES,))], dim=1)
    lengths = torch.tensor([3, 1, 4, 2, 5, 1, 2])
    inputs = {
        "categories": categories,
        "items": torch.randint(11, (int(lengths.sum()),)),
        "offsets": F.pad(lengths.cumsum(0)[:-1], (1, 0)),
        "numbers": torch.randn(SAMPLES, 3),
    }
    return Problem(Recommender(), inputs)


class LoraLinear(nn.Module):
    """A frozen layer and a trained update of low rank."""

    def __init__(self, base: nn.Linear, rank: int, alpha: float) -> None:
        super().__init__()
        self.base, self.scaling = base.requires_grad_(False), alpha / rank
        self.dropout = nn.Dropout(0.1)
        self.lora_A = nn.Parameter(0.3 * torch.randn(rank, base.in_features))
        self.lora_B = nn.Parameter(0.1 * torch.randn(base.out_features, rank))

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + (self.dropout(x) @ self.lora_A.T @ self.lora_B.T) * self.scaling


@written("LoRA on a frozen base", loop=False)
def lora_on_a_frozen_base() -> Problem:
    """Every linear layer of a frozen network replaced by itself and an adapter of rank 2; only the head is trained."""
    layers = (LoraLinear(nn.Linear(FEATURES, HIDDEN), 2, 4.0), nn.GELU(), LoraLinear(nn.Linear(HIDDEN, HIDDEN), 2, 4.0))
    model = nn.Sequential(*layers, nn.LayerNorm(HIDDEN).requires_grad_(False), nn.Linear(HIDDEN, OUTPUT))
    return Problem(model, torch.randn(SAMPLES, TIME, FEATURES))


class LowRank(nn.Module):
    """A parametrization: the frozen weight and a product of two trained matrices (merged LoRA)."""

    def __init__(self, outer: int, inner: int, rank: int) -> None:
        super().__init__()
        self.down = nn.Parameter(0.3 * torch.randn(rank, inner))
        self.up = nn.Parameter(0.1 * torch.randn(outer, rank))

    def forward(self, weight: Tensor) -> Tensor:
        return weight + 2.0 * self.up @ self.down


class Symmetric(nn.Module):
    """A parametrization: the upper triangle, mirrored."""

    def forward(self, weight: Tensor) -> Tensor:
        return weight.triu() + weight.triu(1).transpose(-1, -2)


@written("Parametrized weights (orthogonal, weight norm, symmetric, merged LoRA)")
def parametrized_network() -> Problem:
    """Orthogonal, weight norm, a symmetric weight, and merged LoRA, each by `torch.nn.utils.parametrize`."""
    first, second = nn.Linear(FEATURES, HIDDEN), nn.Linear(HIDDEN, HIDDEN)
    third, last = nn.Linear(HIDDEN, HIDDEN), nn.Linear(HIDDEN, OUTPUT)
    parametrizations.orthogonal(first)
    parametrizations.weight_norm(second)
    parametrize.register_parametrization(third, "weight", Symmetric())
    last.weight.requires_grad_(False)
    parametrize.register_parametrization(last, "weight", LowRank(OUTPUT, HIDDEN, 2))
    layers = (first, nn.Tanh(), second, nn.Tanh(), third, nn.Tanh(), last)
    return Problem(nn.Sequential(*layers), torch.randn(SAMPLES, FEATURES))
