"""The pointwise adapter keeps the contract for addcmul and prelu, and leaves what is not theirs alone."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from gradtrace_plugins.pointwise import PointwiseAdapter

from gradtrace.calls import OpCall
from gradtrace.testing import AdapterTests, OpCase, draw

C = torch.complex128
N, T, I = 7, 5, 3  # noqa: E741  samples, time, features
x, y, w = draw(N, T, I), draw(N, T, I, seed=1), draw(I)


class TestPointwise(AdapterTests):
    adapter = PointwiseAdapter()

    def calls(self) -> list[OpCase]:
        return [*added_calls(), *slope_calls()]


def added_calls() -> Iterator[OpCase]:
    for function in (torch.addcmul, torch.Tensor.addcmul_):
        name = function.__name__
        yield OpCase(f"{name}, a scale", function, (x, y, w), operand=(2,))
        yield OpCase(f"{name}, a scale first", function, (x, w, y), {"value": -2}, (1,))
        yield OpCase(f"{name}, a scale per position", function, (x, y, draw(T, 1)), operand=(2,))
    yield OpCase("addcmul, by keyword", torch.addcmul, (x,), {"tensor1": y, "tensor2": w}, ("tensor2",))
    yield OpCase("addcmul, a shift", torch.addcmul, (w, x, y), {"value": 3}, (0,))
    yield OpCase("addcmul, a number", torch.addcmul, (x, y, draw()), operand=(2,))
    complex_ones = (draw(N, I, dtype=C), draw(N, I, dtype=C, seed=1), draw(I, dtype=C))
    yield OpCase("addcmul, complex", torch.addcmul, complex_ones, {"value": 1 + 2j}, (2,))


def slope_calls() -> Iterator[OpCase]:
    yield OpCase("prelu, one slope", F.prelu, (x, draw(1)))
    yield OpCase("prelu, a number", F.prelu, (x, draw()))
    yield OpCase("prelu, a slope per feature", F.prelu, (draw(N, I), w))
    yield OpCase("prelu, a slope per channel", F.prelu, (draw(N, I, T), w))
    yield OpCase("prelu, by keyword", F.prelu, (draw(N, I, T, 2),), {"weight": w}, ("weight",))
    yield OpCase("prelu, one vector", F.prelu, (draw(T), draw(1)), sample_axis=None)
    yield OpCase("prelu, channels of one sample each", F.prelu, (draw(T, N), draw(N)), owners=torch.arange(N)[None])


@pytest.mark.parametrize(
    "call",
    [
        OpCall(F.prelu, (x, draw(1)), operand=(0,)),
        OpCall(torch.addcmul, (x, 2, y, w), operand=(3,)),
        OpCall(torch.addcmul, (x, y, w), {"value": torch.tensor(2.0)}, (2,)),
        OpCall(torch.addcmul, (x.to_sparse(), y, w), operand=(2,)),
        OpCall(torch.addcmul, (x.to(C), y, w), operand=(2,)),
        OpCall(torch.lerp, (x, y, w), operand=(2,)),  # the example of `gradtrace plugins new`
        OpCall(torch.addcdiv, (x, y, w), operand=(2,)),
    ],
    ids=lambda call: call.name,
)
def test_other_calls_are_left_alone(call: OpCall) -> None:
    assert not PointwiseAdapter().claims(call)
