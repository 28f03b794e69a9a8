"""Products of three operands and more: the contract, and how the operands are dealt out between A and D."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from gradtrace_plugins.linear import LinearAdapter

from gradtrace.calls import OpCall, RowsCutError
from gradtrace.factors import BatchedFactors
from gradtrace.testing import AdapterTests, OpCase, draw

C = torch.complex128
N, T, I, J, O, H = 7, 5, 3, 2, 11, 13  # noqa: E741  samples, time, inputs, other inputs, outputs, one more
einsum, multi_dot = torch.einsum, torch.linalg.multi_dot


def chain_calls() -> Iterator[OpCase]:
    x, down, up = draw(N, I), draw(I, J), draw(J, O)
    yield OpCase("low rank, the first factor", einsum, ("ni,ir,ro->no", x, down, up), operand=(2,), rows=N)
    yield OpCase("low rank, the second factor", einsum, ("ni,ir,ro->no", x, down, up), operand=(3,), rows=N)
    yield OpCase("low rank, in a list", einsum, ("ni,ir,ro", [x, down, up]), operand=(1, 1), rows=N)
    yield OpCase("low rank, positions", einsum, ("...i,ir,ro->...o", draw(N, T, I), down, up), operand=(2,), rows=N * T)
    turned = (up.mT, down.mT, x.mT)
    yield OpCase("low rank, turned", multi_dot, (turned,), operand=(0, 1), sample_axis=1, rows=N)
    yield OpCase("multi_dot", multi_dot, ([x, down, up],), operand=(0, 1), rows=N)
    yield OpCase("multi_dot, by keyword", multi_dot, (), {"tensors": [x, down, up]}, ("tensors", 2), rows=N)
    yield OpCase("multi_dot, two", multi_dot, ([x, down],), operand=(0, 1))
    yield OpCase("multi_dot, four", multi_dot, ([x, down, up, draw(O, H)],), operand=(0, 2), rows=N)
    yield OpCase(
        "multi_dot, vectors at the ends",
        multi_dot,
        ([draw(I), down, draw(J)],),
        operand=(0, 1),
        sample_axis=None,
        rows=1,
    )
    yield OpCase("multi_dot, a vector of weights", multi_dot, ([x, down, draw(J)],), operand=(0, 2), rows=N)
    complex_ones = [draw(N, I, dtype=C), draw(I, J, dtype=C), draw(J, O, dtype=C)]
    yield OpCase("multi_dot, complex", multi_dot, (complex_ones,), operand=(0, 1), rows=N)


def shared_calls() -> Iterator[OpCase]:
    x, y, w = draw(N, I), draw(N, J), draw(O, I, J)
    yield OpCase("bilinear", einsum, ("ni,oij,nj->no", x, w, y), operand=(2,))
    yield OpCase("bilinear, no output told", einsum, ("ni,oij,nj", x, w, y), operand=(2,), sample_axis=None, rows=1)
    pairs = (draw(N, T, I), draw(O, I, J), draw(N, H, J))
    yield OpCase("a score per pair of positions", einsum, ("nti,oij,nhj->noth", *pairs), operand=(2,), rows=N * T)
    heads = (draw(N, J, T, I), draw(J, I, O), draw(N, J, H, O))
    yield OpCase("a score per pair and head", einsum, ("nkti,kio,nkho->nkth", *heads), operand=(2,), rows=N * T * J)
    gated = (draw(N, H), draw(N, I), draw(H, I, O))
    yield OpCase("experts and their gates", einsum, ("nh,ni,hio->no", *gated), operand=(3,), rows=N)
    yield OpCase("a scale in front", einsum, ("ni,i,io->no", x, draw(I), draw(I, O)), operand=(2,), rows=N * I)
    yield OpCase("three of data", einsum, ("ni,nj,nh,ijh->n", x, y, draw(N, H), draw(I, J, H)), operand=(4,))
    mask = (draw(N, T, I), draw(I, O), draw(N, T))
    yield OpCase("masked positions, summed", einsum, ("nti,io,nt->no", *mask), operand=(2,))
    broadcast = (draw(N, 1), draw(O, I, J), draw(1, J))
    yield OpCase("operands broadcast", einsum, ("ni,oij,nj->no", *broadcast), operand=(2,))
    stretched = (draw(N, T, I), draw(1, I, J), draw(J, O))
    yield OpCase("weight broadcast", einsum, ("nti,tij,jo->nto", *stretched), operand=(2,), rows=N * T)
    mixed = (draw(N, I, dtype=C), draw(O, I, J, dtype=C), draw(N, J, dtype=C))
    yield OpCase("complex", einsum, ("ni,oij,nj->no", *mixed), operand=(2,))


class TestContraction(AdapterTests):
    adapter = LinearAdapter()

    def calls(self) -> list[OpCase]:
        return [*chain_calls(), *shared_calls()]


@pytest.mark.filterwarnings("ignore:torch.chain_matmul is deprecated")
class TestChainMatmul(AdapterTests):
    adapter = LinearAdapter()

    def calls(self) -> list[OpCase]:
        operands = (draw(N, I), draw(I, J), draw(J, O))
        return [OpCase(f"weight {i}", torch.chain_matmul, operands, operand=(i,), rows=N) for i in (1, 2)]


@pytest.mark.parametrize(
    ("equation", "operand", "owned", "activation", "adjoint"),
    [
        ("ni,ir,ro->no", (2,), 0, (N, I), (N, J)),  # what follows the weight goes with the adjoint
        ("ni,ir,ro->no", (3,), 0, (N, J), (N, O)),  # what comes before it makes the activation
        ("or,ri,in->on", (2,), 1, (N, I), (N, J)),  # the samples tell which is which
        ("ni,oij,nj->no", (2,), 0, (N, I * J), (N, O)),  # as in `bilinear`
        ("nti,oij,nhj->noth", (2,), 0, (N * T, I), (N * T, O * J)),  # no matrix of all pairs of positions
    ],
)
def test_the_activation_has_as_few_axes_as_the_owners_allow(
    equation: str, operand: tuple[int], owned: int, activation: tuple[int, int], adjoint: tuple[int, int]
) -> None:
    sizes = dict(zip("ntijroh", (N, T, I, J, J, O, H), strict=True))
    terms, out = equation.split("->")
    tensors = [draw(*(sizes[label] for label in term)) for term in terms.split(",")]
    shape = [sizes[label] for label in out]
    owners = torch.arange(N).reshape([N if axis == owned else 1 for axis in range(len(shape))])
    call = OpCall(einsum, (equation, *tensors), operand=operand, owners=owners)
    rows = LinearAdapter().factors(call, draw(*shape)).rows()
    assert rows is not None
    assert rows.activation is not None
    assert (rows.activation.shape, rows.adjoint.shape) == (activation, adjoint)


def test_rows_of_several_samples_are_refused() -> None:
    """Both ends of the chain vary with the owner: no dealing out gives every row one."""
    owners = torch.arange(N * O).reshape(N, O)
    call = OpCall(multi_dot, ([draw(N, I), draw(I, O)],), operand=(0, 1), owners=owners)
    with pytest.raises(RowsCutError, match="multi_dot"):
        LinearAdapter().factors(call, draw(N, O))


def test_a_plain_product_is_not_copied() -> None:
    x, adjoint = draw(N, T, I), draw(N, T, O)
    call = OpCall(torch.nn.functional.linear, (x, draw(O, I)), owners=torch.arange(N).reshape(N, 1, 1))
    rows = LinearAdapter().factors(call, adjoint).rows()
    assert rows is not None
    assert rows.activation is not None
    assert (rows.activation.data_ptr(), rows.adjoint.data_ptr()) == (x.data_ptr(), adjoint.data_ptr())


def test_elements_of_the_weight_that_meet_alone_stay_side_by_side() -> None:
    call = OpCall(einsum, ("nti,i->nti", draw(N, T, I), draw(I)), operand=(2,), owners=torch.arange(N).reshape(N, 1, 1))
    assert isinstance(LinearAdapter().factors(call, draw(N, T, I)), BatchedFactors)
