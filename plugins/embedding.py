"""Lookups in a table: embedding, embedding_bag, indexing with a tensor of integers."""

from __future__ import annotations

import torch
from torch import Tensor

from gradtrace.calls import OpCall
from gradtrace.factors import Factors, LookupFactors

_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


class EmbeddingAdapter:
    """Factors of a lookup: the activation is one-hot and never formed."""

    name = "embedding"
    ops = "embedding, embedding_bag (sum, mean), index_select, table[indices]"

    def claims(self, call: OpCall) -> bool:
        if call.name == "embedding":
            return call.is_operand(1, "weight") and not call.argument(5, "scale_grad_by_freq", False)
        if call.name == "embedding_bag":
            plain = not call.argument(5, "scale_grad_by_freq", False)
            return call.is_operand(1, "weight") and plain and call.argument(6, "mode", "mean") in ("sum", "mean")
        if call.name == "index_select":
            return call.is_operand(0, "input") and call.argument(1, "dim") == 0 and call.weight.dim() == 2
        index = call.argument(1, "index")
        return (
            call.name == "__getitem__"
            and call.is_operand(0, "self")
            and isinstance(index, Tensor)
            and index.dtype in _INTEGERS
            and index.dtype != torch.uint8
            and call.weight.dim() == 2
        )

    def factors(self, call: OpCall, adjoint: Tensor) -> Factors:
        """One row per index looked up, without the padding index."""
        if call.name == "embedding_bag":
            return _bag(call, adjoint)
        indices = call.argument(0, "input") if call.name == "embedding" else call.args[-1]
        if call.name == "index_select":
            indices = call.argument(2, "index")
        height, width = call.weight.shape
        owners = call.owner_rows(tuple(range(indices.dim())), tuple(indices.shape))
        padding = call.argument(2, "padding_idx") if call.name == "embedding" else None
        return _lookup(indices.reshape(-1) % height, adjoint.reshape(-1, width), owners, height, padding)


def _bag(call: OpCall, adjoint: Tensor) -> LookupFactors:
    indices, offsets = call.argument(0, "input"), call.argument(2, "offsets")
    weights = call.argument(8, "per_sample_weights")
    padding = call.argument(10, "padding_idx")
    height = call.weight.shape[0]
    if indices.dim() == 2:
        bag = torch.arange(indices.shape[0], device=indices.device).repeat_interleave(indices.shape[1])
    else:
        starts = offsets[:-1] if call.argument(9, "include_last_offset", False) else offsets
        bag = torch.bucketize(torch.arange(len(indices), device=indices.device), starts, right=True) - 1
    indices = indices.reshape(-1)
    share = torch.ones_like(indices, dtype=adjoint.dtype) if weights is None else weights.reshape(-1).to(adjoint.dtype)
    if call.argument(6, "mode", "mean") == "mean":
        counted = torch.ones_like(share) if padding is None else (indices != padding % height).to(adjoint.dtype)
        share = (
            share
            / torch.zeros(len(adjoint), dtype=adjoint.dtype, device=adjoint.device)
            .index_add_(0, bag, counted)
            .clamp(min=1)[bag]
        )
    owners = call.owner_rows((0,), (len(adjoint),))[bag]
    return _lookup(indices, adjoint[bag] * share[:, None], owners, height, padding)


def _lookup(indices: Tensor, adjoint: Tensor, owners: Tensor, height: int, padding: int | None) -> LookupFactors:
    if padding is not None:
        keep = (indices != padding % height).nonzero(as_tuple=True)[0]
        indices, adjoint, owners = indices[keep], adjoint[keep], owners[keep]
    return LookupFactors(indices.long(), adjoint, owners, height)
