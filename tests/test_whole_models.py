"""Whole models: every gradient is measured, per group, as the oracles say, and nothing is left behind."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import xarray as xr
from torch import Tensor, nn

import gradtrace as gt
from tests.case import Case, Problem
from tests.models import BY_NAME, CASES
from tests.oracles import SEED, Gradients, group_loss_gradients, group_row_gradients, memberships, spectrum, watch
from tests.snapshot import Snapshot

pytestmark = pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")
RUNGS = {"factored", "local", "pulled back", "global", "ungrouped"}
DTYPES = {"float64": torch.float64, "float32": torch.float32}
TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-3}  # of the whole gradient's largest singular value
RESIDUAL = {dtype: 1000 * torch.finfo(dtype).eps for dtype in TOLERANCE}


def measure(problem: Problem, **options: Any) -> xr.DataTree:
    options = {**problem.options, **options}
    return gt.spectra(problem.model, problem.inputs, problem.loss_fn, groups=problem.labels, keep=None, **options)


def oracles(case: Case, dtype: torch.dtype) -> dict[str, Gradients]:
    """Group gradients by definition of coupling; the two are the same where samples are independent."""
    by_loss = group_loss_gradients(case, dtype)
    by_rows = group_row_gradients(case, dtype) if case.coupled else by_loss
    return {"loss": by_loss, "rows": by_rows}


def difference(node: xr.DataTree, kind: str, group: str, expected: Tensor) -> float:
    """Largest difference between a stored spectrum and the expected one; values that are not stored count as zero."""
    found = node[kind].sel(group=group).dropna("component").values
    assert len(found) <= len(expected), "more singular values than the matrix can have"
    assert (np.diff(found) <= 0).all(), "not in descending order"
    found = np.pad(found, (0, len(expected) - len(found)))
    return float(np.abs(found - expected.numpy()).max())


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_gradient_is_measured_per_group_and_nothing_is_left(case: Case, dtype: torch.dtype) -> None:
    expected = oracles(case, dtype)
    problem = case.build(dtype)
    torch.manual_seed(SEED)
    before = Snapshot.of(problem.model)
    tree = measure(problem)
    assert Snapshot.of(problem.model).changes_since(before) == []

    gradients = expected["rows"]["all"]
    assert set(gradients) <= set(tree.children), "a parameter that gets a gradient is not accounted for"
    rounding = TOLERANCE[dtype] ** 2 * max(spectrum(g)[0].item() for g in gradients.values())
    for name, whole in gradients.items():
        node = tree[name]
        check_rung(case, name, node)
        assert float(node["residual"]) < RESIDUAL[dtype], name
        allowed = TOLERANCE[dtype] * spectrum(whole)[0].item() + rounding
        groups = {group: found[name] for group, found in expected[node.attrs["coupling"]].items()}
        if node.attrs["rung"] == "ungrouped":
            groups = {"all": whole}
        for group, gradient in groups.items():
            assert difference(node, "gradient", group, spectrum(gradient)) <= allowed, (name, group)
        check_inner_products(node, groups, allowed)


def check_rung(case: Case, name: str, node: xr.DataTree) -> None:
    rung = node.attrs["rung"]
    assert rung in RUNGS, name
    assert rung != "ungrouped" or name in case.ungrouped, f"{name} is not measured per group"
    assert rung != "global" or case.opaque, f"{name} took one backward pass per group: {node.attrs['reason']}"
    assert not case.coupled or node.attrs["coupling"] == "rows" or rung == "global", name


def check_inner_products(node: xr.DataTree, groups: dict[str, Tensor], allowed: float) -> None:
    """To the tolerance of the gradients; groups that cancel each other leave the rounding of their own norms."""
    largest = max(gradient.norm().item() for gradient in groups.values())
    rounding = 100 * torch.finfo(groups["all"].dtype).eps * largest**2
    for one, left in groups.items():
        for other, right in groups.items():
            expected = (left.conj() * right).sum().real.item()
            found = float(node["inner_product"].sel(group=one, group_other=other))
            scale = left.norm().item() + right.norm().item() + allowed
            assert abs(found - expected) <= 3 * allowed * scale + rounding, (one, other)


@pytest.mark.parametrize("case", [c for c in CASES if c.coupled and c.name != "contrastive_loss"], ids=str)
def test_the_other_definition_for_coupled_samples(case: Case) -> None:
    """coupling="loss" gives the gradient of the group's share of the loss.

    Where the loss itself couples samples, only its author could say which share is whose: not asked here.
    """
    expected = group_loss_gradients(case, torch.float64)
    problem = case.build()
    torch.manual_seed(SEED)
    tree = measure(problem, coupling="loss")
    for name, whole in expected["all"].items():
        allowed = 1e-6 * spectrum(whole)[0].item() + 1e-12
        for group, gradients in expected.items():
            assert difference(tree[name], "gradient", group, spectrum(gradients[name])) <= allowed, (name, group)


LAYERED = ("mlp_vectors", "mlp_sequences", "conv2d", "transposed2d", "batch_norm_mlp", "windows_folded_into_batch")


@pytest.mark.parametrize("case", [case for case in CASES if case.name in LAYERED], ids=str)
def test_activations_and_adjoints_are_the_rows_of_the_group(case: Case) -> None:
    """For linear layers used once, from the layer's own input and adjoint."""
    problem = case.build()
    calls = watch(case.build())
    tree = measure(problem)
    linear = [(names[0], inputs, adjoint) for layer, names, inputs, adjoint in calls if isinstance(layer, nn.Linear)]
    assert linear
    for name, inputs, adjoint in linear:
        for group, mask in memberships(problem.labels).items():
            rows = mask.repeat_interleave(len(inputs) // len(mask))
            for kind, matrix in (
                ("activation", inputs[rows].flatten(0, -2)),
                ("adjoint", adjoint[rows].flatten(0, -2)),
            ):
                sigma = torch.linalg.svdvals(matrix)
                assert difference(tree[name], kind, group, sigma) <= 1e-9 * sigma[0].item(), (name, kind, group)


def test_a_convolutions_activation_is_the_matrix_of_its_patches() -> None:
    problem = BY_NAME["conv2d_dilated"].build()
    patches = nn.functional.unfold(problem.inputs, 2, dilation=2).transpose(1, 2)
    tree = measure(problem)
    node = tree["0.weight"]
    if "activation" not in node.attrs["kinds"]:
        assert "activation" in node.attrs["kinds_absent"]
        return
    for group, mask in memberships(problem.labels).items():
        sigma = torch.linalg.svdvals(patches[mask].flatten(0, 1))
        assert difference(node, "activation", group, sigma) <= 1e-9 * sigma[0].item()


def test_gradients_that_are_there_stay() -> None:
    problem = BY_NAME["mlp_vectors"].build()
    for parameter in problem.model.parameters():
        parameter.grad = torch.randn_like(parameter)
    before = Snapshot.of(problem.model)
    measure(problem)
    assert Snapshot.of(problem.model).changes_since(before) == []


def test_a_penalty_on_the_weights_belongs_to_no_group() -> None:
    """It is part of the whole gradient and of nobody's share."""
    case = BY_NAME["mlp_vectors"]
    problem = case.build()
    expected = group_loss_gradients(case, torch.float64)
    before = Snapshot.of(problem.model)

    def loss(output: Tensor) -> Tensor:
        return problem.loss_fn(output) + 0.1 * sum(p.square().sum() for p in problem.model.parameters())

    tree = gt.spectra(problem.model, problem.inputs, loss, groups=problem.labels, keep=None)
    assert Snapshot.of(problem.model).changes_since(before) == []
    for name, parameter in problem.model.named_parameters():
        for group, gradients in expected.items():
            gradient = gradients[name] + (0.2 * parameter.detach() if group == "all" else 0)
            assert difference(tree[name], "gradient", group, spectrum(gradient)) < 1e-9, (name, group)
