"""The conv adapter keeps the contract in one to three dimensions, with every kind of stride, padding and group."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from math import prod
from typing import Any

import gradtrace_plugins.conv
import pytest
import torch
import torch.nn.functional as F
from gradtrace_plugins.conv import ConvAdapter, ConvFactors
from gradtrace_plugins.window import pieces
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from gradtrace.calls import OpCall, RowsCutError
from gradtrace.factors import OuterFactors
from gradtrace.testing import AdapterTests, OpCase, draw, reference_gradient

pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")  # torch's own copy
C = torch.complex128
N, I, O = 5, 2, 3  # noqa: E741  samples, channels in and out
SIZES = {1: (11,), 2: (7, 5), 3: (5, 3, 4)}
KERNELS = {1: (3,), 2: (3, 2), 3: (2, 1, 3)}
CONV: dict[int, Callable[..., Tensor]] = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
TRANSPOSED: dict[int, Callable[..., Tensor]] = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}


def per_axis(dims: int, *sizes: int) -> tuple[int, ...]:
    """Different numbers along different axes."""
    return tuple(sizes[axis % len(sizes)] for axis in range(dims))


def plain_calls(dims: int) -> Iterator[OpCase]:
    conv, x, w = CONV[dims], draw(N, I, *SIZES[dims]), draw(O, I, *KERNELS[dims])
    name = conv.__name__
    yield OpCase(name, conv, (x, w))
    yield OpCase(f"{name}, with a bias", conv, (x, w, draw(O)))
    yield OpCase(f"{name}, by keyword", conv, (), {"input": x, "weight": w, "stride": 2}, ("weight",))
    yield OpCase(f"{name}, strides", conv, (x, w, None, per_axis(dims, 2, 1, 3)))
    yield OpCase(f"{name}, padding", conv, (x, w, None, 1, per_axis(dims, 2, 0, 1)))
    yield OpCase(f"{name}, dilation", conv, (x, w, None, 1, 1, 2))
    yield OpCase(f"{name}, all of them", conv, (x, w, None, [2], per_axis(dims, 3, 1, 2), per_axis(dims, 2, 1)))
    yield OpCase(f"{name}, same", conv, (x, w), {"padding": "same"})
    yield OpCase(f"{name}, same, dilated", conv, (x, w), {"padding": "same", "dilation": 2})
    yield OpCase(f"{name}, valid", conv, (x, w), {"padding": "valid"})
    yield OpCase(f"{name}, positions left over", conv, (x, w, None, 4, 1))
    yield OpCase(f"{name}, kernel of one", conv, (x, draw(O, I, *[1] * dims)))
    yield OpCase(f"{name}, kernel as large as the data", conv, (x, draw(O, I, *SIZES[dims])))
    yield OpCase(f"{name}, one sample, no batch axis", conv, (x[0], w, draw(O)), sample_axis=None)
    yield OpCase(f"{name}, no samples", conv, (x[:0], w, None, 2, 1))
    yield OpCase(f"{name}, data of any strides", conv, (x.movedim(0, -1).contiguous().movedim(-1, 0), w))
    yield OpCase(f"{name}, samples side by side", conv, (x, w, None, 1, 1), owners=side_by_side(dims, w, 1))
    yield OpCase(f"{name}, complex", conv, (draw(N, I, *SIZES[dims], dtype=C), draw(O, I, *KERNELS[dims], dtype=C)))


def side_by_side(dims: int, w: Tensor, padding: int) -> Tensor:
    """Several samples' stretches along the first spatial axis of every entry of the batch, and one of nobody's."""
    size = SIZES[dims][0] + 2 * padding - w.shape[2] + 1
    owners = (torch.arange(size) // 2)[None] + 3 * torch.arange(N)[:, None]
    owners[:, -1] = -1
    return owners.reshape(N, 1, size, *[1] * (dims - 1))


def grouped_calls(dims: int) -> Iterator[OpCase]:
    conv, x, kernel = CONV[dims], draw(N, 4, *SIZES[dims]), KERNELS[dims]
    name = conv.__name__
    yield OpCase(f"{name}, groups", conv, (x, draw(6, 2, *kernel), draw(6), 2, 1, 1, 2))
    yield OpCase(f"{name}, depthwise", conv, (x, draw(4, 1, *kernel), None, 1, 1, 1, 4))
    yield OpCase(f"{name}, depthwise, two each", conv, (x, draw(8, 1, *kernel)), {"groups": 4, "padding": "same"})


def transposed_calls(dims: int) -> Iterator[OpCase]:
    conv, x, w = TRANSPOSED[dims], draw(N, I, *SIZES[dims]), draw(I, O, *KERNELS[dims])
    name, rows = conv.__name__, N * prod(SIZES[dims])
    yield OpCase(name, conv, (x, w), rows=rows)
    yield OpCase(f"{name}, with a bias", conv, (x, w, draw(O), 2), rows=rows)
    yield OpCase(f"{name}, by keyword", conv, (x,), {"weight": w, "dilation": 2}, ("weight",), rows=rows)
    yield OpCase(f"{name}, strides", conv, (x, w, None, per_axis(dims, 2, 1, 3)), rows=rows)
    yield OpCase(f"{name}, padding", conv, (x, w, None, 2, 1), rows=rows)
    yield OpCase(f"{name}, output padding", conv, (x, w, None, 3, 1, per_axis(dims, 2, 1)), rows=rows)
    yield OpCase(f"{name}, output padding beyond the stride", conv, (x, w, None, 1, 0, 2, 1, 3), rows=rows)
    yield OpCase(f"{name}, dilation", conv, (x, w, None, 2, 1, 1, 1, 2), rows=rows)
    grouped = (draw(N, 4, *SIZES[dims]), draw(4, 3, *KERNELS[dims]), None, 2, 1, 1, 2)
    yield OpCase(f"{name}, groups", conv, grouped, rows=2 * rows)
    yield OpCase(f"{name}, one sample, no batch axis", conv, (x[0], w), sample_axis=None, rows=rows // N)
    yield OpCase(f"{name}, no samples", conv, (x[:0], w), rows=0)
    complex_ = (draw(N, I, *SIZES[dims], dtype=C), draw(I, O, *KERNELS[dims], dtype=C), None, 2)
    yield OpCase(f"{name}, complex", conv, complex_, rows=rows)


class TestConv(AdapterTests):
    adapter = ConvAdapter()

    def calls(self) -> list[OpCase]:
        makers = (plain_calls, grouped_calls, transposed_calls)
        return [case for dims in (1, 2, 3) for make in makers for case in make(dims)]


class TestConvInBlocks(TestConv):
    """The same with room for a few rows of patches at a time, so that none are kept from the start."""

    @pytest.fixture(autouse=True)
    def _small_blocks(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(gradtrace_plugins.conv, "MOST_ELEMENTS", 40)


class TestConvFromPatches(TestConvInBlocks):
    """The same by sums over blocks of patches alone, as where samples lie side by side."""

    @pytest.fixture(autouse=True)
    def _no_kernel(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(gradtrace_plugins.conv.Window, "fits", lambda *_: False)


def factors(call: OpCall, *shape: int) -> ConvFactors | OuterFactors:
    owned = replace(call, owners=torch.arange(shape[0]).reshape(-1, *[1] * (len(shape) - 1)))
    found = ConvAdapter().factors(owned, draw(*shape))
    assert isinstance(found, ConvFactors | OuterFactors)
    return found


@pytest.mark.parametrize("most", [1, 40, 1000, 10**6])
def test_no_block_of_patches_is_larger_than_the_bound(most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gradtrace_plugins.conv, "MOST_ELEMENTS", most)
    call = OpCall(F.conv3d, (draw(N, I, 5, 3, 4), draw(O, I, 2, 1, 3)))
    sizes = [
        block.activation.numel() for block in factors(call, N, O, 4, 3, 2).blocks() if block.activation is not None
    ]
    assert max(sizes) <= max(most, I * 2 * 3)
    assert sum(sizes) == N * 4 * 3 * 2 * I * 2 * 3


def test_few_rows_are_kept_as_rows_and_many_are_not() -> None:
    few = OpCall(F.conv1d, (draw(2, 7, 3), draw(11, 7, 3)))
    assert isinstance(factors(few, 2, 11, 1), OuterFactors)
    many = OpCall(F.conv1d, (draw(2, 7, 17), draw(11, 7, 3)))
    assert isinstance(factors(many, 2, 11, 15), ConvFactors)


@given(sizes=st.lists(st.integers(1, 7), min_size=1, max_size=4), most=st.integers(1, 100))
def test_pieces_are_every_place_once_and_in_order(sizes: list[int], most: int) -> None:
    grid = torch.arange(prod(sizes)).reshape(sizes)
    cut = [grid[piece].flatten() for piece in pieces(sizes, most)]
    assert torch.equal(torch.cat(cut), grid.flatten())
    assert max(len(part) for part in cut) <= most


def test_the_activation_is_the_matrix_of_patches() -> None:
    """As torch unfolds images, in its order of columns."""
    x, weight = draw(N, I, 7, 5), draw(O, I, 3, 2)
    call = OpCall(F.conv2d, (x, weight, None, (2, 1), (1, 0), (1, 2)))
    rows = factors(call, N, O, 4, 3).rows()
    assert rows is not None
    patches = F.unfold(x, (3, 2), dilation=(1, 2), padding=(1, 0), stride=(2, 1)).transpose(1, 2)
    assert torch.equal(rows.activation, patches.flatten(0, 1))
    assert torch.equal(rows.owners, torch.arange(N).repeat_interleave(12))


@pytest.mark.parametrize(
    ("function", "weight", "owners"),
    [
        (F.conv1d, (O, I, 3), torch.arange(O)[None, :, None]),
        (F.conv_transpose1d, (I, O, 3), torch.arange(3)[None, None]),
        (F.conv_transpose1d, (I, O, 3), torch.arange(O)[None, :, None]),
    ],
)
def test_rows_that_belong_to_several_samples_are_refused(function: Any, weight: Any, owners: Tensor) -> None:
    call = OpCall(function, (draw(N, I, 3), draw(*weight)), owners=owners)
    with pytest.raises(RowsCutError, match="conv"):
        ConvAdapter().factors(call, draw(N, O, 1 if function is F.conv1d else 5))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_under_autocast_the_activation_is_cast_as_the_op_cast_it(dtype: torch.dtype) -> None:
    x, w = draw(N, I, 11, dtype=torch.float32), draw(O, I, 3, dtype=torch.float32)
    adjoint = draw(N, O, 9, dtype=torch.float32).to(dtype)
    got = ConvAdapter().factors(OpCall(F.conv1d, (x, w), owners=torch.arange(N).reshape(N, 1, 1)), adjoint)
    assert {block.activation.dtype for block in got.blocks() if block.activation is not None} == {dtype}
    expected = reference_gradient(OpCall(F.conv1d, (x.to(dtype).double(), w.double())), adjoint.double())
    assert got.densify().double() == pytest.approx(expected, rel=2e-2, abs=5e-2)
