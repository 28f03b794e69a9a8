"""How a call of a recurrent layer or cell is made: where its weights and states stand among its arguments."""

from __future__ import annotations

from dataclasses import dataclass

from gradtrace_plugins.gates import RECURRENCES

from gradtrace.calls import OpCall, Path

_CELL_ARGUMENTS = ("input", "hx", "w_ih", "w_hh", "b_ih", "b_hh")


@dataclass(frozen=True)
class Form:
    """How one call is made: where its tensors stand, and how its layers lie.

    states: where the first states are (h, and c of an LSTM). weights: where the weights are, layer by layer, direction
    by direction within a layer, in the order of `roles` within a direction. sizes: how many rows every step has.
    """

    kind: str
    sizes: tuple[int, ...]
    data: Path
    states: tuple[Path, ...]
    weights: tuple[Path, ...]
    roles: tuple[str, ...]
    directions: int = 1
    dropout: float = 0.0  # between layers; 0 where none is dropped
    time_axis: int | None = None  # of input and output; None where their rows stand one below the other
    stacked: bool = False  # whether the states of several layers and directions stand one behind the other

    @property
    def sequences(self) -> int:
        return self.sizes[0] if self.sizes else 0

    @property
    def layers(self) -> int:
        return len(self.weights) // len(self.roles) // self.directions

    def place(self, path: Path) -> tuple[int, int, str]:
        """The layer, the direction and the role of a weight."""
        rest, role = divmod(self.weights.index(path), len(self.roles))
        return *divmod(rest, self.directions), self.roles[role]


def form_of(call: OpCall) -> Form | None:
    """The form of a call, or None where it is not made as torch's own modules make it."""
    name = call.name.removesuffix("_cell")
    if name not in RECURRENCES:
        return None
    try:
        return _form_of_cell(call, name) if call.name.endswith("_cell") else _form_of_layers(call, name)
    except (IndexError, KeyError, TypeError, AttributeError, ValueError):
        return None  # other arguments, or in another order


def _form_of_cell(call: OpCall, kind: str) -> Form:
    """A cell is a layer of one step."""
    places = {name: (i if i < len(call.args) else name) for i, name in enumerate(_CELL_ARGUMENTS)}
    roles = _roles(biased=call.argument(4, "b_ih") is not None)
    data, state, *weights = ((places[name],) for name in _CELL_ARGUMENTS)
    states: tuple[Path, ...] = ((*state, 0), (*state, 1)) if kind == "lstm" else (state,)
    return Form(kind, (len(call.at(data)),), data, states, tuple(weights[: len(roles)]), roles)


def _form_of_layers(call: OpCall, kind: str) -> Form:
    packed = isinstance(call.args[3], (list, tuple))
    state, flat = (2, 3) if packed else (1, 2)
    biased, layers, dropout, training, bidirectional = call.args[flat + 1 : flat + 6]
    states: tuple[Path, ...] = ((state, 0), (state, 1)) if kind == "lstm" else ((state,),)
    projected = len({call.at(path).shape[2] for path in states}) > 1
    time_axis = None if packed else int(call.args[8])
    if time_axis is None:
        sizes = tuple(call.args[1].tolist())
    else:
        sizes = (call.args[0].shape[1 - time_axis],) * call.args[0].shape[time_axis]
    weights = tuple((flat, i) for i in range(len(call.args[flat])))
    lost = float(dropout) if training and layers > 1 else 0.0
    roles = _roles(biased=biased, projected=projected)
    return Form(kind, sizes, (0,), states, weights, roles, 1 + bidirectional, lost, time_axis, stacked=True)


def _roles(*, biased: bool, projected: bool = False) -> tuple[str, ...]:
    """The order of the weights of one layer in one direction."""
    biases = ("inner_bias", "hidden_bias") if biased else ()
    return ("inner", "hidden", *biases, *(("projection",) if projected else ()))
