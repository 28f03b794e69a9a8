"""Whole models: every gradient is measured, per group, as the oracles say, and nothing is left behind."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import xarray as xr
from torch import Tensor

import gradtrace as gt
from tests.case import Case, Problem
from tests.models import CASES
from tests.oracles import SEED, Gradients, group_loss_gradients, group_row_gradients, spectrum
from tests.snapshot import Snapshot

RUNGS = {"factored", "local", "pulled back", "global", "ungrouped"}
DTYPES = {"float64": torch.float64, "float32": torch.float32}
TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-3}  # of the whole gradient's largest singular value
RESIDUAL = {dtype: 1000 * torch.finfo(dtype).eps for dtype in TOLERANCE}


def measure(problem: Problem) -> xr.DataTree:
    return gt.spectra(
        problem.model, problem.inputs, problem.loss_fn, groups=problem.labels, keep=None, **problem.options
    )


def oracle(case: Case, dtype: torch.dtype) -> Gradients:
    return (group_row_gradients if case.coupled else group_loss_gradients)(case, dtype)


def difference(node: xr.DataTree, group: str, gradient: Tensor) -> float:
    """Largest difference between a stored spectrum and the oracle's; values that are not stored count as zero."""
    found = node["gradient"].sel(group=group).dropna("component").values
    expected = spectrum(gradient).numpy()
    assert len(found) <= len(expected), "more singular values than the matrix can have"
    assert (np.diff(found) <= 0).all(), "not in descending order"
    found = np.pad(found, (0, len(expected) - len(found)))
    return float(np.abs(found - expected).max())


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_gradient_is_measured_per_group_and_nothing_is_left(case: Case, dtype: torch.dtype) -> None:
    gradients = oracle(case, dtype)
    problem = case.build(dtype)
    torch.manual_seed(SEED)
    before = Snapshot.of(problem.model)
    tree = measure(problem)
    assert Snapshot.of(problem.model).changes_since(before) == []

    assert set(gradients["all"]) <= set(tree.children), "a parameter that gets a gradient is not accounted for"
    rounding = TOLERANCE[dtype] ** 2 * max(spectrum(g)[0].item() for g in gradients["all"].values())
    for name, whole in gradients["all"].items():
        node = tree[name]
        check_rung(case, name, node)
        assert float(node["residual"]) < RESIDUAL[dtype], name
        allowed = TOLERANCE[dtype] * spectrum(whole)[0].item() + rounding
        for group in gradients if node.attrs["rung"] != "ungrouped" else ("all",):
            assert difference(node, group, gradients[group][name]) <= allowed, (name, group)


def check_rung(case: Case, name: str, node: xr.DataTree) -> None:
    rung = node.attrs["rung"]
    assert rung in RUNGS, name
    assert rung != "ungrouped" or name in case.ungrouped, f"{name} is not measured per group"
    assert rung != "global" or case.opaque, f"{name} took one backward pass per group"
