"""Routing, folding, graphs, checkpoints, custom functions, reparametrised weights, and unusual outputs and losses."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint

from tests.case import FEATURES, HIDDEN, OUTPUT, SAMPLES, TIME, Apply, Case, Problem, SquaredError, case


def parameter(*shape: int) -> nn.Parameter:
    return nn.Parameter(0.3 * torch.randn(*shape))


def vectors() -> Tensor:
    return torch.randn(SAMPLES, FEATURES)


def sequences() -> Tensor:
    return torch.randn(SAMPLES, TIME, FEATURES)


def small_mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(FEATURES, HIDDEN), nn.Tanh(), nn.Linear(HIDDEN, OUTPUT))


# Whose row is it?


@case()
def top_k_experts() -> Problem:
    """Tokens routed to experts by index_select and brought back by index_add."""

    def forward(m: Apply, x: Tensor) -> Tensor:
        tokens = x.reshape(-1, FEATURES)
        weights, chosen = torch.softmax(m.router(tokens), dim=-1).topk(2, dim=-1)
        total = tokens.new_zeros(tokens.shape[0], HIDDEN)
        for number, expert in enumerate(m.experts):
            token, slot = torch.where(chosen == number)
            mixed = expert(tokens.index_select(0, token)) * weights[token, slot, None]
            total = total.index_add(0, token, mixed)
        return m.head(total).view(*x.shape[:2], -1)

    experts = nn.ModuleList(nn.Sequential(nn.Linear(FEATURES, HIDDEN), nn.GELU()) for _ in range(4))
    parts = {"router": nn.Linear(FEATURES, 4), "experts": experts, "head": nn.Linear(HIDDEN, OUTPUT)}
    return Problem(Apply(forward, **parts), sequences())


@case()
def windows_folded_into_batch() -> Problem:
    """Windows of one sample next to each other."""

    def forward(m: Apply, x: Tensor) -> Tensor:
        return m.head(m.body(x.flatten(0, 1)).unflatten(0, (-1, TIME)).mean(1))

    return Problem(Apply(forward, body=small_mlp(), head=nn.Linear(OUTPUT, 2)), sequences())


@case()
def windows_major_folding() -> Problem:
    """The first window of all samples, then the second: the other way to fold."""

    def forward(m: Apply, x: Tensor) -> Tensor:
        folded = x.transpose(0, 1).reshape(-1, FEATURES)
        return m.head(m.body(folded).view(TIME, -1, OUTPUT).sum(0))

    return Problem(Apply(forward, body=small_mlp(), head=nn.Linear(OUTPUT, 2)), sequences())


@case()
def shifted_windows() -> Problem:
    """Swin: two image axes cut into windows, windows folded into the batch, and put back."""

    def forward(m: Apply, x: Tensor) -> Tensor:
        n, h, w, c = x.shape
        windows = x.roll((-1, -1), (1, 2)).view(n, h // 2, 2, w // 2, 2, c).permute(0, 1, 3, 2, 4, 5).reshape(-1, 4, c)
        mixed = m.attention(windows, windows, windows, need_weights=False)[0]
        back = mixed.view(n, h // 2, w // 2, 2, 2, c).permute(0, 1, 3, 2, 4, 5).reshape(n, h, w, c)
        return m.head(back).mean((1, 2))

    parts = {"attention": nn.MultiheadAttention(6, 2, batch_first=True), "head": nn.Linear(6, OUTPUT)}
    return Problem(Apply(forward, **parts), torch.randn(SAMPLES, 4, 6, 6))


@case()
def boolean_mask() -> Problem:
    """Padding dropped by a boolean index: positions of all samples in one list of rows."""

    def forward(m: Apply, x: Tensor, keep: Tensor) -> Tensor:
        rows = m.body(x[keep])
        return x.new_zeros(*keep.shape, OUTPUT).masked_scatter(keep[..., None], rows)

    keep = torch.arange(TIME) < torch.tensor([5, 3, 1, 4, 2, 5, 3])[:, None]
    return Problem(Apply(forward, body=small_mlp()), (sequences(), keep))


@case(loop=False)
def shuffled_samples() -> Problem:
    """A random permutation of the samples inside the model, undone at its end."""

    def forward(m: Apply, x: Tensor) -> Tensor:
        order = torch.randperm(x.shape[0])
        return m.body(x[order])[order.argsort()]

    return Problem(Apply(forward, body=small_mlp()), vectors())


@case(loop=False)
def graph_network() -> Problem:
    """Message passing over the nodes of many graphs, and one readout per graph by the batch vector."""

    def forward(m: Apply, x: Tensor, edges: Tensor, batch: Tensor) -> Tensor:
        source, target = edges
        messages = torch.tanh(m.message(torch.cat([x[source], x[target]], dim=1)))
        x = m.update(x) + x.new_zeros(x.shape[0], HIDDEN).index_add_(0, target, messages)
        pooled = x.new_zeros(SAMPLES, HIDDEN).index_add_(0, batch, F.relu(x))
        return m.readout(pooled)

    batch = torch.repeat_interleave(torch.arange(SAMPLES), torch.tensor([2, 5, 3, 1, 4, 6, 2]))
    pairs = torch.randint(len(batch), (2, 97))
    edges = pairs[:, batch[pairs[0]] == batch[pairs[1]]]
    parts = {"message": nn.Linear(2 * FEATURES, HIDDEN), "update": nn.Linear(FEATURES, HIDDEN)}
    inputs = {"x": torch.randn(len(batch), FEATURES), "edges": edges, "batch": batch}
    return Problem(Apply(forward, **parts, readout=nn.Linear(HIDDEN, OUTPUT)), inputs)


@case()
def siamese() -> Problem:
    """Two views of every sample through one encoder, stacked along the batch."""

    def forward(m: Apply, left: Tensor, right: Tensor) -> Tensor:
        a, b = m.body(torch.cat([left, right])).chunk(2)
        return a * b

    return Problem(Apply(forward, body=small_mlp()), (vectors(), vectors()))


@case()
def chunked_batch() -> Problem:
    """The batch in pieces, the last one smaller: no call sees all samples."""

    def forward(m: Apply, x: Tensor) -> Tensor:
        return m.head(torch.cat([m.body(piece) for piece in x.split(3)]))

    return Problem(Apply(forward, body=small_mlp(), head=nn.Linear(OUTPUT, 2)), sequences())


@case()
def repeated_samples() -> Problem:
    """Three noisy copies of every sample, whose outputs are averaged."""

    def forward(m: Apply, x: Tensor) -> Tensor:
        copies = x.repeat_interleave(3, dim=0) + m.offsets.repeat(len(x), 1)
        return m.body(copies).view(-1, 3, OUTPUT).mean(1)

    return Problem(Apply(forward, body=small_mlp(), offsets=torch.randn(3, FEATURES)), vectors())


@case()
def dynamic_convolution() -> Problem:
    """A kernel per sample, mixed from shared ones; samples become groups of channels."""

    def forward(m: Apply, x: Tensor) -> Tensor:
        n, channels, length = x.shape
        share = torch.softmax(m.router(x.mean(2)), dim=1)
        kernels = (share @ m.kernels).view(n * OUTPUT, channels, 3)
        return F.conv1d(x.reshape(1, n * channels, length), kernels, groups=n).view(n, OUTPUT, -1)

    parts = {"router": nn.Linear(2, 5), "kernels": parameter(5, OUTPUT * 2 * 3)}
    return Problem(Apply(forward, **parts), torch.randn(SAMPLES, 2, 11))


@case(opaque=True)
def mapped_over_samples() -> Problem:
    """A layer under torch.vmap: the calls inside see one sample of no batch."""

    def forward(m: Apply, x: Tensor) -> Tensor:
        return m.head(torch.vmap(lambda one: torch.tanh(one @ m.weight))(x))

    return Problem(Apply(forward, weight=parameter(FEATURES, HIDDEN), head=nn.Linear(HIDDEN, OUTPUT)), sequences())


# Checkpoints and custom functions


def _checkpointed(use_reentrant: bool, dropout: float) -> Problem:
    def forward(m: Apply, x: Tensor) -> Tensor:
        return m.head(checkpoint(m.block, m.stem(x), use_reentrant=use_reentrant))

    block = nn.Sequential(nn.Linear(HIDDEN, 17), nn.GELU(), nn.Dropout(dropout), nn.Linear(17, HIDDEN))
    parts = {"stem": nn.Linear(FEATURES, HIDDEN), "block": block, "head": nn.Linear(HIDDEN, OUTPUT)}
    return Problem(Apply(forward, **parts), sequences())


class Multiply(torch.autograd.Function):
    """A product and its gradients by hand: nobody outside sees the call that meets the weight."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return x @ weight

    @staticmethod
    def backward(ctx: Any, adjoint: Tensor) -> tuple[Tensor, Tensor]:
        x, weight = ctx.saved_tensors
        return adjoint @ weight.T, x.flatten(0, -2).T @ adjoint.flatten(0, -2)


class Swish(torch.autograd.Function):
    """An activation without parameters: values pass through it, rows stay rows."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x * torch.sigmoid(x)

    @staticmethod
    def backward(ctx: Any, adjoint: Tensor) -> Tensor:
        gate = torch.sigmoid(ctx.saved_tensors[0])
        return adjoint * gate * (1 + ctx.saved_tensors[0] * (1 - gate))


@case(opaque=True)
def custom_function() -> Problem:
    def forward(m: Apply, x: Tensor) -> Tensor:
        return m.head(torch.tanh(Multiply.apply(x, m.weight)))

    return Problem(Apply(forward, weight=parameter(FEATURES, HIDDEN), head=nn.Linear(HIDDEN, OUTPUT)), sequences())


@case(opaque=True)
def custom_function_and_visible_use() -> Problem:
    """One weight, used where it is seen and where it is not."""

    def forward(m: Apply, x: Tensor) -> Tensor:
        return m.head(torch.tanh(Multiply.apply(x, m.weight)) + torch.sin(x @ m.weight))

    return Problem(Apply(forward, weight=parameter(FEATURES, HIDDEN), head=nn.Linear(HIDDEN, OUTPUT)), vectors())


@case()
def custom_activation() -> Problem:
    def forward(m: Apply, x: Tensor) -> Tensor:
        return m.last(Swish.apply(m.first(x)))

    return Problem(Apply(forward, first=nn.Linear(FEATURES, HIDDEN), last=nn.Linear(HIDDEN, OUTPUT)), sequences())


@case(opaque=True)
def deep_equilibrium() -> Problem:
    """A fixed point, whose adjoint is solved for by running the layer again inside the backward pass."""

    def forward(m: Apply, x: Tensor) -> Tensor:
        def layer(z: Tensor) -> Tensor:
            return torch.tanh(m.inner(z) + m.outer(x))

        with torch.no_grad():
            z = x.new_zeros(len(x), HIDDEN)
            for _ in range(60):
                z = layer(z)
        z = layer(z)
        if torch.is_grad_enabled():
            start = z.detach().requires_grad_()
            again = layer(start)

            def solve(adjoint: Tensor) -> Tensor:
                found = adjoint
                for _ in range(60):
                    found = torch.autograd.grad(again, start, found, retain_graph=True)[0] + adjoint
                return found

            z.register_hook(solve)
        return m.head(z)

    inner = nn.Linear(HIDDEN, HIDDEN)
    nn.init.uniform_(inner.weight, -0.1, 0.1)
    parts = {"inner": inner, "outer": nn.Linear(FEATURES, HIDDEN), "head": nn.Linear(HIDDEN, OUTPUT)}
    return Problem(Apply(forward, **parts), vectors())


# Weights that are not parameters


def _reparametrised(change: Callable[[nn.Module], nn.Module]) -> Problem:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the old weight norm says that it is old
        first = change(nn.Linear(FEATURES, HIDDEN))
    return Problem(nn.Sequential(first, nn.Tanh(), nn.Linear(HIDDEN, OUTPUT)), sequences())


def _masked_weight(m: Apply, x: Tensor) -> Tensor:
    return F.linear(torch.tanh(F.linear(x, m.weight * m.mask, m.bias)), m.last)


def _masked(as_buffer: bool) -> Problem:
    parts = {"weight": parameter(HIDDEN, FEATURES), "bias": parameter(HIDDEN), "last": parameter(OUTPUT, HIDDEN)}
    model = Apply(_masked_weight, **parts)
    mask = (torch.rand(HIDDEN, FEATURES) > 0.4).to(model.weight.dtype)
    if as_buffer:
        model.register_buffer("mask", mask)
    else:
        model.mask = mask
    return Problem(model, vectors())


REENTRANT = {True: "reentrant", False: "non_reentrant"}
FAMILY = [
    *(Case(f"checkpoint_{name}", partial(_checkpointed, kind, 0.0)) for kind, name in REENTRANT.items()),
    *(
        Case(f"checkpoint_{name}_dropout", partial(_checkpointed, kind, 0.4), loop=False)
        for kind, name in REENTRANT.items()
    ),
    Case("weight_norm", partial(_reparametrised, parametrizations.weight_norm)),
    Case("weight_norm_old", partial(_reparametrised, torch.nn.utils.weight_norm)),
    Case("spectral_norm", partial(_reparametrised, parametrizations.spectral_norm)),
    Case("orthogonal", partial(_reparametrised, parametrizations.orthogonal)),
    Case("masked_weight_buffer", partial(_masked, True)),
    Case("masked_weight_attribute", partial(_masked, False)),
]


@case(loop=False)
def dropped_weight() -> Problem:
    """Dropout on a weight."""

    def forward(m: Apply, x: Tensor) -> Tensor:
        return m.head(torch.tanh(F.linear(x, F.dropout(m.weight, 0.4, training=m.training))))

    return Problem(Apply(forward, weight=parameter(HIDDEN, FEATURES), head=nn.Linear(HIDDEN, OUTPUT)), sequences())


@case()
def weight_standardisation() -> Problem:
    def forward(m: Apply, x: Tensor) -> Tensor:
        weight = (m.weight - m.weight.mean((1, 2), keepdim=True)) / m.weight.std((1, 2), keepdim=True)
        return F.conv1d(x, weight, m.bias, padding=1).relu().mean(2)

    return Problem(Apply(forward, weight=parameter(OUTPUT, 2, 3), bias=parameter(OUTPUT)), torch.randn(SAMPLES, 2, 11))


@case()
def weights_from_a_network() -> Problem:
    """The weight is a layer's output for a constant: the layer is parameter-only as a whole."""

    def forward(m: Apply, x: Tensor) -> Tensor:
        return F.linear(x, torch.tanh(m.maker(m.codes)))

    parts = {"codes": torch.randn(OUTPUT, 2), "maker": nn.Linear(2, FEATURES)}
    return Problem(Apply(forward, **parts), sequences())


@case()
def stacked_parameters() -> Problem:
    """Three parameters joined into one weight."""

    def forward(m: Apply, x: Tensor) -> Tensor:
        return F.linear(x, torch.cat([m.query, m.key, m.value]), torch.cat([m.bias, m.bias.neg(), m.bias]))

    parts = {name: parameter(3, FEATURES) for name in ("query", "key", "value")}
    return Problem(Apply(forward, **parts, bias=parameter(3)), sequences())


# Outputs and losses


@dataclass
class Scored:
    """What a model that computes its own loss returns."""

    loss: Tensor | None
    logits: Tensor


@dataclass(frozen=True)
class CrossEntropy:
    """Per-sample cross entropy against a batch's own targets."""

    targets: tuple[int, ...]
    samples: tuple[int, ...] = tuple(range(SAMPLES))

    def __call__(self, output: Any) -> Tensor:
        targets = torch.tensor([self.targets[sample] for sample in self.samples])
        return F.cross_entropy(output.logits, targets, reduction="none")


@case()
def own_loss() -> Problem:
    """The model takes the labels and computes its own mean loss."""

    def forward(m: Apply, x: Tensor, labels: Tensor | None = None) -> Scored:
        logits = m.body(x)
        return Scored(None if labels is None else F.cross_entropy(logits, labels), logits)

    targets = (0, 2, 1, 1, 0, 2, 2)
    inputs = {"x": vectors(), "labels": torch.tensor(targets)}
    return Problem(Apply(forward, body=small_mlp()), inputs, CrossEntropy(targets), loss=lambda output: output.loss)


@case()
def dictionary_output() -> Problem:
    """Two outputs by name, both in the loss, with sample axes of their own."""

    def forward(m: Apply, x: Tensor) -> dict[str, Tensor]:
        hidden = torch.tanh(m.stem(x))
        return {"label": m.label(hidden.mean(1)), "frames": m.frames(hidden)}

    def read(output: dict[str, Tensor]) -> Tensor:
        return torch.cat([output["label"], output["frames"].flatten(1)], dim=1)

    parts = {"stem": nn.Linear(FEATURES, HIDDEN), "label": nn.Linear(HIDDEN, 2), "frames": nn.Linear(HIDDEN, OUTPUT)}
    return Problem(Apply(forward, **parts), sequences(), SquaredError(read=read))


@case()
def unused_output() -> Problem:
    """The loss reads only one of two outputs; the other's layer gets no gradient."""

    def forward(m: Apply, x: Tensor) -> tuple[Tensor, Tensor]:
        hidden = torch.tanh(m.stem(x))
        return m.used(hidden), m.unused(hidden)

    parts = {"stem": nn.Linear(FEATURES, HIDDEN), "used": nn.Linear(HIDDEN, 2), "unused": nn.Linear(HIDDEN, OUTPUT)}
    return Problem(Apply(forward, **parts), sequences(), SquaredError(read=lambda output: output[0]))


@case()
def auxiliary_output() -> Problem:
    """A penalty on a hidden value that the model returns beside its output."""

    def forward(m: Apply, x: Tensor) -> tuple[Tensor, Tensor]:
        hidden = torch.tanh(m.first(x))
        return m.last(hidden), hidden

    def read(output: tuple[Tensor, Tensor]) -> Tensor:
        return torch.cat([output[0], 0.3 * output[1]], dim=1)

    parts = {"first": nn.Linear(FEATURES, HIDDEN), "last": nn.Linear(HIDDEN, OUTPUT)}
    return Problem(Apply(forward, **parts), vectors(), SquaredError(read=read))


class Remembers(nn.Module):
    """A model that keeps a hidden value for its user to penalise."""

    def __init__(self, aside: nn.Module) -> None:
        super().__init__()
        self.first = nn.Linear(FEATURES, HIDDEN)
        self.aside = aside
        self.last = nn.Linear(HIDDEN, OUTPUT)
        self.hidden: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.tanh(self.first(x))
        self.hidden = self.aside(hidden)
        return self.last(hidden)


@dataclass(frozen=True)
class Penalised:
    """A squared error and a penalty on the value that the model remembers."""

    model: Remembers
    samples: tuple[int, ...] = tuple(range(SAMPLES))

    def __call__(self, output: Tensor) -> Tensor:
        assert self.model.hidden is not None
        return SquaredError(samples=self.samples)(output) + 0.3 * self.model.hidden.square().sum(1)


@case()
def auxiliary_hidden() -> Problem:
    """A penalty on a hidden value that is no output."""
    model = Remembers(nn.Identity())
    return Problem(model, vectors(), Penalised(model))


@case(ungrouped=("aside.weight", "aside.bias"))
def auxiliary_head() -> Problem:
    """A penalised layer from which no path leads to the output."""
    model = Remembers(nn.Linear(HIDDEN, 2))
    return Problem(model, vectors(), Penalised(model))


@dataclass(frozen=True)
class Contrast:
    """Each sample against all others: the loss couples samples, the model does not."""

    samples: tuple[int, ...] = tuple(range(SAMPLES))

    def __call__(self, output: Tensor) -> Tensor:
        likeness = F.normalize(output, dim=1) @ F.normalize(output, dim=1).T
        return F.cross_entropy(3 * likeness.roll(1, 1), torch.arange(len(output)), reduction="none")


@case(coupled=True)
def contrastive_loss() -> Problem:
    return Problem(small_mlp(), vectors(), Contrast())
