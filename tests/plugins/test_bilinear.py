"""The bilinear adapter keeps the contract for every way of calling `bilinear`."""

from __future__ import annotations

import gradtrace_plugins.bilinear
import pytest
import torch
from gradtrace_plugins.bilinear import BilinearAdapter, BilinearFactors
from torch.nn.functional import bilinear

from gradtrace.calls import OpCall, RowsCutError
from gradtrace.testing import AdapterTests, OpCase, draw

N, T, I, J, O = 7, 5, 3, 2, 11  # noqa: E741  samples, time, first and second inputs, outputs


class TestBilinear(AdapterTests):
    adapter = BilinearAdapter()

    def calls(self) -> list[OpCase]:
        x, y, weight = draw(N, I), draw(N, J), draw(O, I, J)
        positions = (draw(N, T, I), draw(N, T, J), weight)
        return [
            OpCase("vectors", bilinear, (x, y, weight), operand=(2,)),
            OpCase("with a bias", bilinear, (x, y, weight, draw(O)), operand=(2,)),
            OpCase("positions", bilinear, positions, operand=(2,)),
            OpCase("time first", bilinear, (draw(T, N, I), draw(T, N, J), weight), operand=(2,), sample_axis=1),
            OpCase("by keyword", bilinear, (x, y), {"weight": weight, "bias": draw(O)}, ("weight",)),
            OpCase("one output", bilinear, (x, y, draw(1, I, J)), operand=(2,)),
            OpCase("one sample", bilinear, (draw(I), draw(J), weight), operand=(2,), sample_axis=None),
            OpCase("no rows", bilinear, (draw(0, I), draw(0, J), weight), operand=(2,)),
            OpCase("data of any strides", bilinear, (draw(I, N).T, draw(J, N).T, weight), operand=(2,)),
            OpCase("an owner per position", bilinear, positions, operand=(2,), owners=_routed()),
        ]


def _routed() -> torch.Tensor:
    return torch.randperm(N * T, generator=torch.Generator().manual_seed(0)).reshape(N, T, 1) % 4 - 1


class TestBilinearInBlocks(TestBilinear):
    """The same with room for two rows of outer products at a time."""

    @pytest.fixture(autouse=True)
    def _small_blocks(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(gradtrace_plugins.bilinear, "MOST_ELEMENTS", 2 * I * J)


def test_no_block_is_larger_than_the_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gradtrace_plugins.bilinear, "MOST_ELEMENTS", 2 * I * J)
    factors = BilinearFactors(draw(N, I), draw(N, J), draw(N, O), torch.arange(N))
    sizes = [0 if block.activation is None else block.activation.numel() for block in factors.blocks()]
    assert max(sizes) <= 2 * I * J
    assert sum(sizes) == N * I * J


def test_rows_that_belong_to_several_samples_are_refused() -> None:
    call = OpCall(bilinear, (draw(N, I), draw(N, J), draw(O, I, J)), operand=(2,), owners=torch.arange(O)[None])
    with pytest.raises(RowsCutError, match="bilinear"):
        BilinearAdapter().factors(call, draw(N, O))


@pytest.mark.parametrize("place", [0, 1, 3])
def test_only_the_weight_is_claimed(place: int) -> None:
    call = OpCall(bilinear, (draw(N, I), draw(N, J), draw(O, I, J), draw(O)), operand=(place,))
    assert not BilinearAdapter().claims(call)
