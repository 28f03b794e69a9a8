"""Attention, transformers, embeddings and the tables and tokens that all samples share."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.case import HIDDEN, OUTPUT, SAMPLES, TIME, Apply, Case, Problem, SquaredError, case

WIDTH, WORDS = 6, 17  # two heads of three


def parameter(*shape: int) -> nn.Parameter:
    return nn.Parameter(0.3 * torch.randn(*shape))


def states(*, batch_first: bool = True) -> Tensor:
    return torch.randn(SAMPLES, TIME, WIDTH) if batch_first else torch.randn(TIME, SAMPLES, WIDTH)


def words() -> Tensor:
    return torch.randint(WORDS, (SAMPLES, TIME))


def _layout(model: nn.Module, batch_first: bool) -> Problem:
    if batch_first:
        return Problem(model, states())
    inputs = states(batch_first=False)
    return Problem(model, inputs, SquaredError(1), options={"sample_dim": 1}, input_dim=1)


def _self_attention(batch_first: bool, **settings: Any) -> Problem:
    attention = nn.MultiheadAttention(WIDTH, 2, batch_first=batch_first, **settings)
    model = Apply(lambda m, x: m.head(m.attention(x, x, x)[0]), attention=attention, head=nn.Linear(WIDTH, OUTPUT))
    return _layout(model, batch_first)


def _encoder_layer(batch_first: bool, **settings: Any) -> Problem:
    layer = nn.TransformerEncoderLayer(WIDTH, 2, HIDDEN, batch_first=batch_first, **settings)
    return _layout(nn.Sequential(layer, nn.Linear(WIDTH, OUTPUT)), batch_first)


FAMILY = [
    Case("attention_batch_first", partial(_self_attention, True)),
    Case("attention_time_first", partial(_self_attention, False)),
    Case("attention_without_bias", partial(_self_attention, True, bias=False)),
    Case("attention_bias_kv", partial(_self_attention, True, add_bias_kv=True)),
    Case("attention_dropout", partial(_self_attention, True, dropout=0.3), loop=False),
    Case("encoder_layer_batch_first", partial(_encoder_layer, True, dropout=0.0)),
    Case("encoder_layer_time_first", partial(_encoder_layer, False, dropout=0.0)),
    Case("encoder_layer_norm_first", partial(_encoder_layer, True, dropout=0.0, norm_first=True, activation="gelu")),
    Case("encoder_layer_dropout", partial(_encoder_layer, True, dropout=0.3), loop=False),
]


@case()
def cross_attention() -> Problem:
    """Separate projections of queries, keys and values, and a padding mask over the keys."""

    def forward(m: Apply, query: Tensor, memory: Tensor, padding: Tensor) -> Tensor:
        mixed, _ = m.attention(query, memory, memory, key_padding_mask=padding, need_weights=False)
        return m.head(mixed)

    attention = nn.MultiheadAttention(WIDTH, 2, kdim=11, vdim=11, batch_first=True)
    padding = torch.arange(19) >= torch.tensor([19, 3, 7, 1, 19, 11, 2])[:, None]
    inputs = {"query": states(), "memory": torch.randn(SAMPLES, 19, 11), "padding": padding}
    return Problem(Apply(forward, attention=attention, head=nn.Linear(WIDTH, OUTPUT)), inputs)


@case()
def encoder_decoder() -> Problem:
    model = nn.Transformer(WIDTH, 2, 1, 1, HIDDEN, dropout=0.0, batch_first=True)
    return Problem(model, (torch.randn(SAMPLES, 3, WIDTH), states()))


@case()
def tied_language_model() -> Problem:
    """An embedding tied to the output layer, with causal attention between the two."""

    def forward(m: Apply, tokens: Tensor) -> Tensor:
        x = m.embed(tokens)
        q, k, v = (part.unflatten(-1, (2, -1)).transpose(1, 2) for part in m.qkv(x).chunk(3, dim=-1))
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
        return m.head(m.norm(x + mixed))

    parts = {"embed": nn.Embedding(WORDS, WIDTH), "qkv": nn.Linear(WIDTH, 3 * WIDTH), "norm": nn.LayerNorm(WIDTH)}
    model = Apply(forward, **parts, head=nn.Linear(WIDTH, WORDS, bias=False))
    model.head.weight = model.embed.weight
    return Problem(model, words())


@case()
def position_table() -> Problem:
    """A table of batch size 1, added to every sample."""
    model = Apply(
        lambda m, x: m.head(torch.tanh(x + m.table)), table=parameter(1, TIME, WIDTH), head=nn.Linear(WIDTH, 3)
    )
    return Problem(model, states())


@case()
def position_table_expanded() -> Problem:
    def forward(m: Apply, x: Tensor) -> Tensor:
        return m.head(torch.cat([x, m.table.expand(x.shape[0], -1, -1)], dim=-1))

    return Problem(Apply(forward, table=parameter(1, TIME, 2), head=nn.Linear(WIDTH + 2, OUTPUT)), states())


@case(loop=False)
def position_table_dropped() -> Problem:
    """Dropout on the table before it meets a sample: replaying it would draw another mask."""

    def forward(m: Apply, x: Tensor) -> Tensor:
        return m.head(torch.tanh(x + F.dropout(m.table, 0.4, training=m.training)))

    return Problem(Apply(forward, table=parameter(1, TIME, WIDTH), head=nn.Linear(WIDTH, OUTPUT)), states())


@case()
def position_table_as_long_as_the_batch() -> Problem:
    """As many positions as samples: guessing by shape takes the one for the other."""
    model = Apply(
        lambda m, x: m.head(torch.tanh(x + m.table)), table=parameter(SAMPLES, WIDTH), head=nn.Linear(WIDTH, 3)
    )
    inputs = torch.randn(SAMPLES, SAMPLES, WIDTH)
    return Problem(model, inputs, options={"sample_dim": 0})


@case()
def position_embedding() -> Problem:
    """Positions looked up in an embedding, without a batch axis."""

    def forward(m: Apply, tokens: Tensor) -> Tensor:
        return m.head(m.embed(tokens) + m.position(torch.arange(tokens.shape[1])))

    parts = {"embed": nn.Embedding(WORDS, WIDTH, padding_idx=0), "position": nn.Embedding(19, WIDTH)}
    return Problem(Apply(forward, **parts, head=nn.Linear(WIDTH, OUTPUT)), words())


@case()
def relative_bias_heads_like_the_batch() -> Problem:
    """A bias table as in T5, with as many heads as there are samples."""

    def forward(m: Apply, x: Tensor) -> Tensor:
        place = torch.arange(x.shape[1])
        bias = m.bias((place[:, None] - place).clamp(-2, 2) + 2).permute(2, 0, 1)  # heads x queries x keys
        q, k, v = (part.unflatten(-1, (SAMPLES, -1)).transpose(1, 2) for part in m.qkv(x).chunk(3, dim=-1))
        weights = torch.softmax(q @ k.transpose(-1, -2) + bias, dim=-1)
        return m.head((weights @ v).transpose(1, 2).flatten(2))

    width = 2 * SAMPLES
    parts = {"bias": nn.Embedding(5, SAMPLES), "qkv": nn.Linear(WIDTH, 3 * width), "head": nn.Linear(width, OUTPUT)}
    return Problem(Apply(forward, **parts), states())


@case()
def class_token() -> Problem:
    """A vision transformer's parts: class token by expand and cat, position table, layer scale."""

    def forward(m: Apply, x: Tensor) -> Tensor:
        x = torch.cat([m.token.expand(x.shape[0], -1, -1), m.patch(x)], dim=1) + m.table
        normed = m.norm(x)
        x = x + m.scale * m.attention(normed, normed, normed, need_weights=False)[0]
        return m.head(x[:, 0])

    tables = {"token": parameter(1, 1, WIDTH), "table": parameter(1, TIME + 1, WIDTH), "scale": parameter(WIDTH)}
    attention = nn.MultiheadAttention(WIDTH, 2, batch_first=True)
    layers = {"patch": nn.Linear(11, WIDTH), "norm": nn.LayerNorm(WIDTH), "attention": attention}
    return Problem(Apply(forward, **tables, **layers, head=nn.Linear(WIDTH, OUTPUT)), torch.randn(SAMPLES, TIME, 11))


@case()
def rms_norm() -> Problem:
    model = nn.Sequential(nn.Linear(WIDTH, HIDDEN), nn.RMSNorm(HIDDEN), nn.PReLU(), nn.Linear(HIDDEN, OUTPUT))
    return Problem(model, states())


@case()
def rms_norm_by_hand() -> Problem:
    def forward(m: Apply, x: Tensor) -> Tensor:
        x = m.first(x)
        return m.weight * (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6)) + m.shift

    return Problem(
        Apply(forward, first=nn.Linear(WIDTH, OUTPUT), weight=parameter(OUTPUT), shift=parameter(OUTPUT)), states()
    )


@case()
def layer_norm() -> Problem:
    return Problem(nn.Sequential(nn.Linear(WIDTH, HIDDEN), nn.LayerNorm(HIDDEN), nn.Linear(HIDDEN, OUTPUT)), states())


@case()
def embedding_bag() -> Problem:
    """Bags of one length, means and weighted sums."""

    def forward(m: Apply, tokens: Tensor, weights: Tensor) -> Tensor:
        return m.head(torch.tanh(m.mean(tokens) + m.weighted(tokens, per_sample_weights=weights)))

    parts = {"mean": nn.EmbeddingBag(WORDS, WIDTH), "weighted": nn.EmbeddingBag(WORDS, WIDTH, mode="sum")}
    return Problem(Apply(forward, **parts, head=nn.Linear(WIDTH, OUTPUT)), (words(), torch.randn(SAMPLES, TIME)))


@case(loop=False)
def embedding_bag_offsets() -> Problem:
    """Bags of many lengths in one vector, with an empty one."""

    def forward(m: Apply, tokens: Tensor, offsets: Tensor) -> Tensor:
        return m.head(m.bag(tokens, offsets))

    model = Apply(forward, bag=nn.EmbeddingBag(WORDS, WIDTH, mode="mean"), head=nn.Linear(WIDTH, OUTPUT))
    return Problem(model, (torch.randint(WORDS, (23,)), torch.tensor([0, 3, 3, 8, 9, 14, 20])))


@case()
def embedding_sparse() -> Problem:
    """A sparse gradient."""
    model = Apply(
        lambda m, t: m.head(m.embed(t).mean(1)), embed=nn.Embedding(WORDS, 6, sparse=True), head=nn.Linear(6, 3)
    )
    return Problem(model, words())


@case()
def table_by_indexing() -> Problem:
    """A lookup written as indexing."""
    return Problem(
        Apply(lambda m, t: m.head(m.table[t]), table=parameter(WORDS, 6), head=nn.Linear(6, OUTPUT)), words()
    )


@case()
def position_table_sliced() -> Problem:
    """A table longer than the sequence."""
    model = Apply(
        lambda m, x: m.head(x + m.table[:, : x.shape[1]]), table=parameter(1, 19, WIDTH), head=nn.Linear(WIDTH, 3)
    )
    return Problem(model, states())


@case()
def mask_token() -> Problem:
    """Masked positions take one learned value."""

    def forward(m: Apply, x: Tensor, hidden: Tensor) -> Tensor:
        return m.head(torch.where(hidden[..., None], m.token, m.embed(x)).sin())

    parts = {"token": parameter(WIDTH), "embed": nn.Linear(WIDTH, WIDTH), "head": nn.Linear(WIDTH, OUTPUT)}
    return Problem(Apply(forward, **parts), (states(), torch.rand(SAMPLES, TIME) < 0.4))


@case(opaque=True)
def mask_token_assigned() -> Problem:
    """The same by an assignment to an index, which returns nothing that could be watched."""

    def forward(m: Apply, x: Tensor, hidden: Tensor) -> Tensor:
        x = m.embed(x)
        x[hidden] = m.token
        return m.head(x)

    parts = {"token": parameter(WIDTH), "embed": nn.Linear(WIDTH, WIDTH), "head": nn.Linear(WIDTH, OUTPUT)}
    return Problem(Apply(forward, **parts), (states(), torch.rand(SAMPLES, TIME) < 0.4))


@case(coupled=True, opaque=True)
def image_and_text() -> Problem:
    """Every image against every text: the texts' rows are everybody's."""

    def forward(m: Apply, image: Tensor, text: Tensor) -> Tensor:
        return 3 * F.normalize(m.image(image), dim=1) @ F.normalize(m.text(text), dim=1).t()

    model = Apply(forward, image=nn.Linear(11, WIDTH), text=nn.Linear(13, WIDTH))
    inputs = (torch.randn(SAMPLES, 11), torch.randn(SAMPLES, 13))
    return Problem(model, inputs, options={"sample_dim": 0})
