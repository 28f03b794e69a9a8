"""Losses that compare samples: what a group's part is, by either definition, each against its own oracle."""

from __future__ import annotations

import pytest
import torch
import xarray as xr

import gradtrace as gt
from tests.case import Case
from tests.oracles import SEED, Gradients, forward, group_loss_gradients, group_row_gradients, memberships, spectrum
from tests.test_whole_models import difference
from tests.zoo.handwritten_pairs import contrastive_inside_the_model, simclr, simclr_with_batch_norm

OUTSIDE = [simclr, simclr_with_batch_norm]
ROUNDING = 1e-11  # of the largest singular value, in float64


def measure(case: Case, coupling: str) -> xr.DataTree:
    problem = case.build()
    torch.manual_seed(SEED)
    return gt.spectra(
        problem.model, problem.inputs, problem.loss_fn, groups=problem.labels, keep=None, coupling=coupling
    )


def masked_cotangents(case: Case) -> Gradients:
    """The loss's own cotangent of both views, in the group's samples, pulled back through the whole model."""
    found: Gradients = {}
    for group, mask in memberships(case.build().labels).items():
        problem = case.build()
        views = forward(problem)
        cotangents = torch.autograd.grad(problem.loss_fn(views), views, retain_graph=True)
        torch.autograd.backward(views, [torch.where(mask[:, None], one, 0) for one in cotangents])
        found[group] = {name: p.grad for name, p in problem.model.named_parameters()}
    return found


def check(tree: xr.DataTree, expected: Gradients) -> None:
    largest = max(spectrum(gradient)[0].item() for gradient in expected["all"].values())
    for group, gradients in expected.items():
        for name, gradient in gradients.items():
            assert difference(tree[name], "gradient", group, spectrum(gradient)) <= ROUNDING * largest, (name, group)


@pytest.mark.parametrize("case", OUTSIDE, ids=str)
def test_by_rows_a_groups_part_is_that_of_its_rows(case: Case) -> None:
    tree = measure(case, "rows")
    check(tree, group_row_gradients(case, torch.float64))
    assert {node.attrs["rung"] for node in tree.children.values()} == {"factored"}


@pytest.mark.parametrize("case", OUTSIDE, ids=str)
def test_by_loss_it_is_what_runs_back_from_its_rows_of_the_output(case: Case) -> None:
    """A loss outside the model has no shares that gradtrace could know of; only batch norm makes a difference."""
    check(measure(case, "loss"), masked_cotangents(case))


def test_parameters_before_a_batch_norm_are_marked_and_the_others_are_not() -> None:
    tree = measure(simclr_with_batch_norm, "rows")
    coupled = {name for name, node in tree.children.items() if node.attrs["coupled"]}
    assert coupled == {name for name in tree.children if not name.startswith(("encoder.head", "encoder.body.5"))}
    assert not any(node.attrs["coupled"] for node in measure(simclr, "rows").children.values())


@pytest.mark.parametrize("coupling", ["rows", "loss"])
def test_a_model_that_returns_every_samples_loss_says_what_a_groups_share_is(coupling: str) -> None:
    """Its rows are mixed for good, so that both definitions give the gradient of the group's share."""
    tree = measure(contrastive_inside_the_model, coupling)
    check(tree, group_loss_gradients(contrastive_inside_the_model, torch.float64))
    assert all(node.attrs["coupled"] and node.attrs["coupling"] == "loss" for node in tree.children.values())


def test_the_two_definitions_differ() -> None:
    """Otherwise the oracles would prove nothing."""
    rows = group_row_gradients(simclr, torch.float64)["site=0"]
    loss = group_loss_gradients(simclr, torch.float64)["site=0"]
    assert all((rows[name] - loss[name]).norm() > 0.01 * rows[name].norm() for name in rows)
