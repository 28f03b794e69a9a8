"""Networks for language and other sets of tokens: translation, transformers, routed experts, latents."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.case import FEATURES, OUTPUT, SAMPLES, TIME, Problem
from tests.zoo.handwritten_case import written

WORDS = 19


def words(length: int = TIME) -> Tensor:
    """Sentences without padding, which is word 0."""
    return torch.randint(1, WORDS, (SAMPLES, length))


class Translator(nn.Module):
    """A GRU reads; an LSTM cell writes, word by word, attending to what was read, told the right word or its own."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.source, self.target = nn.Embedding(WORDS, width, padding_idx=0), nn.Embedding(WORDS, width)
        self.reader = nn.GRU(width, width, batch_first=True)
        self.cell = nn.LSTMCell(2 * width, width)
        self.query, self.key = nn.Linear(width, width, bias=False), nn.Linear(width, width, bias=False)
        self.score = nn.Linear(width, 1, bias=False)
        self.head = nn.Linear(2 * width, WORDS)

    def attend(self, state: Tensor, read: Tensor) -> Tensor:
        scores = self.score(torch.tanh(self.query(state)[:, None] + self.key(read)))
        return (torch.softmax(scores, dim=1) * read).sum(1)

    def forward(self, source: Tensor, target: Tensor, forcing: float = 0.5) -> Tensor:
        read, last = self.reader(self.source(source))
        hidden, memory = last[0], torch.zeros_like(last[0])
        word, logits = target[:, 0], []
        for position in range(1, target.shape[1]):
            context = self.attend(hidden, read)
            hidden, memory = self.cell(torch.cat([self.target(word), context], dim=1), (hidden, memory))
            logits.append(self.head(torch.cat([hidden, context], dim=1)))
            told = torch.rand(()) < forcing
            word = target[:, position] if told else logits[-1].argmax(1)
        return torch.stack(logits, dim=1)


@dataclass(frozen=True)
class NextWord:
    """Per-sample mean cross entropy of the words that follow, padding left out."""

    targets: Tensor
    samples: tuple[int, ...] = tuple(range(SAMPLES))

    def __call__(self, logits: Tensor) -> Tensor:
        targets = self.targets[list(self.samples)]
        losses = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=0, reduction="none")
        return losses.view_as(targets).sum(1) / (targets != 0).sum(1)


@written("Sequence to sequence with attention and teacher forcing", loop=False)
def translation_with_attention() -> Problem:
    """Sequence to sequence with teacher forcing."""
    target = words(6) * (torch.arange(6) < torch.tensor([6, 4, 5, 6, 3, 4, 6])[:, None])
    return Problem(Translator(), (words(), target), NextWord(target[:, 1:]))


def rotate(x: Tensor) -> Tensor:
    """Rotary embedding of (samples, heads, positions, features)."""
    half = x.shape[-1] // 2
    rates = 10000 ** (-torch.arange(half, device=x.device) / half)
    angles = (torch.arange(x.shape[-2], device=x.device)[:, None] * rates).to(x)
    left, right = x.chunk(2, dim=-1)
    return torch.cat([left * angles.cos() - right * angles.sin(), right * angles.cos() + left * angles.sin()], dim=-1)


class RmsNorm(nn.Module):
    """Root mean square norm, written out."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6))


class CausalAttention(nn.Module):
    """Rotary self-attention with fewer heads for keys and values."""

    def __init__(self, width: int, heads: int, kv_heads: int) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.size = heads, kv_heads, width // heads
        self.wq = nn.Linear(width, width, bias=False)
        self.wkv = nn.Linear(width, 2 * kv_heads * self.size, bias=False)
        self.wo = nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        n, t, _ = x.shape
        q = self.wq(x).view(n, t, self.heads, self.size).transpose(1, 2)
        k, v = self.wkv(x).view(n, t, 2 * self.kv_heads, self.size).transpose(1, 2).chunk(2, dim=1)
        k, v = (z.repeat_interleave(self.heads // self.kv_heads, dim=1) for z in (rotate(k), v))
        mixed = F.scaled_dot_product_attention(rotate(q), k, v, is_causal=True)
        return self.wo(mixed.transpose(1, 2).reshape(n, t, -1))


class GatedMlp(nn.Module):
    """SwiGLU."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.w1, self.w3 = nn.Linear(width, hidden, bias=False), nn.Linear(width, hidden, bias=False)
        self.w2 = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class Routed(nn.Module):
    """Every token goes to two of the experts, the way most people write it."""

    def __init__(self, width: int, hidden: int, experts: int = 4, top: int = 2) -> None:
        super().__init__()
        self.gate = nn.Linear(width, experts, bias=False)
        self.experts, self.top = nn.ModuleList(GatedMlp(width, hidden) for _ in range(experts)), top

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])
        weights, chosen = torch.topk(torch.softmax(self.gate(flat), dim=-1), self.top)
        weights = weights / weights.sum(-1, keepdim=True)
        results = torch.zeros_like(flat)
        for number, expert in enumerate(self.experts):
            token, slot = torch.where(chosen == number)
            results[token] += weights[token, slot, None] * expert(flat[token])
        return results.view_as(x)


class LanguageModel(nn.Module):
    """Decoder-only, with the embedding as its head."""

    def __init__(self, width: int = 12, layers: int = 2, routed: bool = False) -> None:
        super().__init__()
        self.embedding = nn.Embedding(WORDS, width)
        make = Routed if routed else GatedMlp
        self.attentions = nn.ModuleList(CausalAttention(width, 3, 1) for _ in range(layers))
        self.mlps = nn.ModuleList(make(width, 17) for _ in range(layers))
        self.norms = nn.ModuleList(RmsNorm(width) for _ in range(2 * layers + 1))
        self.head = nn.Linear(width, WORDS, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        for number, (attention, mlp) in enumerate(zip(self.attentions, self.mlps, strict=True)):
            x = x + attention(self.norms[2 * number](x))
            x = x + mlp(self.norms[2 * number + 1](x))
        return self.head(self.norms[-1](x))


@written("Decoder with rotary embedding and gated MLP")
def rotary_language_model() -> Problem:
    """Rotary embedding, grouped-query attention, RMS norm, gated MLP, tied head."""
    text = words(TIME + 1)
    return Problem(LanguageModel(), text[:, :-1], NextWord(text[:, 1:]))


@written("Mixture of experts, top-k routing, by hand")
def mixture_of_experts() -> Problem:
    """The same with top-k routed experts."""
    text = words(TIME + 1)
    return Problem(LanguageModel(routed=True), text[:, :-1], NextWord(text[:, 1:]))


class SwitchClassifier(nn.Module):
    """Top-1 routing, each expert's result times its probability, and Switch's balance loss of the whole batch."""

    def __init__(self, width: int = 6, experts: int = 3) -> None:
        super().__init__()
        self.embedding, self.gate = nn.Embedding(WORDS, width), nn.Linear(width, experts)
        self.experts, self.head = nn.ModuleList(GatedMlp(width, 7) for _ in range(experts)), nn.Linear(width, WORDS)

    def forward(self, tokens: Tensor) -> dict[str, Tensor]:
        x = self.embedding(tokens).flatten(0, 1)
        probability = torch.softmax(self.gate(x), dim=-1)
        best, chosen = probability.max(-1)
        mixed = torch.zeros_like(x)
        for number, expert in enumerate(self.experts):
            (token,) = torch.where(chosen == number)
            mixed[token] = best[token, None] * expert(x[token])
        load = F.one_hot(chosen, len(self.experts)).to(x).mean(0)
        balance = len(self.experts) * (load * probability.mean(0)).sum()
        each = len(self.experts) * (load * probability.view(len(tokens), -1, len(load)).mean(1)).sum(1)
        return {"logits": self.head((x + mixed).view(*tokens.shape, -1)), "balance": balance, "each": each}


@dataclass(frozen=True)
class Balanced(NextWord):
    """Cross entropy and every sample's part of the balance loss."""

    def __call__(self, output: dict[str, Tensor]) -> Tensor:
        return super().__call__(output["logits"]) + 0.5 * output["each"]


@written("Switch transformer with its balance loss", loop=False)
def balanced_experts() -> Problem:
    """The balance loss is a number of the whole batch when it leaves the model."""
    text = words(TIME + 1)
    per_sample = Balanced(text[:, 1:])

    def loss(output: dict[str, Tensor]) -> Tensor:
        return NextWord(text[:, 1:])(output["logits"]).mean() + 0.5 * output["balance"]

    return Problem(SwitchClassifier(), text[:, :-1], per_sample, loss=loss)


class CrossBlock(nn.Module):
    """Latents attend to the inputs, then to each other."""

    def __init__(self, width: int, context: int) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(w) for w in (width, context, width, width))
        self.cross = nn.MultiheadAttention(width, 2, kdim=context, vdim=context, batch_first=True)
        self.itself = nn.MultiheadAttention(width, 2, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, latents: Tensor, inputs: Tensor, padding: Tensor) -> Tensor:
        q, kv = self.norms[0](latents), self.norms[1](inputs)
        latents = latents + self.cross(q, kv, kv, key_padding_mask=padding, need_weights=False)[0]
        h = self.norms[2](latents)
        latents = latents + self.itself(h, h, h, need_weights=False)[0]
        return latents + self.mlp(self.norms[3](latents))


class Perceiver(nn.Module):
    """Learned latents read inputs of any length; the same block twice; learned queries read the latents."""

    def __init__(self, width: int = 6) -> None:
        super().__init__()
        self.latents = nn.Parameter(0.3 * torch.randn(4, width))
        self.positions = nn.Parameter(0.3 * torch.randn(TIME, FEATURES))
        self.block = CrossBlock(width, FEATURES)
        self.queries = nn.Parameter(0.3 * torch.randn(1, 3, width))
        self.decoder = nn.MultiheadAttention(width, 1, batch_first=True)
        self.head = nn.Linear(width, OUTPUT)

    def forward(self, x: Tensor, padding: Tensor) -> Tensor:
        inputs = x + self.positions
        latents = self.latents.unsqueeze(0).expand(len(x), -1, -1)
        for _ in range(2):
            latents = self.block(latents, inputs, padding)
        return self.head(self.decoder(self.queries.expand(len(x), -1, -1), latents, latents)[0])


@written("Perceiver")
def perceiver() -> Problem:
    padding = torch.arange(TIME) >= torch.tensor([5, 3, 1, 4, 2, 5, 3])[:, None]
    return Problem(Perceiver(), {"x": torch.randn(SAMPLES, TIME, FEATURES), "padding": padding})


class Sentences(nn.Module):
    """A small BERT: embeddings, encoder layers with dropout, mean over the words that are there."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.words, self.positions = nn.Embedding(WORDS, width, padding_idx=0), nn.Embedding(TIME, width)
        self.norm = nn.LayerNorm(width)
        layer = nn.TransformerEncoderLayer(width, 2, 13, dropout=0.1, activation="gelu", batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

    def forward(self, text: Tensor) -> Tensor:
        x = self.words(text) + self.positions(torch.arange(text.shape[1], device=text.device))
        states = self.encoder(self.norm(x), src_key_padding_mask=text == 0)
        there = (text != 0)[..., None].to(states)
        return (states * there).sum(1) / there.sum(1)


class SentencePairs(nn.Module):
    """Sentence-BERT: both sentences through one encoder, their difference classified."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.head = Sentences(), nn.Linear(24, OUTPUT)

    def forward(self, first: Tensor, second: Tensor) -> Tensor:
        u, v = self.encoder(first), self.encoder(second)
        return self.head(torch.cat([u, v, (u - v).abs()], dim=-1))


@written("Sentence-BERT", loop=False)
def sentence_pairs() -> Problem:
    there = torch.arange(TIME) < torch.tensor([5, 3, 1, 4, 2, 5, 3])[:, None]
    return Problem(SentencePairs(), {"first": words() * there, "second": words() * there.flip(0)})
