"""A recurrent call run again, layer by layer, forwards and back: the activations and adjoints of all its weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from gradtrace_plugins.gates import RECURRENCES
from gradtrace_plugins.recurrence import Recurrence, Steps, Swept, Weights
from gradtrace_plugins.recurrent_call import Form
from torch import Tensor

from gradtrace.calls import OpCall, Path
from gradtrace.errors import AdapterError

_FUSED = ("cuda", "xpu", "privateuseone")  # where an LSTM cell is one node of autograd's graph


class Replay:
    """The layers of one call, run again, and what the way back through each of them brings.

    dtype: the op's own; of half precision are only what goes in and what comes out.
    """

    def __init__(self, call: OpCall, form: Form, dtype: torch.dtype) -> None:
        self.call, self.form, self.dtype = call, form, dtype
        self.steps = Steps(form.sizes)
        self.runs: list[list[Recurrence]] = []
        self.inputs: list[Tensor] = []
        self.swept: dict[int, list[Swept]] = {}
        self._kept = self._drawn()
        rows = self._rows(self._used(form.data))
        for layer in range(form.layers):
            self.inputs.append(rows)
            self.runs.append([self._run(rows, layer, direction) for direction in range(form.directions)])
            rows = torch.cat([run.states for run in self.runs[-1]], 1)
            rows = rows * self._kept[layer] if layer in self._kept else rows

    def _used(self, path: Path) -> Tensor:
        """An argument as the op used it, in a dtype that is good to compute in."""
        return self.call.at(path).to(self.dtype).to(_computed_in(self.dtype))

    def _rows(self, sequences: Tensor) -> Tensor:
        """Data or output as rows, step by step."""
        if self.form.time_axis is None:
            return sequences
        return sequences.movedim(self.form.time_axis, 0).flatten(0, 1)

    def _run(self, rows: Tensor, layer: int, direction: int) -> Recurrence:
        form, place = self.form, layer * self.form.directions + direction
        ours = form.weights[place * len(form.roles) :][: len(form.roles)]
        weights = Weights(**{role: self._used(path) for role, path in zip(form.roles, ours, strict=True)})
        first = [_stacked(self._used(path))[place] for path in form.states]
        kind = RECURRENCES[form.kind]
        return kind(weights, rows, first=first, steps=self.steps, backwards=direction == 1)

    def _drawn(self) -> dict[int, Tensor]:
        """What the output of every layer but the last is multiplied by, drawn again as at the time of the call."""
        form = self.form
        if not form.dropout:
            return {}
        if self.call.noted is None:
            raise AdapterError(
                f"`{self.call.name}` drops out values between its layers, and the random state before the call was not "
                "noted. Ask the adapter's `note` then, and hand on what it returns as `OpCall.noted`."
            )
        width = form.directions * self.call.at(form.states[0]).shape[2]
        ones = torch.ones(sum(form.sizes), width, dtype=self.dtype)
        with torch.random.fork_rng(devices=[]):
            torch.set_rng_state(self.call.noted)
            drawn = [F.dropout(ones, form.dropout, training=True) for _ in range(form.layers - 1)]
        return {layer: mask.to(_computed_in(self.dtype)) for layer, mask in enumerate(drawn)}

    # ------------------------------------------------------------------ the way back

    def sweep(self, adjoints: Mapping[int, Tensor], weights: Sequence[Path]) -> None:
        """Brings the adjoints of all layers down to the lowest of `weights`."""
        form, to_first = self.form, any(path in self.form.states for path in weights)
        lowest = 0 if to_first else min(form.place(path)[0] for path in weights)
        arriving, last = self._arriving(adjoints)
        whole = len(adjoints) > 1 and self._shows_itself()
        for layer in reversed(range(lowest, form.layers)):
            found = []
            for direction, run in enumerate(self.runs[layer]):
                own = None if arriving is None else arriving.chunk(form.directions, 1)[direction]
                ends = [state[layer * form.directions + direction] for state in last]
                steps = None if own is None else own.split(form.sizes)
                found.append(run.sweep(steps, ends, whole=whole, to_first=to_first))
            self.swept[layer] = found
            if layer > lowest:
                parts = [s.inner @ run.weights.inner for s, run in zip(found, self.runs[layer], strict=True)]
                arriving = sum(parts[1:], parts[0])
                arriving = arriving * self._kept[layer - 1] if layer - 1 in self._kept else arriving

    def _arriving(self, adjoints: Mapping[int, Tensor]) -> tuple[Tensor | None, list[Tensor]]:
        """The adjoint of the rows of the last layer, and those of the last states of all layers."""
        wide = {position: adjoint.to(_computed_in(self.dtype)) for position, adjoint in adjoints.items()}
        last = []
        for position, path in enumerate(self.form.states, start=int(self.form.stacked)):
            given = _stacked(wide[position]) if position in wide else torch.zeros_like(_stacked(self._used(path)))
            last.append(given.clone(memory_format=torch.contiguous_format))  # the way back writes on it
        return (self._rows(wide[0]) if self.form.stacked and 0 in wide else None), last

    def _shows_itself(self) -> bool:
        """Whether the adjoint of c comes with what reaches it through h, as in an LSTM cell that is no kernel.

        There h is made of c, by nodes of autograd's graph.
        """
        return self.form.kind == "lstm" and not self.form.stacked and self.inputs[0].device.type not in _FUSED

    # ------------------------------------------------------------------ A and D

    def weight(self, path: Path) -> tuple[Tensor | None, Tensor]:
        """A and D of a weight, in the op's dtype; of a bias D alone."""
        layer, direction, role = self.form.place(path)
        run, swept = self.runs[layer][direction], self.swept[layer][direction]
        rows = {
            "inner": (self.inputs[layer], swept.inner),
            "hidden": (run.previous, swept.hidden),
            "inner_bias": (None, swept.inner),
            "hidden_bias": (None, swept.hidden),
            "projection": (run.projected, swept.projected),
        }
        activation, adjoint = rows[role]
        assert adjoint is not None
        return None if activation is None else activation.to(self.dtype), adjoint.to(self.dtype)

    def state(self, path: Path) -> Tensor:
        """The adjoint of first states, as they stand in the call."""
        number = self.form.states.index(path)
        parts = [swept.first[number] for layer in range(self.form.layers) for swept in self.swept[layer]]
        return torch.stack(parts).reshape(self.call.at(path).shape).to(self.dtype)


def _stacked(states: Tensor) -> Tensor:
    """(layers and directions, sequences, width); a cell has one layer."""
    return states if states.dim() == 3 else states[None]


def _computed_in(dtype: torch.dtype) -> torch.dtype:
    return dtype if dtype == torch.float64 else torch.float32
