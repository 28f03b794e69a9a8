"""The residual: what was gathered, against the gradients that autograd itself accumulated."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from gradtrace.accumulate import ParameterSum, probes_of
from gradtrace.gather import Gathered
from gradtrace.pull import through_graph

NEGLIGIBLE = 1e-3  # of the largest gradient: what a gradient that is zero but for rounding is measured against


@dataclass(frozen=True)
class Held:
    """A gradient before a pass, and what tells whether the pass touched it: one left over from before is no news."""

    value: Tensor
    of: Tensor
    version: int

    @classmethod
    def of_gradient(cls, gradient: Tensor) -> Held:
        return cls(_dense(gradient).clone(), gradient, gradient._version)

    def is_still(self, gradient: Tensor) -> bool:
        return gradient is self.of and gradient._version == self.version


class Audit:
    """Autograd's own gradients of one step: differences of `p.grad`, or, where hooks of the user's change them, a pass.

    residual = |sum of cells - g_autograd| / sum over rows of |a| |d|. Where no factors are known the norms of the
    cells' gradients take that place, or a thousandth of the model's largest gradient where that is more. Dividing by
    |g_autograd| would raise false alarms where contributions cancel.
    """

    def __init__(self, parameters: Mapping[str, Tensor], edges: Mapping[str, GradientEdge]) -> None:
        self._parameters, self._edges = parameters, edges
        self._hooked = [n for n, p in parameters.items() if p._backward_hooks or _post_hooks(p)]
        self._before: dict[str, Held | None] = {}
        self._single = False  # the pass under way is the step's first
        self.reference: dict[str, Tensor] = {}
        self.residuals: dict[str, float] = {}

    def begin_pass(self) -> None:
        """Remembers the gradients that a backward pass will add to."""
        plain = [(n, p) for n, p in self._parameters.items() if n not in self._hooked]
        self._before = {n: None if p.grad is None else Held.of_gradient(p.grad) for n, p in plain}
        self._single = not self.reference

    def will_know(self, name: str) -> bool:
        """Whether `p.grad` will be this pass's gradient and nothing else, to the last bit."""
        return self._single and self._before.get(name, name) is None

    def reference_pass(self, roots: Sequence[GradientEdge], cotangents: Sequence[Tensor]) -> None:
        """Takes the gradients of parameters with hooks by a pass of our own that fires none."""
        edges = [self._edges[name] for name in self._hooked]
        for name, gradient in zip(self._hooked, through_graph(roots, cotangents, edges), strict=True):
            if gradient is not None:
                self._add(name, gradient)

    def end_pass(self) -> None:
        """Adds what the pass accumulated."""
        for name, before in self._before.items():
            gradient = self._parameters[name].grad
            if gradient is None or (before is not None and before.is_still(gradient)):
                continue
            now = _dense(gradient)  # a copy: what the user does to p.grad is theirs
            self._add(name, now.clone() if before is None else now - before.value)
        self._before = {}

    def _add(self, name: str, gradient: Tensor) -> None:
        self.reference[name] = self.reference[name] + gradient if name in self.reference else gradient

    def compare(self, gathered: Gathered) -> None:
        """The residual of every parameter of which something was gathered per group."""
        negligible = functools.cache(self._negligible)
        for name, reference in self.reference.items():
            if gathered.rung_of(name).names:
                self.residuals[name] = _residual(gathered.sum_of(name), reference, negligible)

    def _negligible(self) -> float:
        return NEGLIGIBLE * max(float(torch.linalg.vector_norm(g)) for g in self.reference.values())


def _residual(total: ParameterSum, reference: Tensor, negligible: Callable[[], float]) -> float:
    """Estimated from products with a few orthonormal random vectors, so that no gradient need be formed."""
    sides = total.gradient.sides
    dtype = torch.promote_types(reference.dtype, torch.float32)  # as exact as the gradient itself
    probes = probes_of(sides[1], dtype, reference.device)
    expected = reference.reshape(sides).to(dtype) @ probes
    size = float(torch.linalg.vector_norm(total.gradient.times(probes).to(dtype) - expected))
    size *= (sides[1] / probes.shape[1]) ** 0.5
    floor = total.scale if total.scale > 0 else max(_mass(total), negligible())  # no scale where no factors are known
    return size / floor if floor > 0 else (0.0 if size == 0 else float("inf"))


def _mass(total: ParameterSum) -> float:
    return sum(float(torch.linalg.vector_norm(g)) for g in total.gradient.dense.values())


def tolerance(parameter: torch.dtype, used: Iterable[torch.dtype]) -> float:
    """What rounding alone can make of a residual.

    Sums over m rows in another order differ by about sqrt(m) eps; 256 eps covers 65,000 rows. Half precisions round
    the gradient itself once more, which costs a few eps whatever the number of rows.
    """
    kinds = [d for d in (parameter, *used) if d.is_floating_point or d.is_complex]
    coarsest = max(torch.finfo(d).eps for d in kinds)
    return (8 if coarsest > 1e-5 else 256) * coarsest


def suspicion(adapters: Iterable[str], found: str) -> str:
    """Why a parameter that failed an audit is measured in another way; `found` is what the audit said."""
    named = [f"adapter {name!r}" for name in adapters]
    wrong = f"wrong factors of {' or '.join(named)}, or " if named else ""
    return f"{wrong}a use that cannot be seen ({found})"


def _dense(gradient: Tensor) -> Tensor:
    gradient = gradient.detach()
    return gradient.to_dense() if gradient.is_sparse else gradient


def _post_hooks(parameter: Tensor) -> bool:
    return bool(getattr(parameter, "_post_accumulate_grad_hooks", None))
