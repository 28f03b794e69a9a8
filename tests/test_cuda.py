"""The same numbers on a GPU as on the CPU. Run with `pytest -m gpu` where there is one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import PackedSequence
from torch.utils._pytree import tree_map_only

import gradtrace as gt
from tests.models import BY_NAME
from tests.snapshot import Snapshot

pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("ignore")]
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
    "lstm_packed",
    "lstm_deep_bidirectional",
    "lstm_cell",
    "selective_scan",
    "attention_batch_first",
    "encoder_layer_time_first",
    "cross_attention",
    "tied_language_model",
    "position_table",
    "class_token",
    "embedding_bag_offsets",
    "checkpoint_reentrant",
    "checkpoint_non_reentrant",
    "weight_norm",
    "spectral_norm",
    "top_k_experts",
    "windows_folded_into_batch",
    "graph_network",
    "custom_function",
    "auxiliary_hidden",
    "own_loss",
]


def moved(value: Any, device: str) -> Any:
    if isinstance(value, PackedSequence):
        return value.to(device)
    return tree_map_only(torch.Tensor, lambda t: t.to(device), value)


@pytest.mark.parametrize("name", NAMES)
def test_spectra_on_the_gpu_are_those_on_the_cpu(name: str) -> None:
    problem, other = BY_NAME[name].build(torch.float64), BY_NAME[name].build(torch.float64)
    options = {**problem.options, "groups": problem.labels, "keep": None}
    here = gt.spectra(problem.model, problem.inputs, problem.loss_fn, **options)
    model = other.model.to("cuda")
    there = gt.spectra(model, moved(other.inputs, "cuda"), lambda out: other.loss_fn(moved(out, "cpu")), **options)
    assert set(here.children) == set(there.children)
    for key, node in here.children.items():
        assert float(there[key]["residual"]) < 1e-12, key
        for kind in ("gradient", "activation", "adjoint"):
            left, right = node[kind].values, there[key][kind].values
            if node.attrs["rung"] == there[key].attrs["rung"]:
                assert left.shape == right.shape, (key, kind)
                assert np.allclose(left, right, rtol=1e-6, atol=1e-9, equal_nan=True), (key, kind)


def trained(path: Path | None) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(11, 13), nn.BatchNorm1d(13), nn.ReLU(), nn.Dropout(0.2), nn.Linear(13, 3)).cuda()
    optimizer = torch.optim.Adam(model.parameters())
    recorder = None if path is None else gt.record(model, path)
    for _ in range(20):
        x = torch.randn(7, 11, device="cuda")
        if recorder is None:
            model(x).square().mean().backward()
        else:
            with recorder.step(groups={"diagnosis": list("abababa")}):
                model(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    if recorder is not None:
        recorder.close()
    return model


def test_training_on_the_gpu_is_untouched(tmp_path: Path) -> None:
    plain, traced = trained(None), trained(tmp_path / "run.zarr")
    assert Snapshot.of(traced.cpu()).changes_since(Snapshot.of(plain.cpu())) == []
    assert gt.open_run(tmp_path / "run.zarr").tree["0.weight"].sizes["step"] == 20
