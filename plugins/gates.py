"""The kinds of recurrent layers: how gates make states, and how the states' adjoints come back to the gates."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from gradtrace_plugins.recurrence import Recurrence, Swept
from torch import Tensor


class SimpleRecurrence(Recurrence):
    """h = f(x W^T + h' V^T + b), where f is tanh or relu."""

    relu = False

    def _forward(self, rows: Tensor) -> Tensor:
        states, hidden = self._from_input(rows, self._both_biases()), self._turned()
        of_steps = self._of_steps(states)
        for t in self._order():
            here = of_steps[t].addmm_(self._before(t, of_steps, self.first[0]), hidden)
            torch.relu_(here) if self.relu else torch.tanh_(here)
        return states

    def sweep(
        self, arriving: Sequence[Tensor] | None, last: Sequence[Tensor], *, whole: bool = False, to_first: bool = True
    ) -> Swept:
        gates = (self.states > 0).to(self.states.dtype) if self.relu else 1 - self.states.square()
        of_steps, state, unasked = self._of_steps(gates), last[0], self._unasked(to_first)
        for t, now in self._returning(state):
            if arriving is not None:
                now.add_(arriving[t])
            of_steps[t].mul_(now)
            if t != unasked:
                torch.mm(of_steps[t], self.weights.hidden, out=now)
        return Swept(gates, gates, None, (state,) if to_first else ())


class ReluRecurrence(SimpleRecurrence):
    """h = relu(x W^T + h' V^T + b)."""

    relu = True


class GatedRecurrence(Recurrence):
    """GRU: r, z = sigmoid(...), n = tanh(x W^T + b + r (h' V^T + c)), h = (1 - z) n + z h'."""

    def _forward(self, rows: Tensor) -> Tensor:
        width, first, hidden = self.first[0].shape[1], self.first[0], self._turned()
        gates = self._from_input(rows, self.weights.inner_bias)
        inside, states = torch.empty_like(gates), gates.new_empty(len(gates), width)
        of_steps = self._of_steps(states)
        parts = (gates[:, : 2 * width], inside[:, : 2 * width], *_blocks(gates, 3), _blocks(inside, 3)[2], inside)
        both, both_inside, reset, update, new, new_inside, all_inside = (self._of_steps(p) for p in parts)
        for t in self._order():
            before = self._before(t, of_steps, first)
            _product(before, hidden, bias=self.weights.hidden_bias, out=all_inside[t])
            both[t].add_(both_inside[t]).sigmoid_()
            new[t].addcmul_(reset[t], new_inside[t]).tanh_()
            torch.lerp(new[t], before, update[t], out=of_steps[t])
        self._gates, self._inside = gates, inside
        return states

    def sweep(
        self, arriving: Sequence[Tensor] | None, last: Sequence[Tensor], *, whole: bool = False, to_first: bool = True
    ) -> Swept:
        candidate, update = self._slopes()
        state, hidden, unasked = last[0], self._inside.view(len(self._inside), 3, -1), self._unasked(to_first)
        rows, by_gate, new, carried = (self._of_steps(p) for p in (self._inside, hidden, candidate, update))
        for t, now in self._returning(state):
            if arriving is not None:
                now.add_(arriving[t])
            by_gate[t].mul_(now.unsqueeze(1))
            new[t].mul_(now)
            if t != unasked:
                now.mul_(carried[t]).addmm_(rows[t], self.weights.hidden)
        inner = torch.cat([hidden[:, :2].flatten(1), candidate], 1)
        return Swept(inner, self._inside, None, (state,) if to_first else ())

    def _slopes(self) -> tuple[Tensor, Tensor]:
        """Per unit of the state's adjoint: the candidate's adjoint on the input's side, and what is carried on.

        Those of the three gates on the state's side take the place of what was kept.
        """
        reset, update, new = _blocks(self._gates, 3)
        at_reset, at_update, at_new = _blocks(self._inside, 3)
        candidate = (1 - update) * (1 - new.square())
        torch.mul(candidate * at_new, reset * (1 - reset), out=at_reset)
        torch.mul(self.previous - new, update * (1 - update), out=at_update)
        torch.mul(candidate, reset, out=at_new)
        return candidate, update


class LongShortRecurrence(Recurrence):
    """LSTM: i, f, o = sigmoid(...), g = tanh(...), c = f c' + i g, h = o tanh(c), which a projection may multiply."""

    def _forward(self, rows: Tensor) -> Tensor:
        width, hidden = self.first[1].shape[1], self._turned()
        gates = self._from_input(rows, self._both_biases())
        cells, squashed, shown = (gates.new_empty(len(gates), width) for _ in range(3))
        projection = self.weights.projection
        states = shown if projection is None else gates.new_empty(len(gates), projection.shape[0])
        parts = (gates, gates[:, : 2 * width], *_blocks(gates, 4), cells, squashed, shown, states)
        whole, two, into, keep, new, out, c, tanh_c, h, state = (self._of_steps(p) for p in parts)
        for t in self._order():
            whole[t].addmm_(self._before(t, state, self.first[0]), hidden)
            two[t].sigmoid_()
            torch.mul(keep[t], self._before(t, c, self.first[1]), out=c[t])
            c[t].addcmul_(into[t], new[t].tanh_())
            torch.mul(out[t].sigmoid_(), torch.tanh(c[t], out=tanh_c[t]), out=h[t])
            if projection is not None:
                torch.mm(h[t], projection.T, out=state[t])
        self._gates, self._cells, self._squashed, self._shown = gates, cells, squashed, shown
        return states

    @property
    def projected(self) -> Tensor | None:
        return None if self.weights.projection is None else self._shown

    def sweep(
        self, arriving: Sequence[Tensor] | None, last: Sequence[Tensor], *, whole: bool = False, to_first: bool = True
    ) -> Swept:
        (state, cell), projection, unasked = last, self.weights.projection, self._unasked(to_first)
        keep, shown = self._slopes()
        gates = self._gates.view(len(self._gates), 4, -1)
        rows, by_cell, by_state = (self._of_steps(p) for p in (self._gates, gates[:, :3], gates[:, 3]))
        kept, shows = self._of_steps(keep), self._of_steps(shown)
        adjoints = None if projection is None else torch.empty_like(self.states)
        projected = () if adjoints is None else self._of_steps(adjoints)
        for (t, now), (_, inside) in zip(self._returning(state), self._returning(cell), strict=True):
            if arriving is not None:
                now.add_(arriving[t])
            adjoint = now if projection is None else projected[t].copy_(now) @ projection
            if not whole:
                inside.addcmul_(adjoint, shows[t])
            by_cell[t].mul_(inside.unsqueeze(1))
            by_state[t].mul_(adjoint)
            if t != unasked:
                inside.mul_(kept[t])
                torch.mm(rows[t], self.weights.hidden, out=now)
        return Swept(self._gates, self._gates, adjoints, (state, cell) if to_first else ())

    def _slopes(self) -> tuple[Tensor, Tensor]:
        """What is kept of the cells, and how these show in the state: o (1 - tanh(c)^2).

        The gates give way to their slopes: of i, f and g per unit of the cell's adjoint, of o per unit of the state's.
        """
        into, keep, new, out = _blocks(self._gates, 4)
        shows = torch.addcmul(out, self._shown, self._squashed, value=-1)
        torch.addcmul(self._shown, self._shown, out, value=-1, out=out)
        kept, before = keep.clone(), self._all_before(self._cells, self.first[1])
        remains = before.mul_(keep)
        torch.addcmul(remains, remains, keep, value=-1, out=keep)
        added = into * new
        torch.addcmul(into, added, new, value=-1, out=new)
        torch.addcmul(added, added, into, value=-1, out=into)
        return kept, shows


def _blocks(rows: Tensor, number: int) -> tuple[Tensor, ...]:
    """The columns as so many blocks of equal width."""
    return rows.chunk(number, 1)


def _product(rows: Tensor, matrix: Tensor, *, bias: Tensor | None, out: Tensor) -> Tensor:
    return torch.mm(rows, matrix, out=out) if bias is None else torch.addmm(bias, rows, matrix, out=out)


RECURRENCES: dict[str, type[Recurrence]] = {
    "lstm": LongShortRecurrence,
    "gru": GatedRecurrence,
    "rnn_tanh": SimpleRecurrence,
    "rnn_relu": ReluRecurrence,
}
