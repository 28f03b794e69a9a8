"""One captured op: the call in which parameter-only values met sample data, and the edges of the graph around it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from gradtrace.adapters import Adapter, is_joint
from gradtrace.calls import OpCall
from gradtrace.values import Value


@dataclass(frozen=True)
class OpKey:
    """What stays the same about an op from step to step: module, function, parameters, place among such calls."""

    module: str
    function: str
    parameters: tuple[str, ...]
    nth: int

    @property
    def family(self) -> tuple[str, str, tuple[str, ...]]:
        return self.module, self.function, self.parameters


@dataclass(frozen=True)
class Operand:
    """An effective weight of an op: where it stands in the call, its edge, its origin, and who factors it."""

    path: tuple[int | str, ...]
    edge: GradientEdge
    value: Value
    shape: tuple[int, ...]
    dtype: torch.dtype
    adapter: Adapter | None


@dataclass(frozen=True)
class Output:
    """One output of an op: its edge at the time of the call, and its shape and dtype as a meta tensor.

    An output that is a reshaped view of what the op made is followed at that base, whose shape is `base`: a later
    in-place change of the view rewrites the view's history, but not the base's.
    """

    edge: GradientEdge
    meta: Tensor
    base: tuple[int, ...]
    position: int  # its place among everything the call returns

    def adjoint(self, grad: Tensor) -> Tensor:
        """A gradient at `edge` in the output's shape."""
        return grad.reshape(self.meta.shape)


@dataclass
class Op:
    """A captured call. Tensors are kept only for operands that an adapter factors, and dropped by `release`."""

    number: int
    key: OpKey
    function: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    operands: list[Operand]
    outputs: list[Output]
    born: int  # autograd's sequence number when the call began: nodes below it are not this op's
    sources: frozenset[int]
    context: Any  # the labels of the samples this call worked on
    checkpointed: bool = False
    unseen_input: bool = False  # the data may be a constant: it came from nowhere known, or only picks parts of weights
    integers: bool = False  # the data are whole numbers: words, positions, choices
    routed: bool = False  # an index that may differ from step to step chose where rows stand
    input_shapes: tuple[str, ...] = ()
    versions: list[tuple[Tensor, int]] = field(default_factory=list)
    notes: dict[str, Any] = field(default_factory=dict)  # adapter -> what it noted just before the call

    @property
    def joint(self) -> bool:
        """Whether an adapter wants the adjoints of all outputs together."""
        return len(self.outputs) > 1 and any(is_joint(o.adapter) for o in self.operands)

    def call(self, operand: Operand, output: int, owners: Tensor | None) -> OpCall:
        """The call as an adapter sees it, for one operand and one output."""
        return OpCall(
            self.function, self.args, self.kwargs, operand.path, self.outputs[output].meta, owners,
            self.outputs[output].position, self.notes.get(operand.adapter.name) if operand.adapter else None,
        )  # fmt: skip

    def changed_in_place(self) -> bool:
        """Whether an input that was kept has been written to since the call."""
        return any(tensor._version != version for tensor, version in self.versions)

    def release(self) -> None:
        """Let go of every tensor."""
        self.args, self.kwargs, self.versions, self.notes = (), {}, [], {}
