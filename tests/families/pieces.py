"""Parts of parameters: sliced, split, looked up, chosen by the model, repeated, scaled, or written into values."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.case import FEATURES, HIDDEN, OUTPUT, SAMPLES, TIME, Apply, Problem, case


def parameter(*shape: int) -> nn.Parameter:
    return nn.Parameter(0.3 * torch.randn(shape))


def vectors() -> Tensor:
    return torch.randn(SAMPLES, FEATURES)


def sequences() -> Tensor:
    return torch.randn(SAMPLES, TIME, FEATURES)


@case()
def slices_of_a_matrix() -> Problem:
    """A fused matrix whose parts are cut out in every way."""

    def forward(m: Apply, x: Tensor) -> Tensor:
        first, second, third = m.fused.chunk(3)
        left, right = m.fused[: 2 * HIDDEN].split(HIDDEN)
        h = F.linear(x, first) + F.linear(x, m.fused[HIDDEN : 2 * HIDDEN]) * torch.sigmoid(F.linear(x, third))
        h = h + F.linear(x, m.fused.narrow(0, 3, HIDDEN)) + F.linear(x, left - right)
        return F.linear(torch.tanh(h), m.out[:OUTPUT, ..., 1]) + m.out.unbind(2)[0][-OUTPUT:, 2] + second[0, 0]

    return Problem(
        Apply(forward, fused=parameter(3 * HIDDEN, FEATURES), out=parameter(2 * OUTPUT, HIDDEN, 2)), vectors()
    )


@case()
def layers_stacked_in_one_parameter() -> Problem:
    def forward(m: Apply, x: Tensor) -> Tensor:
        for number, weight in enumerate(m.weights):
            x = torch.tanh(x @ weight + m.shifts[number] + m.shifts.select(0, -1) * m.shifts[..., None][0, :, 0])
        return x

    return Problem(Apply(forward, weights=parameter(3, FEATURES, FEATURES), shifts=parameter(4, FEATURES)), vectors())


@case()
def scaled_weights() -> Problem:
    """Equalised learning rates: each weight times a constant number."""

    def forward(m: Apply, x: Tensor) -> Tensor:
        h = torch.tanh(F.linear(x, m.first * 40.0, -m.shift))
        return F.linear(h, m.second / 3 * m.gain, 0.01 * m.last)

    parts = {"first": parameter(HIDDEN, FEATURES), "shift": parameter(HIDDEN), "second": parameter(OUTPUT, HIDDEN)}
    return Problem(Apply(forward, **parts, last=parameter(OUTPUT), gain=torch.tensor(0.5)), vectors())


@case()
def tables_looked_up_at_constant_places() -> Problem:
    """Positions, and a relative position bias, (heads, queries, keys)."""

    def forward(m: Apply, x: Tensor) -> Tensor:
        places = torch.arange(x.shape[1])
        h = x + m.positions(places) + F.embedding(m.flipped, m.table) + m.table[m.flipped]
        far = (places[:, None] - places).abs()
        scores = h.unsqueeze(1) @ h.unsqueeze(1).mT / FEATURES**0.5 + m.bias[far].permute(2, 0, 1)
        return m.head((scores.softmax(-1) @ h.unsqueeze(1)).mean((1, 2)))

    parts = {"positions": nn.Embedding(TIME + 2, FEATURES, padding_idx=1), "table": parameter(TIME, FEATURES)}
    parts |= {"bias": parameter(TIME, 2), "head": nn.Linear(FEATURES, OUTPUT)}
    model = Apply(forward, **parts)
    model.register_buffer("flipped", torch.arange(TIME).flip(0))
    return Problem(model, sequences())


@case()
def repeated_and_rolled() -> Problem:
    def forward(m: Apply, x: Tensor) -> Tensor:
        h = x + m.row.repeat(TIME, 1) + m.row.expand(TIME, -1).tril() + m.grid.roll(1, 0).flip(1)
        h = torch.cat([m.token.expand(len(x), -1, -1), h], 1)
        return (h * m.row.repeat_interleave(1)).mean(1)[:, :OUTPUT] + h[:, 0, :OUTPUT]

    parts = {"row": parameter(FEATURES), "grid": parameter(TIME, FEATURES), "token": parameter(1, 1, FEATURES)}
    return Problem(Apply(forward, **parts), sequences())


@case()
def experts_in_one_parameter() -> Problem:
    """The experts that some sample chose, one after the other, by numbers that the model computed."""

    def forward(m: Apply, x: Tensor) -> Tensor:
        share, chosen = m.gate(x).softmax(-1).max(-1)
        total = x.new_zeros(len(x), OUTPUT)
        for expert in chosen.unique():
            rows = (chosen == expert).nonzero()[:, 0]
            total = total.index_add(0, rows, x[rows] @ m.experts[expert] + m.shifts[expert])
        return total * share[:, None]

    parts = {"gate": nn.Linear(FEATURES, 3), "experts": parameter(3, FEATURES, OUTPUT), "shifts": parameter(3, OUTPUT)}
    return Problem(Apply(forward, **parts), vectors())


@case()
def written_over_some_positions() -> Problem:
    """A learned vector in the place of masked positions (wav2vec 2.0), and in views."""

    def forward(m: Apply, x: Tensor) -> Tensor:
        h = m.first(x).clone()
        h[x[..., 0] > 0.5] = m.mask
        h[:, 0] = m.start
        h[:, 2:][:, 1] = 2 * m.mask
        h.masked_fill_(x[..., 1:2] > 1, m.number)
        return m.last(torch.tanh(h)).mean(1)

    parts = {"first": nn.Linear(FEATURES, HIDDEN), "last": nn.Linear(HIDDEN, OUTPUT), "mask": parameter(HIDDEN)}
    return Problem(Apply(forward, **parts, start=parameter(HIDDEN), number=parameter()), sequences())


@case(loop=False)
def positions_by_keyword() -> Problem:
    """Position numbers that all samples share, given with the data."""

    def forward(m: Apply, *, x: Tensor, places: Tensor) -> Tensor:
        return m.head(torch.tanh(x + m.positions(places))).mean(1)

    parts = {"positions": nn.Embedding(TIME, FEATURES), "head": nn.Linear(FEATURES, OUTPUT)}
    return Problem(Apply(forward, **parts), {"x": sequences(), "places": torch.arange(TIME)[None]})


@case()
def shaped_like_the_data() -> Problem:
    """Constants that take shape, dtype and device alone from the data, and weights too."""

    def forward(m: Apply, x: Tensor) -> Tensor:
        steps = torch.arange(FEATURES).to(x) * m.first + m.second.type_as(x).view_as(x[0]) * torch.ones_like(x[0])
        x = x + steps + x.new_full((FEATURES,), 2.0) * m.third.expand_as(x[0])
        return x[:, :OUTPUT] * x.new_tensor([1.0, 2.0, 3.0])

    return Problem(Apply(forward, first=parameter(FEATURES), second=parameter(FEATURES), third=parameter(1)), vectors())
