"""A recorded step's passes read nothing back from the device: nothing waits for what that has still to compute.

On the meta device there is nothing to read: whoever asks a tensor there for a number gets an error. So a model whose
layouts were learned on the CPU makes a step there.
"""

from __future__ import annotations

from typing import Any

import gradtrace_plugins.recurrent
import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

import gradtrace as gt
from gradtrace import accumulate, gather, hosted, kinds
from gradtrace.adapters import registry
from gradtrace.errors import AdapterError
from gradtrace.inputs import Inputs
from gradtrace.session import Session, constants_of
from gradtrace.settings import Settings
from gradtrace.store.rows import KINDS
from gradtrace.survey import CONFIRMED, Memory
from gradtrace.values import tensors_in
from tests.case import Problem
from tests.models import BY_NAME

NAMES = [
    "mlp_vectors",
    "mlp_sequences",
    "reused_module",
    "transposed_tied_autoencoder",
    "raw_einsum",
    "batched_matmul",
    "addmm",
    "low_rank_adapter",
    "bilinear",
    "complex_weights",
    "wide_layer",
    "conv1d",
    "conv2d",
    "conv3d",
    "transposed2d",
    "batch_norm2d",
    "group_norm",
    "residual_network",
    "lstm",
    "gru",
    "lstm_deep_bidirectional",
    "lstm_cell",
    "selective_scan",
    "attention_batch_first",
    "encoder_layer_time_first",
    "cross_attention",
    "tied_language_model",
    "position_table",
    "class_token",
    "checkpoint_non_reentrant",
    "weight_norm",
    "spectral_norm",
    "custom_function",
]


def loss(output: Any) -> Tensor:
    """A loss that is made on any device."""
    found = [t.abs().square().mean() for t in tensors_in(output) if t.requires_grad]
    return torch.stack(found).sum()


def step(case: Problem, model: nn.Module, memory: Memory, inputs: Any) -> Session:
    """The passes of one recorded step."""
    settings = Settings(KINDS, case.options.get("sample_dim"))
    chosen = {name: p for name, p in model.named_parameters() if p.requires_grad}
    session = Session(model, chosen, constants_of(model), settings, memory, registry(None))
    given = Inputs.of(inputs)
    with session.watching():
        session.begin_batch(case.labels)
        loss(model(*given.args, **given.kwargs)).backward()
    return session


def recorded_elsewhere(name: str) -> set[str]:
    """The parameters that a step on the meta device gathers something of; all of them are what it should be."""
    case, memory = BY_NAME[name].build(torch.float32), Memory()
    for _ in range(CONFIRMED):
        session = step(case, case.model, memory, case.inputs)
        session.finish()
        session.close()
        memory.steps += 1
        case.model.zero_grad()
    there = step(case, case.model.to("meta"), memory, tree_map_only(Tensor, lambda t: t.to("meta"), case.inputs))
    assert set(there.gathered.sums) == {n for n, p in case.model.named_parameters() if p.grad is not None}
    return set(there.gathered.sums)


@pytest.mark.parametrize("name", NAMES)
def test_the_passes_of_a_step_read_nothing_from_the_device(name: str) -> None:
    assert recorded_elsewhere(name)


def test_where_bags_begin_has_to_be_read() -> None:
    """Offsets say which sample a row belongs to, and only the device has them."""
    with pytest.raises(AdapterError, match="Cannot copy out of meta tensor"):
        recorded_elsewhere("embedding_bag_offsets")


@pytest.mark.parametrize("name", ["mlp_sequences", "conv2d", "batch_norm2d", "lstm", "tied_language_model", "bilinear"])
def test_what_is_read_later_is_the_same(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is done instead of reading at once, done on the CPU."""
    found = []
    for here in (True, False):
        for module in (accumulate, gather, hosted, kinds, gradtrace_plugins.recurrent):
            monkeypatch.setattr(module, "is_here", lambda values, here=here: here)
        case = BY_NAME[name].build(torch.float64)
        found.append(gt.spectra(case.model, case.inputs, case.loss_fn, groups=case.labels, keep=None, **case.options))
    at_once, later = found
    for key, node in at_once.children.items():
        assert float(later[key]["residual"]) < 1e-13
        for variable in ("gradient", "activation", "adjoint", "numerical_rank", "inner_product"):
            left, right = node[variable].values, later[key][variable].values
            assert np.allclose(left, right, rtol=1e-9, atol=1e-14, equal_nan=True), (key, variable)
