"""The owner residual: whether rows were given to the right samples, and whether every use of a parameter was seen."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from gradtrace.audit import NEGLIGIBLE
from gradtrace.calls import Adjoint
from gradtrace.contributions import Factored, Local, contributions, to_parameters, weighted
from gradtrace.factors import trusted_scale
from gradtrace.ops import Op
from gradtrace.survey import Probe, Slot


class OwnerAudit:
    """Per parameter, |g_c - sum_n c_n G_n| / scale for random weights c_n on the samples' cotangents.

    g_c is autograd's own. The weights are powers of two, so that even an adjoint that is nothing but rounding (of a
    shift that a softmax ignores) comes back exactly c_n times itself. The scale is the sum over rows of |a| |d| where
    factors are known. Where some are not, it is the norms of what was added, and never less than a thousandth of the
    model's largest gradient. A use of the parameter that was not seen shows here as well as a row given to the wrong
    sample. Ops are added one after the other, so that their adjoints need not live together.
    """

    def __init__(self, probe: Probe, parameters: Mapping[str, GradientEdge], generator: torch.Generator) -> None:
        powers = torch.randint(-3, 4, (probe.n_samples,), generator=generator)
        weights = torch.ldexp(torch.ones(probe.n_samples, dtype=torch.float64), powers)
        names = list(parameters)
        found = probe.adjoints([parameters[n] for n in names], weights)
        self._expected = {name: g for name, g in zip(names, found, strict=True) if g is not None}
        self._probe, self._parameters = probe, parameters
        self._weights = torch.cat([weights, torch.ones(1, dtype=torch.float64)])
        self._ours: dict[str, Tensor] = {}
        self._scale: dict[str, float | Tensor] = {}
        self._unfactored: set[str] = set()

    def add(self, op: Op, adjoints: Mapping[Slot, Tensor], owners: Mapping[Slot, Tensor]) -> None:
        """The op's share, from the probe's plain adjoints and the owners found."""
        known = {
            place: Adjoint(adjoints[op.number, place], owners[op.number, place])
            for place in range(len(op.outputs))
            if (op.number, place) in owners and (op.number, place) in adjoints
        }
        with self._probe.passing(frozen=True):
            for together in [known] if op.joint else [{place: one} for place, one in known.items()]:
                for part in contributions(op, together) if together else ():
                    if isinstance(part, Factored):
                        self._add(part, weighted(op, part, self._weights))
                    else:
                        self._add(part, part.pull(self._weights))

    def _add(self, part: Factored | Local, gradient: Tensor | None) -> None:
        operand = part.operand
        if gradient is None:
            return
        for name, share in to_parameters(gradient, operand.edge, operand.value, self._parameters).items():
            self._ours[name] = self._ours[name] + share if name in self._ours else share
            if isinstance(part, Factored) and operand.value.moves is not None:
                gain = math.prod(move.gain for move in operand.value.moves)
                size: float | Tensor = gain * trusted_scale(part.factors, part.factors.norms())
            else:
                size = _norm(share)
                self._unfactored.add(name)
            self._scale[name] = self._scale.get(name, 0.0) + size

    def residuals(self) -> dict[str, float]:
        """Of every parameter that the probe reaches; not of one whose gradient overflowed, which can be asked again."""
        largest = max((_norm(g) for g in self._expected.values() if bool(torch.isfinite(g).all())), default=0.0)
        found = {}
        for name in self._parameters:
            expected, ours = self._expected.get(name), self._ours.get(name)
            if (expected is None and ours is None) or (expected is not None and not torch.isfinite(expected).all()):
                continue
            size = _norm(ours if expected is None else expected if ours is None else expected - ours)
            floor = float(self._scale.get(name, 0.0)) or _norm(expected)
            if name in self._unfactored or name not in self._ours:
                floor = max(floor, NEGLIGIBLE * largest)
            found[name] = size / floor if floor > 0 else (0.0 if size == 0 else float("inf"))
        return found


def _norm(gradient: Tensor | None) -> float:
    return 0.0 if gradient is None else float(torch.linalg.vector_norm(gradient))
