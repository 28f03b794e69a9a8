"""Recurrent layers and cells: LSTM, GRU and RNN, with layers, directions, projections, dropout and packed sequences.

The user's call stays as it is, one fused kernel. The factors come from a replay of it, layer by layer, whose way back
gives the adjoints of the gates: D of the weights. A of the weights on the input's side is the layer's input, of those
on the state's side the states before every step. There is one row per time and sequence.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from gradtrace_plugins.recurrence import Steps
from gradtrace_plugins.recurrent_call import Form, form_of
from gradtrace_plugins.replay import Replay
from torch import Tensor

from gradtrace.calls import Adjoint, OpCall, Path, RowsCutError, is_dense, owner_rows
from gradtrace.factors import ElementFactors, Factors, OuterFactors, Rows, row_norms
from gradtrace.hosted import is_here, number, picked, places_of, sent


class BiasFactors(ElementFactors):
    """A shift of every row; long sequences have many, so each is summed once, with the rows of its cell alone."""

    def by_cell(self, cells: Tensor) -> dict[int, Tensor]:
        of_row = cells[self.owners.flatten()]
        present = torch.unique(of_row)
        own = sent(of_row == present[:, None], self.adjoint.device)
        sums = own.to(self.adjoint.dtype) @ self.adjoint  # nothing is copied
        if not is_here(sums) or not bool(torch.isfinite(sums).all()):  # zero times what is not finite
            sums = torch.stack([picked(self.adjoint, places_of(of_row == c)).sum(0) for c in present])
        return dict(zip(present.tolist(), sums, strict=True))

    def scale(self) -> float | Tensor:
        return number(row_norms(self.adjoint).sum())


class StateFactors(ElementFactors):
    """First states that are learned: a shift, with one row per layer, direction and sequence."""

    def rows(self) -> Rows:
        owners = self.owners.expand(*self.adjoint.shape[:-1], 1).flatten()
        return Rows(None, self.adjoint.flatten(0, -2), owners)


class RecurrentAdapter:
    """Factors of recurrent layers and cells, for all weights and outputs of a call together."""

    name = "recurrent"
    ops = "lstm, gru, rnn_tanh, rnn_relu, lstm_cell, gru_cell, rnn_tanh_cell, rnn_relu_cell"

    def claims(self, call: OpCall) -> bool:
        form = form_of(call)
        if form is None or call.operand not in (*form.weights, *form.states):
            return False
        data = call.at(form.data)
        if form.dropout and data.device.type != "cpu":
            return False  # the kernel there draws its masks by itself, and nobody can have them
        return data.dim() == (3 if form.time_axis is not None else 2) and all(
            is_dense(call.at(path)) for path in (form.data, *form.states, *form.weights)
        )

    def note(self, call: OpCall) -> Any:
        """The random state that the masks between layers are drawn from; None where nothing is dropped."""
        form = form_of(call)
        return torch.get_rng_state() if form is not None and form.dropout else None

    def factors(self, call: OpCall, adjoint: Tensor) -> Factors:
        """One row per time and sequence."""
        assert call.owners is not None
        return self.joint_factors(call, [call.operand], {call.position: Adjoint(adjoint, call.owners)})[call.operand]

    @torch.no_grad()
    def joint_factors(
        self, call: OpCall, weights: Sequence[Path], adjoints: Mapping[int, Adjoint]
    ) -> Mapping[Path, Factors]:
        """The same rows for all weights of a layer, their adjoints summed over the outputs."""
        form = form_of(call)
        assert form is not None
        owners = _owners(call, form, adjoints)
        given = next(iter(adjoints.values())).value
        with _without_autocast(given.device.type):
            replay = Replay(call, form, given.dtype)
            replay.sweep({position: adjoint.value for position, adjoint in adjoints.items()}, weights)
            of_row = owners[Steps(form.sizes).sequences(owners.device)]
            return {
                path: _first(call, replay, path, owners) if path in form.states else _weight(call, replay, path, of_row)
                for path in weights
            }


def _without_autocast(device: str) -> AbstractContextManager[Any]:
    """What was cast in the call is cast already."""
    known = torch.amp.is_autocast_available(device)  # not on the meta device
    return torch.autocast(device, enabled=False) if known else nullcontext()


def _first(call: OpCall, replay: Replay, path: Path, owners: Tensor) -> Factors:
    """The factors of first states; `owners`: of every sequence."""
    return StateFactors(None, replay.state(path), owners[:, None], tuple(call.at(path).shape))


def _weight(call: OpCall, replay: Replay, path: Path, owners: Tensor) -> Factors:
    """The factors of a weight; `owners`: of every row."""
    shape = tuple(call.at(path).shape)
    activation, adjoint = replay.weight(path)
    if activation is None:
        return BiasFactors(None, adjoint, owners[:, None], shape)
    return OuterFactors(activation, adjoint, owners, shape=shape[::-1], order=(1, 0))


def _owners(call: OpCall, form: Form, adjoints: Mapping[int, Adjoint]) -> Tensor:
    """(sequences,) the owner of every sequence, as all outputs tell it; RowsCutError where they disagree."""
    sequences, owners = [], []
    for position, adjoint in adjoints.items():
        shape, device = adjoint.value.shape, adjoint.owners.device
        axes: tuple[int, ...]
        if form.stacked and position == 0:
            axes = (0,) if form.time_axis is None else (form.time_axis, 1 - form.time_axis)
            sequences.append(Steps(form.sizes).sequences(device))
        else:
            axes = tuple(range(len(shape) - 1))
            sequences.append(torch.arange(form.sequences, device=device).repeat(shape[0] if len(axes) > 1 else 1))
        owners.append(owner_rows(call.name, adjoint.owners, axes, tuple(shape[a] for a in axes)))
    of_row, whose = torch.cat(owners), torch.cat(sequences)
    known = of_row.new_full((form.sequences,), -1).scatter_reduce(0, whose, of_row, "amax")
    if bool(((of_row != -1) & (of_row != known[whose])).any()):
        raise RowsCutError(call.name)
    return known
