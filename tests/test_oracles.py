"""The oracles agree with each other wherever two of them apply: what judges gradtrace has been judged."""

from __future__ import annotations

import pytest
import torch

from tests.case import Case
from tests.models import CASES
from tests.oracles import Gradients, forward, group_loss_gradients, group_row_gradients, sample_loop_gradients

ROWS = (
    *("mlp_vectors", "mlp_sequences", "reused_module", "conv1d", "conv2d", "conv3d", "conv2d_dilated"),
    *("conv2d_depthwise", "conv2d_circular", "transposed2d", "transposed3d_upsampling"),
    *("windows_folded_into_batch", "frames_folded_into_batch", "batch_norm_evaluated"),
)


def largest_difference(a: Gradients, b: Gradients) -> float:
    assert a.keys() == b.keys()
    worst = 0.0
    for group in a:
        assert a[group].keys() == b[group].keys()
        for name, ours in a[group].items():
            scale = a["all"][name].abs().max().item() or 1.0
            worst = max(worst, (ours - b[group][name]).abs().max().item() / scale)
    return worst


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_loss_is_the_mean_over_samples(case: Case) -> None:
    problem = case.build()
    output = forward(problem)
    per_sample = problem.per_sample(output)
    assert per_sample.shape == (7,)
    assert torch.allclose(problem.loss_fn(output), per_sample.mean())


@pytest.mark.parametrize("case", [case for case in CASES if not case.coupled], ids=str)
def test_the_shares_of_a_partition_add_up(case: Case) -> None:
    gradients = group_loss_gradients(case, torch.float64)
    for name, whole in gradients["all"].items():
        assert whole.abs().max() > 1e-6, f"{name} has no gradient worth the name"
        total = gradients["diagnosis=SZ"][name] + gradients["diagnosis=HC"][name]
        assert torch.allclose(total, whole, atol=1e-12)


@pytest.mark.parametrize("case", [case for case in CASES if case.loop and not case.coupled], ids=str)
def test_masked_loss_agrees_with_a_loop_over_samples(case: Case) -> None:
    masked, looped = group_loss_gradients(case, torch.float64), sample_loop_gradients(case, torch.float64)
    assert largest_difference(masked, looped) < 1e-10


@pytest.mark.parametrize("case", [case for case in CASES if case.name in ROWS], ids=str)
def test_masked_rows_agree_with_masked_loss_where_samples_are_independent(case: Case) -> None:
    masked, rows = group_loss_gradients(case, torch.float64), group_row_gradients(case, torch.float64)
    assert largest_difference(masked, rows) < 1e-10


@pytest.mark.parametrize("case", [case for case in CASES if case.coupled], ids=str)
def test_the_two_definitions_differ_where_samples_are_coupled(case: Case) -> None:
    masked, rows = group_loss_gradients(case, torch.float64), group_row_gradients(case, torch.float64)
    assert largest_difference({"all": masked["all"]}, {"all": rows["all"]}) < 1e-10
    assert largest_difference(masked, rows) > 1e-3
