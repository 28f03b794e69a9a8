"""The linear adapter keeps the contract for products of vectors, tensordot and kron."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from gradtrace_plugins.linear import LinearAdapter
from torch import Tensor

from gradtrace.testing import AdapterTests, OpCase, draw

C = torch.complex128
N, T, I, O, H = 7, 5, 3, 2, 11  # noqa: E741  samples, time, inputs, outputs, one more


class TestTensorProducts(AdapterTests):
    adapter = LinearAdapter()

    def calls(self) -> list[OpCase]:
        return [*vector_calls(), *tensor_calls()]


def vector_calls() -> Iterator[OpCase]:
    a, b = draw(I), draw(I, seed=1)
    yield OpCase("dot", torch.dot, (a, b), sample_axis=None)
    yield OpCase("dot, weight first, by keyword", torch.dot, (a,), {"tensor": b}, (0,), sample_axis=None)
    for name, function in (("dot", torch.dot), ("vdot", torch.vdot), ("vecdot", torch.linalg.vecdot)):
        pair = (draw(I, dtype=C), draw(I, dtype=C, seed=1))
        yield OpCase(f"{name}, complex", function, pair, sample_axis=None)
    yield OpCase("vdot", torch.vdot, (a, b), operand=(0,), sample_axis=None)
    yield OpCase("inner", torch.inner, (draw(N, T, I), draw(H, I)))
    yield OpCase("inner, weight first", torch.inner, (draw(H, I), draw(N, T, I)), operand=(0,), sample_axis=1)
    yield OpCase("inner, a vector of weights", torch.inner, (draw(N, T, I), a))
    yield OpCase("inner, complex", torch.inner, (draw(N, I, dtype=C), draw(H, I, dtype=C)))
    yield OpCase("outer", torch.outer, (draw(N), draw(O)))
    yield OpCase("outer, by keyword", torch.outer, (draw(N),), {"vec2": draw(O)}, ("vec2",))
    yield OpCase("ger, weight first", torch.ger, (draw(O), draw(N)), operand=(0,), sample_axis=1)
    yield OpCase("outer, complex weight", torch.outer, (draw(N), draw(O, dtype=C)))
    yield OpCase("vecdot", torch.linalg.vecdot, (draw(N, T, I), a))
    yield OpCase("vecdot, along the first axis", torch.linalg.vecdot, (draw(I, N), draw(I, 1)), {"dim": 0})
    yield OpCase("vecdot, a weight per head", torch.linalg.vecdot, (draw(H, I), draw(N, H, I)), operand=(0,))
    yield OpCase("vecdot, one weight for all axes", torch.linalg.vecdot, (draw(N, T, I), draw(1, 1, I)))
    yield OpCase("vecdot, a weight broadcast along the sum", torch.linalg.vecdot, (draw(N, I), draw(1)))


def tensor_calls() -> Iterator[OpCase]:
    dot, x = torch.tensordot, draw(N, T, I)
    yield OpCase("tensordot", dot, (x, draw(I, O)), {"dims": 1})
    yield OpCase("tensordot, the default", dot, (x, draw(T, I, O)))
    yield OpCase("tensordot, of nothing", dot, (draw(N), draw(I, O)), {"dims": 0})
    yield OpCase("tensordot, axes", dot, (x, draw(O, I, T)), {"dims": ([1, 2], [2, 1])})
    yield OpCase("tensordot, negative axes", dot, (x, draw(O, T)), {"dims": ((-2,), (-1,))})
    yield OpCase("tensordot, axes in a tensor", dot, (x, draw(O, I, T), torch.tensor([[1, 2], [2, 1]])))
    yield OpCase("tensordot, a number in a tensor", dot, (x, draw(I, O), torch.tensor(1)))
    yield OpCase("tensordot, weight first", dot, (draw(O, I), x), {"dims": ([1], [2])}, (0,), sample_axis=1)
    yield OpCase("tensordot, by keyword", dot, (), {"a": x, "b": draw(I, O), "dims": 1}, ("b",))
    yield OpCase("tensordot, broadcast", dot, (draw(N, I), draw(1, O)), {"dims": 1})
    yield OpCase("tensordot, all summed", dot, (draw(T, I), draw(T, I, seed=1)), sample_axis=None)
    yield OpCase("kron, a weight per entry", torch.kron, (draw(N, T), draw(I, O)), owners=_spread(N, I))
    yield OpCase(
        "kron, weight first",
        torch.kron,
        (draw(I, O), draw(N, T)),
        operand=(0,),
        owners=torch.arange(N).repeat(I)[:, None],
    )
    yield OpCase("kron, vectors", torch.kron, (draw(N), draw(O)), owners=torch.arange(N).repeat_interleave(O))
    yield OpCase("kron, more axes of weights", torch.kron, (draw(T), draw(I, O)), sample_axis=None)
    yield OpCase("kron, more axes of data", torch.kron, (draw(N, T, H), draw(I, O)), sample_axis=0)
    yield OpCase("kron, complex", torch.kron, (draw(T, dtype=C), draw(I, O, dtype=C)), sample_axis=None)


def _spread(samples: int, entries: int) -> Tensor:
    """The owner of every row of a Kronecker product whose first operand has a row per sample."""
    return torch.arange(samples).repeat_interleave(entries)[:, None]
