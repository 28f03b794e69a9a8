"""Recurrent layers and cells, and scans written by hand."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from tests.case import FEATURES, HIDDEN, OUTPUT, SAMPLES, TIME, Apply, Case, Problem, SquaredError, case

LENGTHS = (5, 3, 1, 4, 2, 5, 3)
LAYERS = {"lstm": nn.LSTM, "gru": nn.GRU, "rnn": nn.RNN}


def sequences(*, batch_first: bool = True) -> Tensor:
    return torch.randn(SAMPLES, TIME, FEATURES) if batch_first else torch.randn(TIME, SAMPLES, FEATURES)


def _batch_first(kind: str, **settings: Any) -> Problem:
    layer = LAYERS[kind](FEATURES, HIDDEN, batch_first=True, **settings)
    width = (settings.get("proj_size") or HIDDEN) * (1 + settings.get("bidirectional", False))
    return Problem(Apply(lambda m, x: m.head(m.rnn(x)[0]), rnn=layer, head=nn.Linear(width, OUTPUT)), sequences())


def _time_first(kind: str, **settings: Any) -> Problem:
    layer = LAYERS[kind](FEATURES, HIDDEN, **settings)
    model = Apply(lambda m, x: m.head(m.rnn(x)[0]), rnn=layer, head=nn.Linear(HIDDEN, OUTPUT))
    inputs = sequences(batch_first=False)
    return Problem(model, inputs, SquaredError(1), options={"sample_dim": 1}, input_dim=1)


def _last_state(kind: str) -> Problem:
    """Only the last state reaches the head, so most adjoints come through time."""

    def forward(m: Apply, x: Tensor) -> Tensor:
        state = m.rnn(x)[1]
        return m.head((state[0] if isinstance(state, tuple) else state)[-1])

    layer = LAYERS[kind](FEATURES, HIDDEN, num_layers=2, batch_first=True)
    return Problem(Apply(forward, rnn=layer, head=nn.Linear(HIDDEN, OUTPUT)), sequences())


def _packed(kind: str, **settings: Any) -> Problem:
    def forward(m: Apply, x: Tensor, lengths: Tensor) -> Tensor:
        packed = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
        padded, _ = pad_packed_sequence(m.rnn(packed)[0], batch_first=True, total_length=TIME)
        return m.head(padded)

    layer = LAYERS[kind](FEATURES, HIDDEN, batch_first=True, **settings)
    width = HIDDEN * (1 + settings.get("bidirectional", False))
    model = Apply(forward, rnn=layer, head=nn.Linear(width, OUTPUT))
    return Problem(model, (sequences(), torch.tensor(LENGTHS)))


def _cells(kind: str) -> Problem:
    def forward(m: Apply, x: Tensor) -> Tensor:
        state = x.new_zeros(x.shape[0], HIDDEN)
        if kind == "lstm":
            state = (state, state)
        outputs = []
        for step in x.unbind(1):
            state = m.cell(step, state)
            outputs.append(m.head(state[0] if kind == "lstm" else state))
        return torch.stack(outputs, dim=1)

    cell = {"lstm": nn.LSTMCell, "gru": nn.GRUCell, "rnn": nn.RNNCell}[kind](FEATURES, HIDDEN)
    return Problem(Apply(forward, cell=cell, head=nn.Linear(HIDDEN, OUTPUT)), sequences())


DEEP = {"num_layers": 2, "bidirectional": True}
FAMILY = [
    *(Case(kind, partial(_batch_first, kind)) for kind in LAYERS),
    *(Case(f"{kind}_deep_bidirectional", partial(_batch_first, kind, **DEEP)) for kind in LAYERS),
    *(Case(f"{kind}_last_state", partial(_last_state, kind)) for kind in LAYERS),
    *(Case(f"{kind}_dropout", partial(_batch_first, kind, **DEEP, dropout=0.4), loop=False) for kind in LAYERS),
    *(Case(f"{kind}_time_first", partial(_time_first, kind, num_layers=2)) for kind in LAYERS),
    *(Case(f"{kind}_packed", partial(_packed, kind)) for kind in LAYERS),
    *(Case(f"{kind}_packed_deep_bidirectional", partial(_packed, kind, **DEEP)) for kind in LAYERS),
    *(Case(f"{kind}_cell", partial(_cells, kind)) for kind in LAYERS),
    Case("rnn_relu", partial(_batch_first, "rnn", nonlinearity="relu")),
    Case("lstm_without_bias", partial(_batch_first, "lstm", bias=False)),
    Case("lstm_projected", partial(_batch_first, "lstm", proj_size=3)),
    Case("lstm_projected_deep_bidirectional", partial(_batch_first, "lstm", proj_size=3, **DEEP)),
]


@case(loop=False)
def lstm_packed_input() -> Problem:
    """The packed sequence itself is the model's input; it is a tuple by its type, but one argument."""
    from gradtrace import Inputs

    def forward(m: Apply, packed: PackedSequence) -> Tensor:
        return m.head(m.rnn(packed)[1][0][-1])

    packed = pack_padded_sequence(sequences(), torch.tensor(LENGTHS), batch_first=True, enforce_sorted=False)
    model = Apply(forward, rnn=nn.LSTM(FEATURES, HIDDEN, batch_first=True), head=nn.Linear(HIDDEN, OUTPUT))
    return Problem(model, Inputs((packed,)))


@case()
def learned_initial_state() -> Problem:
    """The first state is a parameter that all samples share."""

    def forward(m: Apply, x: Tensor) -> Tensor:
        return m.head(m.rnn(x, m.start.expand(-1, x.shape[0], -1).contiguous())[0])

    parts = {"start": nn.Parameter(torch.randn(1, 1, HIDDEN)), "rnn": nn.GRU(FEATURES, HIDDEN, batch_first=True)}
    return Problem(Apply(forward, **parts, head=nn.Linear(HIDDEN, OUTPUT)), sequences())


@case()
def selective_scan() -> Problem:
    """A state-space scan over -exp(A_log), the weight of every step."""

    def forward(m: Apply, x: Tensor) -> Tensor:
        decay = -torch.exp(m.A_log)
        step, inner = F.softplus(m.delta(x)), m.into(x)
        state, outputs = x.new_zeros(x.shape[0], HIDDEN, 3), []
        for t in range(x.shape[1]):
            state = torch.exp(step[:, t, :, None] * decay) * state + inner[:, t, :, None]
            outputs.append(state.sum(-1) + m.D * inner[:, t])
        return m.out(torch.stack(outputs, dim=1))

    parts = {"A_log": nn.Parameter(torch.rand(HIDDEN, 3)), "D": nn.Parameter(torch.randn(HIDDEN))}
    layers = {"delta": nn.Linear(FEATURES, HIDDEN), "into": nn.Linear(FEATURES, HIDDEN)}
    return Problem(Apply(forward, **parts, **layers, out=nn.Linear(HIDDEN, OUTPUT)), sequences())


@case()
def hand_written_recurrence() -> Problem:
    """Time first, one step per call, one weight used at all of them."""

    def forward(m: Apply, x: Tensor) -> Tensor:
        state = x.new_zeros(x.shape[1], HIDDEN)
        for step in x:
            state = torch.tanh(step @ m.inner + state @ m.recurrent + m.bias)
        return state @ m.readout

    shapes = {
        "inner": (FEATURES, HIDDEN),
        "recurrent": (HIDDEN, HIDDEN),
        "bias": (HIDDEN,),
        "readout": (HIDDEN, OUTPUT),
    }
    parts = {name: nn.Parameter(0.3 * torch.randn(*shape)) for name, shape in shapes.items()}
    return Problem(Apply(forward, **parts), sequences(batch_first=False), input_dim=1)
