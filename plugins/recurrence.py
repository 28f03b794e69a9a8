"""A recurrent layer in one direction: forwards for gates and states, backwards for the adjoints of the gates.

Rows stand step by step; a cell is a layer of one step. Going backwards all that changes from step to step is the
adjoint of the state, so everything else is computed for all rows at once, and a step costs one product and a few
operations element by element. `gradtrace_plugins.gates` has the kinds.

Going forwards step by step, rather than asking torch's own kernel for the states and one large product for the gates,
gives states and gates out of one product: 35 against 48 ms of processor time for an LSTM 53 -> 200, 150 steps of 32.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

import torch
from torch import Tensor


@dataclass(frozen=True)
class Steps:
    """Which rows are whose: step t has one row for each of the first `sizes[t]` sequences; sizes never grow."""

    sizes: tuple[int, ...]

    def order(self, *, backwards: bool) -> range:
        """The steps in the order in which a layer takes them."""
        return range(len(self.sizes) - 1, -1, -1) if backwards else range(len(self.sizes))

    def sequences(self, device: torch.device) -> Tensor:
        """(rows,) the sequence of every row."""
        if len(set(self.sizes)) <= 1:
            return torch.arange(sum(self.sizes[:1]), device=device).repeat(len(self.sizes))
        starts = torch.tensor([0, *accumulate(self.sizes)][:-1], device=device)
        sizes = torch.tensor(self.sizes, device=device)
        return torch.arange(int(sizes.sum()), device=device) - starts.repeat_interleave(sizes)


@dataclass(frozen=True)
class Weights:
    """The weights of one layer in one direction, stored (out, in)."""

    inner: Tensor  # multiplies the layer's input
    hidden: Tensor  # multiplies the state of the step before
    inner_bias: Tensor | None = None
    hidden_bias: Tensor | None = None
    projection: Tensor | None = None


@dataclass(frozen=True)
class Swept:
    """What the way back through one layer brings.

    inner, hidden: (rows, gates), the adjoints of what the input and the state are multiplied by; one and the same
    tensor where they do not differ. projected: (rows, projection), the adjoint of the projected states. first: the
    adjoints of the states before the first step, if they were asked for.
    """

    inner: Tensor
    hidden: Tensor
    projected: Tensor | None
    first: tuple[Tensor, ...]


class Recurrence(ABC):
    """One layer in one direction, run over its input (rows, in) from its first states (sequences, width)."""

    def __init__(
        self, weights: Weights, rows: Tensor, *, first: Sequence[Tensor], steps: Steps, backwards: bool
    ) -> None:
        self.weights, self.first, self.steps, self.backwards = weights, first, steps, backwards
        self.states = self._forward(rows)

    @cached_property
    def previous(self) -> Tensor:
        """(rows, width) the state before every step."""
        return self._all_before(self.states, self.first[0])

    @property
    def projected(self) -> Tensor | None:
        """(rows, width) what the projection multiplies."""
        return None

    @abstractmethod
    def _forward(self, rows: Tensor) -> Tensor:
        """(rows, width) the state after every step."""

    @abstractmethod
    def sweep(
        self, arriving: Sequence[Tensor] | None, last: Sequence[Tensor], *, whole: bool = False, to_first: bool = True
    ) -> Swept:
        """The adjoints, from those of the states of every step and of the last states, which are written on.

        whole: the last c of an LSTM comes with what reaches it through h. to_first: whether those of the first states
        are asked for. To be asked once: what was kept of the way forward is overwritten.
        """

    # ------------------------------------------------------------------ rows and steps

    def _of_steps(self, rows: Tensor) -> Sequence[Tensor]:
        return rows.split_with_sizes(self.steps.sizes)

    def _order(self) -> range:
        return self.steps.order(backwards=self.backwards)

    def _before(self, step: int, states: Sequence[Tensor], first: Tensor) -> Tensor:
        """What a step begins with: the states of the step taken before; a sequence that begins has its first state."""
        other, size = step + (1 if self.backwards else -1), self.steps.sizes[step]
        known = self.steps.sizes[other] if 0 <= other < len(self.steps.sizes) else 0
        if known >= size:
            return states[other] if known == size else states[other][:size]
        return torch.cat([states[other], first[known:size]]) if known else first[:size]

    def _all_before(self, states: Tensor, first: Tensor) -> Tensor:
        of_steps = self._of_steps(states)
        return torch.cat([self._before(t, of_steps, first) for t in range(len(self.steps.sizes))])

    def _returning(self, state: Tensor) -> list[tuple[int, Tensor]]:
        """Steps as the way back takes them, each with the rows of `state` that take part in it.

        Step by step they take in what comes back from the step taken after; a sequence that has ended waits there with
        the adjoint of its last state.
        """
        views = {size: state[:size] for size in set(self.steps.sizes)}
        return [(t, views[self.steps.sizes[t]]) for t in self.steps.order(backwards=not self.backwards)]

    def _unasked(self, to_first: bool) -> int | None:
        """The step that nothing comes before: what goes back from there is left out if nobody asks for it."""
        return None if to_first else self.steps.order(backwards=self.backwards)[0]

    def _from_input(self, rows: Tensor, bias: Tensor | None) -> Tensor:
        inner = self.weights.inner.T
        return rows @ inner if bias is None else torch.addmm(bias, rows, inner)

    def _turned(self) -> Tensor:
        """The state's weights, turned; for many steps laid out anew, which makes their products faster."""
        turned = self.weights.hidden.T
        return turned.contiguous() if len(self.steps.sizes) > 1 else turned

    def _both_biases(self) -> Tensor | None:
        one, other = self.weights.inner_bias, self.weights.hidden_bias
        return None if one is None or other is None else one + other
