"""Lookups in a table of any number of axes: embedding, embedding_bag, indexing with a tensor of integers."""

from __future__ import annotations

from dataclasses import replace
from math import prod
from typing import Any

import torch
from torch import Tensor

from gradtrace.calls import OpCall, is_dense
from gradtrace.factors import Factors, LookupFactors
from gradtrace.hosted import picked, sent

_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


class EmbeddingAdapter:
    """Factors of a lookup: the activation is one-hot and never formed."""

    name = "embedding"
    ops = "embedding, embedding_bag (sum, mean), index_select, table[indices]"

    def claims(self, call: OpCall) -> bool:
        if call.name in ("embedding", "embedding_bag"):
            if not call.is_operand(1, "weight") or not is_dense(call.argument(0, "input")):
                return False
            plain = not call.argument(5, "scale_grad_by_freq", False)
            return plain and (call.name == "embedding" or call.argument(6, "mode", "mean") in ("sum", "mean"))
        if call.weight.dim() == 0:
            return False
        if call.name == "index_select":
            return call.is_operand(0, "input") and call.argument(1, "dim") in (0, -call.weight.dim())
        index = _index(call)
        integers = isinstance(index, Tensor) and index.dtype in _INTEGERS and index.dtype != torch.uint8
        return call.name == "__getitem__" and call.is_operand(0, "self") and integers

    def factors(self, call: OpCall, adjoint: Tensor) -> Factors:
        """One row per index looked up, without the padding index."""
        if call.name == "embedding_bag":
            return _bag(call, adjoint)
        indices = _index(call)
        height, *entry = call.weight.shape
        along = adjoint.shape[
            : adjoint.dim() - len(entry)
        ]  # as many axes as the indices have; one, where those are one
        owners = call.owner_rows(tuple(range(len(along))), tuple(along))
        rows = adjoint.reshape(indices.numel(), prod(entry))
        padding = call.argument(2, "padding_idx") if call.name == "embedding" else None
        found = _lookup(indices.reshape(-1) % height, rows, owners, height, padding)
        return found if len(entry) == 1 else replace(found, shape=tuple(call.weight.shape))


def _index(call: OpCall) -> Any:
    """What is looked up; of several indices the first, where the others take all that there is."""
    if call.name == "embedding":
        return call.argument(0, "input")
    index = call.argument(2 if call.name == "index_select" else 1, "index")
    if isinstance(index, tuple) and all(
        i is Ellipsis or (isinstance(i, slice) and i == slice(None)) for i in index[1:]
    ):
        return index[0] if index else None
    return index


def _bag(call: OpCall, adjoint: Tensor) -> LookupFactors:
    indices, bag = call.argument(0, "input").reshape(-1), _bag_of(call)
    weights, padding = call.argument(8, "per_sample_weights"), call.argument(10, "padding_idx")
    height = call.weight.shape[0]
    rows = picked(adjoint, bag)
    if weights is not None:
        rows = rows * weights.reshape(-1, 1).to(adjoint.dtype)
    if call.argument(6, "mode", "mean") == "mean":
        counted = torch.ones_like(indices) if padding is None else (indices != padding % height).to(indices.dtype)
        there = sent(bag, adjoint.device)
        size = torch.zeros(len(adjoint), dtype=indices.dtype, device=adjoint.device).index_add_(0, there, counted)
        rows = rows / size.clamp(min=1)[there, None].to(adjoint.dtype)
    owners = call.owner_rows((0,), (len(adjoint),))[bag]
    return _lookup(indices, rows, owners, height, padding)


def _bag_of(call: OpCall) -> Tensor:
    """The bag that each index, counted along the flattened input, lies in; on the host, as it says who owns a row."""
    indices, offsets = call.argument(0, "input"), call.argument(2, "offsets")
    if indices.dim() == 2:
        return torch.arange(indices.shape[0]).repeat_interleave(indices.shape[1])
    starts = (offsets[:-1] if call.argument(9, "include_last_offset", False) else offsets).cpu()
    return torch.bucketize(torch.arange(len(indices)), starts, right=True) - 1


def _lookup(indices: Tensor, adjoint: Tensor, owners: Tensor, height: int, padding: int | None) -> LookupFactors:
    if padding is None:
        return LookupFactors(indices.long(), adjoint, owners, height)
    padding %= height
    adjoint = torch.where((indices == padding)[:, None], 0, adjoint)
    return LookupFactors(indices.long(), adjoint, owners, height, padding=padding)
