"""The embedding adapter keeps the contract for every lookup it claims, and leaves the others alone."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from gradtrace_plugins.embedding import EmbeddingAdapter
from torch import Tensor

from gradtrace.calls import OpCall, RowsCutError
from gradtrace.factors import LookupFactors
from gradtrace.testing import AdapterTests, OpCase, draw

N, T, HEIGHT, WIDTH = 7, 5, 11, 3
TABLE = draw(HEIGHT, WIDTH)
STACK = draw(HEIGHT, WIDTH, 2)
OFFSETS = torch.tensor([0, 0, 2, 3, 9, 9, 12])  # seven bags of 13 indices, the first and the fifth empty


def indices(*shape: int, dtype: torch.dtype = torch.int64, height: int = HEIGHT) -> Tensor:
    """Some entries looked up several times, some never."""
    return torch.randint(0, height - 2, shape, generator=torch.Generator().manual_seed(len(shape))).to(dtype)


def embedding_calls() -> Iterator[OpCase]:
    for axes in ((N,), (N, T), (N, T, 2), (N, 0), (0,)):
        yield OpCase(f"embedding of {axes}", F.embedding, (indices(*axes), TABLE))
    yield OpCase("embedding, time first", F.embedding, (indices(T, N), TABLE), sample_axis=1)
    yield OpCase("embedding of one index", F.embedding, (indices(), TABLE), sample_axis=None)
    yield OpCase("embedding, by keyword", F.embedding, (indices(N, T),), {"weight": TABLE}, ("weight",))
    yield OpCase("embedding, short integers", F.embedding, (indices(N, T, dtype=torch.int32), TABLE))
    yield OpCase("embedding, sparse gradients", F.embedding, (indices(N, T), TABLE), {"sparse": True})
    used = indices(N, T)
    for padding in (int(used[0, 0]), int(used[0, 0]) - HEIGHT):
        yield OpCase(f"embedding, padding {padding}", F.embedding, (used, TABLE, padding), loop=False)
    routed = torch.randperm(N * T, generator=torch.Generator().manual_seed(0)).reshape(N, T, 1) % 4 - 1
    yield OpCase("embedding, an owner per position", F.embedding, (indices(N, T), TABLE), owners=routed)


def bag_calls() -> Iterator[OpCase]:
    flat, square = indices(13), indices(N, T)
    for mode in ("sum", "mean"):
        options: dict[str, Any] = {"mode": mode}
        yield OpCase(f"bags, {mode}", F.embedding_bag, (square, TABLE), options, rows=N * T)
        offsets = {**options, "offsets": OFFSETS}
        yield OpCase(f"bags, {mode}, offsets", F.embedding_bag, (flat, TABLE), offsets, rows=13)
        yield OpCase(f"bags, {mode}, offsets by position", F.embedding_bag, (flat, TABLE, OFFSETS), options, rows=13)
        last = {**options, "offsets": torch.cat([OFFSETS, torch.tensor([13])]), "include_last_offset": True}
        yield OpCase(f"bags, {mode}, last offset", F.embedding_bag, (flat, TABLE), last, rows=13)
        small = {**options, "offsets": OFFSETS.int()}
        yield OpCase(f"bags, {mode}, short integers", F.embedding_bag, (flat.int(), TABLE), small, rows=13)
        for padding in (int(flat[3]), int(flat[3]) - HEIGHT):
            padded = {**offsets, "padding_idx": padding}
            yield OpCase(f"bags, {mode}, padding {padding}", F.embedding_bag, (flat, TABLE), padded, rows=13)
        nothing = {**options, "padding_idx": 4}
        yield OpCase(
            f"bags, {mode}, of padding alone", F.embedding_bag, (torch.full((N, T), 4), TABLE), nothing, rows=N * T
        )
        sparse = {**options, "sparse": True}
        yield OpCase(f"bags, {mode}, sparse gradients", F.embedding_bag, (square, TABLE), sparse, rows=N * T)
    yield OpCase("bags, the default mode", F.embedding_bag, (square, TABLE), rows=N * T)
    yield OpCase(
        "bags, the mode by position", F.embedding_bag, (square, TABLE, None, None, 2.0, False, "sum"), rows=N * T
    )
    weights = {"mode": "sum", "per_sample_weights": draw(N, T)}
    yield OpCase("bags, weights", F.embedding_bag, (square, TABLE), weights, rows=N * T)
    weights = {"mode": "sum", "per_sample_weights": draw(13), "offsets": OFFSETS}
    yield OpCase("bags, weights and offsets", F.embedding_bag, (flat, TABLE), weights, rows=13)
    padded = {**weights, "padding_idx": int(flat[3])}
    yield OpCase("bags, weights, offsets and padding", F.embedding_bag, (flat, TABLE), padded, rows=13)


def index_calls() -> Iterator[OpCase]:
    getitem = torch.Tensor.__getitem__
    negative = torch.tensor([0, -1, 3, -HEIGHT, 10, 3, -4])
    yield OpCase("index_select", torch.index_select, (TABLE, 0, indices(N)), operand=(0,))
    yield OpCase("index_select of one", torch.index_select, (TABLE, 0, indices()), operand=(0,), sample_axis=None)
    yield OpCase(
        "index_select, by keyword", torch.index_select, (TABLE,), {"dim": 0, "index": indices(N)}, operand=(0,)
    )
    yield OpCase("method index_select", torch.Tensor.index_select, (TABLE, 0, indices(N)), operand=(0,))
    for axes in ((), (N,), (N, T), (N, T, 2)):
        axis = 0 if axes else None
        yield OpCase(f"table[{axes}]", getitem, (TABLE, indices(*axes)), operand=(0,), sample_axis=axis)
    yield OpCase("table[negative]", getitem, (TABLE, negative), operand=(0,))
    yield OpCase("table[indices, :]", getitem, (TABLE, (indices(N, T), slice(None))), operand=(0,))
    yield OpCase("table[indices, ...]", getitem, (TABLE, (indices(N), ...)), operand=(0,))
    yield OpCase("a number each", getitem, (draw(HEIGHT), indices(N, T)), operand=(0,))
    yield OpCase("a matrix each", getitem, (STACK, indices(N)), operand=(0,))
    yield OpCase("a matrix per position", getitem, (STACK, indices(N, T)), operand=(0,))
    yield OpCase("a matrix per position, time first", getitem, (STACK, indices(T, N)), operand=(0,), sample_axis=1)
    yield OpCase("a matrix of one index", getitem, (STACK, indices()), operand=(0,), sample_axis=None)
    yield OpCase("no matrix", getitem, (STACK, indices(0)), operand=(0,))
    yield OpCase("no entries", getitem, (draw(HEIGHT, 0, 2), indices(N)), operand=(0,), rows=N)
    routed = torch.randperm(N, generator=torch.Generator().manual_seed(0)).reshape(N, 1, 1) % 4 - 1
    yield OpCase("a matrix each, routed", getitem, (STACK, indices(N)), operand=(0,), owners=routed)
    yield OpCase("index_select of matrices", torch.index_select, (STACK, 0, indices(N)), operand=(0,))
    yield OpCase("index_select, from the end", torch.index_select, (STACK, -3, indices(N)), operand=(0,))
    yield OpCase("index_select of numbers", torch.index_select, (draw(HEIGHT), 0, indices(N)), operand=(0,))
    yield OpCase("complex entries", getitem, (draw(HEIGHT, WIDTH, 2, dtype=torch.complex128), indices(N)), operand=(0,))
    yield OpCase("table[short integers]", getitem, (TABLE, indices(N, dtype=torch.int32)), operand=(0,))


class TestEmbedding(AdapterTests):
    adapter = EmbeddingAdapter()

    def calls(self) -> list[OpCase]:
        return [*embedding_calls(), *bag_calls(), *index_calls()]


getitem = torch.Tensor.__getitem__


@pytest.mark.parametrize(
    "call",
    [
        OpCall(F.embedding, (indices(N), TABLE), {"scale_grad_by_freq": True}),
        OpCall(F.embedding_bag, (indices(N, T), TABLE), {"scale_grad_by_freq": True}),
        OpCall(F.embedding_bag, (indices(N, T), TABLE), {"mode": "max"}),
        OpCall(F.embedding_bag, (indices(N, T), TABLE), {"mode": "sum", "per_sample_weights": draw(N, T)},
               ("per_sample_weights",)),
        OpCall(torch.embedding, (TABLE, indices(N)), operand=(0,)),
        OpCall(torch.embedding, (), {"weight": TABLE, "indices": indices(N)}, ("weight",)),
        OpCall(torch.index_select, (TABLE, 1, indices(N, height=WIDTH)), operand=(0,)),
        OpCall(torch.index_select, (draw(HEIGHT, 2, 3), 2, indices(N, height=3)), operand=(0,)),
        OpCall(torch.index_select, (draw(), 0, indices(1)), operand=(0,)),
        OpCall(getitem, (TABLE, 3), operand=(0,)),
        OpCall(getitem, (TABLE, slice(2)), operand=(0,)),
        OpCall(getitem, (TABLE, (indices(N), indices(N, height=WIDTH))), operand=(0,)),
        OpCall(getitem, (TABLE, torch.arange(HEIGHT) > 4), operand=(0,)),
        OpCall(getitem, (TABLE, torch.arange(HEIGHT).to(torch.uint8)), operand=(0,)),
        OpCall(getitem, (TABLE, (slice(None), indices(N, height=WIDTH))), operand=(0,)),
        OpCall(getitem, (TABLE, (indices(N), 0)), operand=(0,)),
        OpCall(getitem, (TABLE, ()), operand=(0,)),
        OpCall(torch.gather, (TABLE, 0, indices(N, WIDTH)), operand=(0,)),
    ],
    ids=lambda call: call.name,
)  # fmt: skip
def test_what_is_no_lookup_of_rows_is_left_alone(call: OpCall) -> None:
    assert not EmbeddingAdapter().claims(call)


def test_rows_that_belong_to_several_samples_are_refused() -> None:
    owners = torch.arange(WIDTH).reshape(1, WIDTH, 1)
    call = OpCall(getitem, (STACK, indices(N)), operand=(0,), owners=owners)
    with pytest.raises(RowsCutError, match="__getitem__"):
        EmbeddingAdapter().factors(call, draw(N, WIDTH, 2))


def test_a_mean_over_many_is_exact_in_low_precision() -> None:
    """bfloat16 cannot count beyond 256."""
    length = 1000
    table = draw(HEIGHT, WIDTH).bfloat16()
    call = OpCall(F.embedding_bag, (indices(2, length), table), owners=torch.arange(2)[:, None])
    factors = EmbeddingAdapter().factors(call, torch.ones(2, WIDTH, dtype=torch.bfloat16))
    assert isinstance(factors, LookupFactors)
    assert factors.adjoint[0, 0].item() == pytest.approx(1 / length, rel=1e-2)
