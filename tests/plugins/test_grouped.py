"""The grouped adapter keeps the contract for fused experts.

torch's grouped product refuses float64, in which contracts are tested: so they are with the same product written out,
and torch's own is compared with that, and by itself to what its precision allows.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import transformers.integrations.moe  # noqa: F401  registers transformers::grouped_mm_fallback
from gradtrace_plugins.grouped import GroupedAdapter, GroupedFactors
from torch import Tensor

from gradtrace.calls import OpCall, RowsCutError, meta_like
from gradtrace.testing import AdapterTests, OpCase, draw, masked, reference_gradient

N, I, O, E = 23, 5, 3, 7  # noqa: E741  rows, inputs, outputs, experts
ENDS = torch.tensor([0, 4, 5, 5, 11, 19, N], dtype=torch.int32)  # the first and the fourth expert have no rows
SHORT = torch.tensor([2, 4, 5, 5, 11, 13, 19], dtype=torch.int32)  # nobody takes the last four rows


def _grouped_mm(input: Tensor, mat2: Tensor, offs: Tensor | None = None) -> Tensor:
    """torch's function of this name, in any dtype; rows that nobody takes are zero."""
    if offs is None:
        return torch.bmm(input, mat2)
    if input.dim() == 3:
        return _grouped_mm(mat2.mT, input.mT, offs).mT
    ends = offs.tolist()
    parts = [input[start:end] @ w for start, end, w in zip([0, *ends], ends, mat2, strict=False)]
    return torch.cat([*parts, input.new_zeros(len(input) - ends[-1], mat2.shape[2])])


def owners(ends: Tensor, rows: int = N) -> Tensor:
    """Samples in no order, one row in four nobody's, and nobody's all that no expert takes."""
    drawn = torch.randperm(rows, generator=torch.Generator().manual_seed(0)) % 4 - 1
    return torch.where(torch.arange(rows) < int(ends[-1]), drawn, -1)


class TestGrouped(AdapterTests):
    adapter = GroupedAdapter()

    def calls(self) -> list[OpCase]:
        return list(grouped_calls())


def grouped_calls() -> Iterator[OpCase]:
    x, w = draw(N, I), draw(E, I, O)
    yield OpCase("rows of their own", _grouped_mm, (x, w, ENDS))
    yield OpCase("routed", _grouped_mm, (x, w), {"offs": ENDS}, owners=owners(ENDS)[:, None])
    yield OpCase("by keyword", _grouped_mm, (x,), {"mat2": w, "offs": ENDS}, ("mat2",))
    yield OpCase("rows that nobody takes", _grouped_mm, (x, w, SHORT), owners=owners(SHORT)[:, None], rows=19)
    yield OpCase("weight turned", _grouped_mm, (x, draw(E, O, I).mT, ENDS.long()))
    yield OpCase("weight first", _grouped_mm, (draw(E, O, I), draw(I, N), ENDS), operand=(0,), sample_axis=1)
    yield OpCase("no rows", _grouped_mm, (draw(0, I), w, torch.zeros_like(ENDS)))
    yield OpCase("as many rows each", _grouped_mm, (draw(E, N, I), w), sample_axis=1)
    yield OpCase(
        "as many rows each, weight first", _grouped_mm, (draw(E, O, I), draw(E, I, N)), operand=(0,), sample_axis=2
    )
    fallback = torch.ops.transformers.grouped_mm_fallback
    yield OpCase("transformers' own", fallback, (x, w, ENDS))
    yield OpCase("transformers' own, routed", fallback, (x, w, SHORT), owners=owners(SHORT)[:, None], rows=19)


@pytest.mark.parametrize("ends", [ENDS, SHORT], ids=["all rows", "some rows"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_torchs_own_function_has_these_factors(dtype: torch.dtype, ends: Tensor) -> None:
    """Errors are those of sums in this dtype: a few units of rounding of the sum of |a| |d|."""
    x, w, adjoint = (draw(*shape).to(dtype) for shape in ((N, 8), (E, 8, 16), (N, 16)))
    call = OpCall(torch._grouped_mm, (x, w), {"offs": ends}, owners=owners(ends)[:, None], output=meta_like(adjoint))
    assert GroupedAdapter().claims(call)
    factors = GroupedAdapter().factors(call, adjoint)
    for keep in (torch.tensor([True, False, True, False]), torch.ones(4, dtype=torch.bool)):
        expected, some = reference_gradient(call, masked(call, adjoint, keep)), factors.restrict(keep)
        got = some.densify()
        assert got.dtype == dtype
        error = float(torch.linalg.vector_norm((got - expected).double()))
        assert error <= 4 * torch.finfo(dtype).eps * some.scale()


@pytest.mark.parametrize(
    ("first", "second"),
    [((N, 8), (E, 8, 16)), ((E, 16, 8), (8, N + 1)), ((E, 4, 8), (E, 8, 16))],
    ids=["rows by weights", "weights by columns", "batches"],
)
def test_what_is_tested_is_torchs_own_function(first: tuple[int, ...], second: tuple[int, ...]) -> None:
    ends = (
        None
        if len(first) == len(second)
        else torch.tensor([2, 4, 5, 5, 11, 19, first[0] if len(first) == 2 else N + 1])
    )
    a, b = draw(*first, dtype=torch.float32), draw(*second, dtype=torch.float32)
    got = torch._grouped_mm(a, b, offs=None if ends is None else ends.int())
    expected = _grouped_mm(a.double(), b.double(), ends)
    assert float((got - expected).abs().max()) <= 8 * torch.finfo(torch.float32).eps * float(expected.abs().max())


@pytest.mark.parametrize(
    "call",
    [
        OpCall(_grouped_mm, (draw(N, I), draw(I, N), ENDS)),  # its shared axis is what is cut
        OpCall(_grouped_mm, (draw(N, I), draw(E, I, O), ENDS), operand=(0,)),
        OpCall(_grouped_mm, (draw(N, I).to_sparse(), draw(E, I, O), ENDS)),
        OpCall(_grouped_mm, (draw(N, I), draw(E, I, O))),
    ],
)
def test_other_grouped_products_are_left_alone(call: OpCall) -> None:
    assert not GroupedAdapter().claims(call)


def test_rows_that_belong_to_several_samples_are_refused() -> None:
    call = OpCall(_grouped_mm, (draw(N, I), draw(E, I, O), ENDS), owners=torch.arange(O)[None])
    with pytest.raises(RowsCutError, match="_grouped_mm"):
        GroupedAdapter().factors(call, draw(N, O))


def test_rows_are_kept_as_they_are() -> None:
    x, adjoint = draw(N, I), draw(N, O)
    factors = GroupedAdapter().factors(
        OpCall(_grouped_mm, (x, draw(E, I, O), SHORT), owners=owners(SHORT)[:, None]), adjoint
    )
    assert isinstance(factors, GroupedFactors)
    assert (factors.activation.data_ptr(), factors.adjoint.data_ptr()) == (x.data_ptr(), adjoint.data_ptr())
