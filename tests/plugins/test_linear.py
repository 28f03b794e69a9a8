"""The linear adapter keeps the contract for every product of two operands, and leaves what is none alone.

Products of vectors and of any axes: test_tensor_products.py; of three operands and more: test_contraction.py.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from gradtrace_plugins.linear import LinearAdapter
from torch import Tensor

from gradtrace.calls import OpCall, RowsCutError
from gradtrace.testing import AdapterTests, OpCase, draw, reference_gradient

C = torch.complex128
N, T, I, O, H = 7, 5, 3, 2, 11  # noqa: E741  samples, time, inputs, outputs, one more


def linear_calls() -> Iterator[OpCase]:
    w = draw(O, I)
    yield OpCase("linear, one sample", F.linear, (draw(I), w), sample_axis=None)
    yield OpCase("linear", F.linear, (draw(N, I), w))
    yield OpCase("linear, with a bias", F.linear, (draw(N, I), w, draw(O)))
    yield OpCase("linear, by keyword", F.linear, (draw(N, I),), {"weight": w, "bias": draw(O)}, ("weight",))
    yield OpCase("linear, batch first", F.linear, (draw(N, T, I), w))
    yield OpCase("linear, time first", F.linear, (draw(T, N, I), w), sample_axis=1)
    yield OpCase("linear, four axes", F.linear, (draw(N, T, H, I), w), sample_axis=0)
    yield OpCase("linear, samples inside", F.linear, (draw(T, H, N, I), w), sample_axis=2)
    yield OpCase("linear, one output", F.linear, (draw(N, T, I), draw(1, I)))
    yield OpCase("linear, one input", F.linear, (draw(N, T, 1), draw(O, 1)))
    yield OpCase("linear, a vector of weights", F.linear, (draw(N, T, I), draw(I)))
    yield OpCase("linear, a vector of weights and one sample", F.linear, (draw(I), draw(I, seed=1)), sample_axis=None)
    yield OpCase("linear, complex", F.linear, (draw(N, T, I, dtype=C), draw(O, I, dtype=C)))
    yield OpCase("linear, a learned input", F.linear, (draw(T, I), draw(N, I)), operand=(0,), sample_axis=1)
    yield OpCase("linear, no rows", F.linear, (draw(0, I), w))
    yield OpCase("linear, no positions", F.linear, (draw(N, 0, I), w))
    yield OpCase("linear, data of any strides", F.linear, (draw(I, N, T).permute(1, 2, 0), w))
    routed = torch.randperm(N * T, generator=torch.Generator().manual_seed(0)).reshape(N, T, 1) % 4 - 1
    yield OpCase("linear, an owner per position", F.linear, (draw(N, T, I), w), owners=routed)


def matmul_calls() -> Iterator[OpCase]:
    w, left = draw(I, O), draw(O, I)
    yield OpCase("matmul", torch.matmul, (draw(N, I), w))
    yield OpCase("matmul, by keyword", torch.matmul, (draw(N, I),), {"other": w}, ("other",))
    yield OpCase("matmul, all by keyword", torch.matmul, (), {"input": draw(N, I), "other": w}, ("other",))
    yield OpCase("@", torch.Tensor.__matmul__, (draw(N, T, I), w))
    yield OpCase("@, reversed", torch.Tensor.__rmatmul__, (draw(I, N), left), sample_axis=1)
    yield OpCase("@, reversed, weight first", torch.Tensor.__rmatmul__, (w, draw(N, T, I)), operand=(0,))
    yield OpCase("method", torch.Tensor.matmul, (draw(N, I), w))
    yield OpCase("matmul, four axes", torch.matmul, (draw(T, N, H, I), w), sample_axis=1)
    yield OpCase("matmul, a vector of data", torch.matmul, (draw(I), w), sample_axis=None)
    yield OpCase("matmul, a vector of weights", torch.matmul, (draw(N, T, I), draw(I)))
    yield OpCase("matmul, two vectors", torch.matmul, (draw(I), draw(I, seed=1)), sample_axis=None)
    yield OpCase("matmul, weight on the left", torch.matmul, (left, draw(I, N)), operand=(0,), sample_axis=1)
    yield OpCase("matmul, weight on the left, batched", torch.matmul, (left, draw(N, I, T)), operand=(0,))
    yield OpCase(
        "matmul, weight on the left of a vector", torch.matmul, (left, draw(I)), operand=(0,), sample_axis=None
    )
    yield OpCase("matmul, a vector of weights on the left", torch.matmul, (draw(I), draw(N, I, T)), operand=(0,))
    yield OpCase("matmul, a product per head", torch.matmul, (draw(N, H, T, I), draw(H, I, O)))
    yield OpCase(
        "matmul, a product per head, on the left", torch.matmul, (draw(H, O, I), draw(N, H, I, T)), operand=(0,)
    )
    yield OpCase("matmul, heads share the data", torch.matmul, (draw(N, 1, T, I), draw(H, I, O)))
    yield OpCase("matmul, heads of weights only", torch.matmul, (draw(N, I), draw(H, I, O)), sample_axis=1)
    yield OpCase("matmul, two batch axes", torch.matmul, (draw(N, H, T, I), draw(N, H, I, O)), sample_axis=0)
    yield OpCase(
        "matmul, a batch axis of one on both sides", torch.matmul, (draw(1, N, I), draw(1, I, O)), sample_axis=1
    )
    yield OpCase("matmul, one product for all heads", torch.matmul, (draw(N, H, T, I), draw(1, I, O)))
    yield OpCase("matmul, one product for all, on the left", torch.matmul, (draw(1, O, I), draw(N, I, T)), operand=(0,))
    yield OpCase("matmul, one axis of two shared", torch.matmul, (draw(N, H, T, I), draw(H, I, O)[None]))
    yield OpCase("linalg.matmul", torch.linalg.matmul, (draw(N, T, I), w))
    yield OpCase("matmul, complex", torch.matmul, (draw(N, I, dtype=C), draw(I, O, dtype=C)))
    yield OpCase("matmul, conjugated", torch.matmul, (draw(N, I, dtype=C).conj(), draw(I, O, dtype=C)))
    yield OpCase(
        "matmul, weight on the left, complex",
        torch.matmul,
        (draw(O, I, dtype=C), draw(N, I, T, dtype=C)),
        operand=(0,),
    )


def product_calls() -> Iterator[OpCase]:
    yield OpCase("mm", torch.mm, (draw(N, I), draw(I, O)))
    yield OpCase("mm, weight first", torch.mm, (draw(O, I), draw(I, N)), operand=(0,), sample_axis=1)
    yield OpCase("mm, by keyword", torch.mm, (draw(N, I),), {"mat2": draw(I, O)}, ("mat2",))
    yield OpCase("bmm, an expert each", torch.bmm, (draw(H, N, I), draw(H, I, O)), sample_axis=1)
    yield OpCase("bmm, a weight per sample", torch.bmm, (draw(N, T, I), draw(N, I, O)))
    yield OpCase("bmm, weight first", torch.bmm, (draw(H, O, I), draw(H, I, N)), operand=(0,), sample_axis=2)
    yield OpCase("bmm, complex", torch.bmm, (draw(H, N, I, dtype=C), draw(H, I, O, dtype=C)), sample_axis=1)
    yield OpCase("mv, a matrix of weights", torch.mv, (draw(O, I), draw(I)), operand=(0,), sample_axis=None)
    yield OpCase("mv, a vector of weights", torch.mv, (draw(N, I), draw(I)))


def added_calls() -> Iterator[OpCase]:
    scales: dict[str, float] = {"alpha": 0.3, "beta": -2}
    yield OpCase("addmm", torch.addmm, (draw(O), draw(N, I), draw(I, O)), operand=(2,))
    yield OpCase("addmm, scaled", torch.addmm, (draw(O), draw(N, I), draw(I, O)), scales, (2,))
    yield OpCase("addmm, weight first", torch.addmm, (draw(N), draw(O, I), draw(I, N)), scales, (1,), sample_axis=1)
    yield OpCase(
        "addmm, by keyword", torch.addmm, (draw(O),), {"mat1": draw(N, I), "mat2": draw(I, O), "alpha": 3}, ("mat2",)
    )
    yield OpCase("addmm, alpha of zero", torch.addmm, (draw(O), draw(N, I), draw(I, O)), {"alpha": 0}, (2,))
    yield OpCase(
        "addmm, complex",
        torch.addmm,
        (draw(O, dtype=C), draw(N, I, dtype=C), draw(I, O, dtype=C)),
        {"alpha": 1 + 2j, "beta": 2 - 1j},
        (2,),
    )
    yield OpCase("method addmm", torch.Tensor.addmm, (draw(O), draw(N, I), draw(I, O)), scales, (2,))
    yield OpCase("addmm_", torch.Tensor.addmm_, (draw(N, O), draw(N, I), draw(I, O)), scales, (2,))
    yield OpCase("addr", torch.addr, (draw(N, O), draw(N), draw(O)), scales, (2,))
    yield OpCase("addr, weight first", torch.addr, (draw(O, N), draw(O), draw(N)), scales, (1,), sample_axis=1)
    batches = (draw(N, O), draw(H, N, I), draw(H, I, O))
    yield OpCase("addbmm", torch.addbmm, batches, scales, (2,))
    yield OpCase("addbmm_", torch.Tensor.addbmm_, batches, scales, (2,))
    yield OpCase("addmv, a vector of weights", torch.addmv, (draw(N), draw(N, I), draw(I)), scales, (2,))
    yield OpCase(
        "addmv, a matrix of weights", torch.addmv, (draw(O), draw(O, I), draw(I)), scales, (1,), sample_axis=None
    )
    yield OpCase("baddbmm", torch.baddbmm, (draw(H, 1, O), draw(H, N, I), draw(H, I, O)), scales, (2,), sample_axis=1)
    yield OpCase(
        "baddbmm, weight first",
        torch.baddbmm,
        (draw(H, O, N), draw(H, O, I), draw(H, I, N)),
        scales,
        (1,),
        sample_axis=2,
    )


def einsum_calls() -> Iterator[OpCase]:
    e, x, w = torch.einsum, draw(N, T, I), draw(I, O)
    yield OpCase("einsum", e, ("nti,io->nto", x, w), operand=(2,))
    yield OpCase("einsum, spaces", e, (" n t i , i o -> n t o ", x, w), operand=(2,))
    yield OpCase("einsum, weight first", e, ("oi,nti->nto", draw(O, I), x), operand=(1,))
    yield OpCase("einsum, in a list", e, ("nti,io->nto", [x, w]), operand=(1, 1))
    yield OpCase("einsum, in a list, weight first", e, ("io,nti->nto", [w, x]), operand=(1, 0))
    yield OpCase("einsum, output turned", e, ("nti,io->ont", x, w), operand=(2,), sample_axis=1)
    yield OpCase("einsum, ellipsis", e, ("...i,io->...o", x, w), operand=(2,))
    yield OpCase("einsum, ellipsis, weight first", e, ("oi,...i->...o", draw(O, I), x), operand=(1,))
    yield OpCase("einsum, ellipsis of nothing", e, ("...i,io->...o", draw(I), w), operand=(2,), sample_axis=None)
    yield OpCase("einsum, letters that the ellipsis must not take", e, ("...A,AB->...B", x, w), operand=(2,))
    yield OpCase("einsum, heads", e, ("nti,iho->nhto", x, draw(I, H, O)), operand=(2,))
    yield OpCase("einsum, heads merged", e, ("nhto,hoi->nti", draw(N, H, T, O), draw(H, O, I)), operand=(2,))
    yield OpCase("einsum, several axes in and out", e, ("nia,iaob->nbo", draw(N, I, T), draw(I, T, O, H)), operand=(2,))
    yield OpCase("einsum, an expert each", e, ("hni,hio->nho", draw(H, N, I), draw(H, I, O)), operand=(2,))
    yield OpCase("einsum, no output told", e, ("nti,io", x, w), operand=(2,))
    yield OpCase("einsum, no output told, in a list", e, ("ji,nj", [w, draw(N, I)]), operand=(1, 0), sample_axis=1)
    yield OpCase("einsum, no output told, ellipsis", e, ("...b,ba", x, w), operand=(2,))
    yield OpCase("einsum, ellipsis summed", e, ("...i,io->o", draw(T, I), w), operand=(2,), sample_axis=None)
    yield OpCase(
        "einsum, ellipsis of a weight", e, ("nt...i,i...o->nt...o", draw(N, T, H, I), draw(I, H, O)), operand=(2,)
    )
    yield OpCase(
        "einsum, ellipses of different lengths", e, ("...ni,...io->n...o", draw(N, I), draw(H, T, I, O)), operand=(2,)
    )
    yield OpCase("einsum, data summed", e, ("nti,io->no", x, w), operand=(2,))
    yield OpCase("einsum, a diagonal of data", e, ("ntt,to->no", draw(N, T, T), draw(T, O)), operand=(2,))
    yield OpCase("einsum, weight broadcast", e, ("nti,tio->nto", x, draw(1, I, O)), operand=(2,))
    yield OpCase("einsum, weight broadcast and summed", e, ("nti,tio->no", x, draw(1, I, O)), operand=(2,))
    yield OpCase("einsum, weight broadcast along samples", e, ("ni,nio->no", draw(N, I), draw(1, I, O)), operand=(2,))
    yield OpCase("einsum, weights summed", e, ("ni,hio->no", draw(N, I), draw(H, I, O)), operand=(2,), rows=N)
    yield OpCase("einsum, outputs summed", e, ("ni,io->n", draw(N, I), w), operand=(2,), rows=N)
    yield OpCase(
        "einsum, a sum of weights per entry", e, ("ni,hi->ni", draw(N, I), draw(H, I)), operand=(2,), rows=N * I
    )
    yield OpCase("einsum, element by element", e, ("nti,i->nti", x, draw(I)), operand=(2,))
    yield OpCase("einsum, a vector of weights", e, ("nti,i->nt", x, draw(I)), operand=(2,))
    yield OpCase("einsum, outer", e, ("n,o->no", draw(N), draw(O)), operand=(2,))
    yield OpCase("einsum, a number", e, ("nt,->nt", draw(N, T), draw()), operand=(2,))
    yield OpCase("einsum, all summed", e, ("ti,ti->", draw(T, I), draw(T, I, seed=1)), operand=(2,), sample_axis=None)
    yield OpCase("einsum, data broadcast", e, ("nhi,hio->nho", draw(N, 1, I), draw(H, I, O)), operand=(2,))
    yield OpCase("einsum, summed data broadcast", e, ("ni,io->no", draw(N, 1), draw(I, O)), operand=(2,))
    yield OpCase("einsum, complex", e, ("nti,io->nto", draw(N, T, I, dtype=C), draw(I, O, dtype=C)), operand=(2,))


class TestLinear(AdapterTests):
    adapter = LinearAdapter()

    def calls(self) -> list[OpCase]:
        return [
            *linear_calls(),
            *matmul_calls(),
            *product_calls(),
            *added_calls(),
            *einsum_calls(),
        ]


x, w = draw(N, I), draw(I, O)


@pytest.mark.parametrize(
    "call",
    [
        OpCall(F.linear, (x, draw(O, I), draw(O)), operand=(2,)),
        OpCall(torch.matmul, (x.to_sparse(), w)),
        OpCall(torch.addmm, (2.0, draw(O), x, w)),
        OpCall(torch.addmm, (draw(O), x, w), {"alpha": torch.tensor(2.0)}, (2,)),
        OpCall(torch.addmm, (draw(O), x, w), operand=(0,)),
        OpCall(torch.einsum, ("ni,ii->ni", x, draw(I, I)), operand=(2,)),
        OpCall(torch.einsum, (x, [0, 1], w, [1, 2]), operand=(2,)),
        OpCall(torch.inner, (x, draw())),
        OpCall(torch.vdot, (draw(I, dtype=C), draw(I, dtype=C)), operand=(0,)),
        OpCall(torch.outer, (draw(N, dtype=C), draw(O))),
        OpCall(torch.cumsum, (x, 0), operand=(0,)),
    ],
    ids=lambda call: call.name,
)
def test_what_is_no_product_of_plain_operands_is_left_alone(call: OpCall) -> None:
    assert not LinearAdapter().claims(call)


@pytest.mark.parametrize(
    "call",
    [
        OpCall(torch.einsum, ("ni,io,op->np", x, w), operand=(2,)),
        OpCall(torch.einsum, ("ni", x, w), operand=(2,)),
        OpCall(torch.tensordot, (x, w), {"dims": 7}),
        OpCall(torch.tensordot, (x, w), {"dims": ([0], [5])}),
        OpCall(torch.tensordot, (x, w), {"dims": "one"}),
        OpCall(torch.linalg.vecdot, (x, w), {"dim": 4}),
        OpCall(torch.linalg.multi_dot, ([w],), operand=(0, 0)),
        OpCall(torch.matmul, (x, draw())),
        OpCall(F.linear, (draw(), w)),
    ],
    ids=lambda call: call.name,
)
def test_of_a_call_that_torch_refuses_torch_says_why(call: OpCall) -> None:
    LinearAdapter().claims(call)
    with pytest.raises((RuntimeError, TypeError, IndexError, ValueError)):
        call.function(*call.args, **call.kwargs)


def test_rows_that_belong_to_several_samples_are_refused() -> None:
    """A weight that mixes the samples of a batch."""
    mixing = OpCall(torch.matmul, (draw(T, N), draw(N, I)), operand=(0,), owners=torch.arange(3)[None])
    assert LinearAdapter().factors(mixing, draw(T, I)).densify().shape == (T, N)
    with pytest.raises(RowsCutError, match="linear"):
        LinearAdapter().factors(OpCall(F.linear, (x, draw(O, I)), owners=torch.arange(O)[None]), draw(N, O))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_under_autocast_the_activation_is_cast_as_the_op_cast_it(dtype: torch.dtype) -> None:
    x, w = draw(N, T, I, dtype=torch.float32), draw(O, I, dtype=torch.float32)

    def cast(x: Tensor, w: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=dtype):
            return F.linear(x, w)

    adjoint = draw(N, T, O, dtype=torch.float32).to(dtype)
    call = OpCall(F.linear, (x, w), owners=torch.arange(N).reshape(N, 1, 1))
    got = LinearAdapter().factors(call, adjoint)
    rows = got.rows()
    assert rows is not None
    assert rows.activation is not None
    assert rows.activation.dtype == dtype
    expected = reference_gradient(OpCall(cast, (x, w)), adjoint)
    assert got.densify().float() == pytest.approx(expected, rel=2e-2, abs=2e-2)
