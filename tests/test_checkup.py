"""`examine` says how every parameter of a study will be measured, what fails, and what would improve it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from gradtrace_plugins.elementwise import ElementwiseAdapter
from gradtrace_plugins.linear import LinearAdapter
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from gradtrace.calls import OpCall
from gradtrace.checkup import examine
from gradtrace.factors import ElementFactors, Factors, OuterFactors
from tests.case import Hidden
from tests.trial_studies import HIDDEN, Around, checked, perceptron, study_of, weighted


@pytest.fixture(autouse=True)
def same_draws_each_time() -> None:
    torch.manual_seed(0)


class Clipped(Hidden):
    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        x, weight = ctx.saved_tensors
        return grad @ weight, (grad.T @ x).clamp(-1e-3, 1e-3)


# ---------------------------------------------------------------------- rungs


def test_a_model_that_is_all_factored_passes_without_advice() -> None:
    found = examine(study_of(perceptron))
    assert found.ok
    assert [row.parameter for row in found.parameters] == ["0.weight", "0.bias", "2.weight", "2.bias"]
    assert {row.rung for row in found.parameters} == {"factored"}
    assert {row.verdict for row in found.parameters} == {"good"}
    assert (found.problems, found.advice, found.notes) == ((), {}, ())
    assert found.groups == {"all": 7, "site=Bern": 4, "site=Oslo": 3}
    assert found.factored_share == 1
    weight, bias = found.parameters[:2]
    assert (weight.shape, weight.elements, weight.dtype) == ((3, 5), 15, "float32")
    assert (weight.ops, weight.adapters, weight.ownership) == (("linear",), ("linear",), "axis 0")
    assert (weight.kinds, weight.kinds_absent) == (("gradient", "activation", "adjoint"), ())
    assert bias.kinds == ("gradient", "adjoint")
    assert bias.kinds_absent == ("activation: a shift multiplies no activation",)
    for row in found.parameters:
        assert 0 <= row.residual < row.tolerance < 1e-3
        assert 0 <= row.owner_residual < row.tolerance
    assert "every audit passed" in found.summary
    assert "100 % of their elements factored" in found.summary
    assert "7 samples (site=Bern 4, site=Oslo 3)" in found.batch


def test_an_op_that_no_adapter_claims_is_named() -> None:
    rows = checked(weighted(torch.cdist))
    row = rows["part.weight"]
    assert (row.rung, row.verdict, row.adapters, row.ops) == ("local", "improvable", (), ("cdist",))
    (advice,) = row.advice
    assert "No adapter claims this call of `torch.cdist`" in advice
    assert "gradtrace plugins new" in advice
    assert "(2 in this batch)" in advice
    assert rows["head.weight"].verdict == "good"


def test_without_adapters_every_op_is_named() -> None:
    rows = checked(perceptron, options={"adapters": []})
    assert {row.rung for row in rows.values()} == {"local"}
    assert all("`torch.nn.functional.linear`" in row.advice[0] for row in rows.values())


def test_an_argument_that_was_changed_in_place_is_suspected() -> None:
    part = nn.Linear(HIDDEN, HIDDEN)
    rows = checked(lambda: Around(part, _in_place_afterwards))
    row = rows["part.weight"]
    assert row.rung == "local"
    (advice,) = row.advice
    assert "Adapter `linear` claims the call" in advice
    assert "in place" in advice


def _in_place_afterwards(part: nn.Module, hidden: Tensor) -> Tensor:
    """Under autocast the op keeps a cast copy of its input, so that autograd allows the change."""
    given = hidden.clone()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        result = part(given)
    given.add_(1)
    return result.float()


@pytest.mark.parametrize(
    ("made", "arithmetic"),
    [
        (lambda weight: weight * weight.exp(), ("`exp`, `mul`",)),
        (lambda weight: weight.t() / weight.norm(), ("`linalg_vector_norm`, `div`", "`norm`, `div`")),
    ],
)
def test_arithmetic_between_a_parameter_and_its_op_is_named(
    made: Callable[[Tensor], Tensor], arithmetic: tuple[str, ...]
) -> None:
    row = checked(weighted(lambda hidden, weight: hidden @ made(weight)))["part.weight"]
    assert row.rung == "pulled back"
    (advice,) = row.advice
    assert any(words in advice for words in arithmetic)
    assert "`Tensor.matmul`" in advice


def test_index_moves_are_no_arithmetic() -> None:
    row = checked(weighted(lambda hidden, weight: hidden @ weight.t().contiguous()))["part.weight"]
    assert (row.rung, row.advice) == ("factored", ())


@pytest.mark.parametrize("move", [lambda weight: weight, lambda weight: weight.t()])
def test_a_custom_function_that_hides_a_parameter_is_named(move: Callable[[Tensor], Tensor]) -> None:
    found = examine(study_of(weighted(lambda hidden, weight: Hidden.apply(hidden, move(weight)))))
    row = next(row for row in found.parameters if row.parameter == "part.weight")
    assert (row.rung, row.verdict, row.kinds) == ("global", "improvable", ("gradient",))
    assert np.isnan(row.owner_residual)
    (advice,) = row.advice
    assert "custom autograd function `Hidden`" in advice
    assert found.ok


def test_a_parameter_whose_groups_do_not_add_up_fails() -> None:
    found = examine(study_of(weighted(lambda hidden, weight: Clipped.apply(hidden, weight))))
    row = next(row for row in found.parameters if row.failed)
    assert (row.parameter, row.rung, row.verdict) == ("part.weight", "ungrouped", "fails")
    assert "not linear" in row.advice[0]
    assert "`Clipped`" in row.advice[1]
    assert not found.ok
    assert "1 ungrouped" in found.summary


class Squared(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor) -> Tensor:
        ctx.save_for_backward(weight)
        return weight.square().sum()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        return 2 * grad * ctx.saved_tensors[0]


@pytest.mark.parametrize(
    ("penalty", "rung", "failed", "remedy"),
    [
        (lambda weight: weight.square().sum(), "ungrouped", True, "leave the parameter out"),
        (Squared.apply, "ungrouped", True, "leave the parameter out"),
    ],
)
def test_a_penalty_that_the_loss_adds_belongs_to_no_sample(
    penalty: Callable[[Tensor], Tensor], rung: str, failed: bool, remedy: str
) -> None:
    model = weighted(lambda hidden, weight: hidden)()

    def loss(output: Tensor, batch: Any) -> Tensor:
        return output.square().mean() + penalty(model.part.weight)

    rows = checked(lambda: model, loss=loss)
    row = rows["part.weight"]
    assert (row.rung, row.failed) == (rung, failed)
    assert "penalty" in row.advice[0]
    assert remedy in row.advice[0]
    assert rows["head.weight"].verdict == "good"


# ---------------------------------------------------------------------- samples that meet


def normed() -> nn.Module:
    return Around(nn.BatchNorm1d(HIDDEN))


def test_what_batch_norm_couples_is_marked_and_the_other_definition_offered() -> None:
    rows = checked(normed)
    row = rows["encoder.weight"]
    assert (row.rung, row.coupled, row.coupling, row.failed) == ("factored", True, "rows", False)
    (advice,) = row.advice
    assert "Batch norm" in advice
    assert "--coupling loss" in advice
    assert not rows["head.weight"].coupled
    assert rows["part.weight"].verdict == "good"


def test_the_other_definition_is_examined_when_asked_for() -> None:
    found = examine(study_of(normed), coupling="loss")
    row = found.parameters[0]
    assert (found.coupling, row.rung, row.coupling) == ("loss", "global", "loss")
    assert row.advice == ()
    assert found.ok


def test_samples_that_meet_inside_the_model_are_told() -> None:
    rows = checked(lambda: Around(nn.Linear(HIDDEN, HIDDEN), lambda part, hidden: part(hidden).softmax(0)))
    row = rows["part.weight"]
    assert (row.rung, row.coupled) == ("global", True)
    (advice,) = row.advice
    assert "Rows of `torch.nn.functional.linear` are fed by several samples" in advice
    assert "wrong axis" in advice


def test_a_reentrant_checkpoint_that_stands_in_the_way_is_named() -> None:
    def call(part: nn.Module, hidden: Tensor) -> Tensor:
        return checkpoint(part, hidden.softmax(0), use_reentrant=True)

    found = examine(study_of(lambda: Around(nn.Linear(HIDDEN, HIDDEN), call)))
    rows = {row.parameter: row for row in found.parameters}
    assert rows["encoder.weight"].rung == "ungrouped"
    assert "use_reentrant=False" in rows["encoder.weight"].advice[0]
    assert rows["part.weight"].verdict == "good"
    assert not found.ok


# ---------------------------------------------------------------------- adapters that are wrong


class Doubling(LinearAdapter):
    """Claims what the linear adapter does, and returns twice the gradient."""

    name = "doubling"

    def factors(self, call: OpCall, adjoint: Tensor) -> Factors:
        return super().factors(call, 2 * adjoint)


class Shuffling(LinearAdapter):
    """Returns the right sum, and gives every row to its neighbour."""

    name = "shuffling"

    def factors(self, call: OpCall, adjoint: Tensor) -> Factors:
        right = super().factors(call, adjoint)
        assert isinstance(right, OuterFactors | ElementFactors)
        return replace(right, owners=right.owners.roll(1))


@pytest.mark.parametrize("liar", [Doubling, Shuffling])
@pytest.mark.parametrize("make", [perceptron, normed])
def test_an_adapter_that_lies_is_named_and_fails(liar: type[LinearAdapter], make: Callable[[], nn.Module]) -> None:
    found = examine(study_of(make), adapters=[liar(), ElementwiseAdapter()])
    assert not found.ok
    failing = [row for row in found.parameters if row.failed]
    assert {row.parameter.rpartition(".")[2] for row in failing} == {"weight"}
    assert len(failing) == 2
    for row in failing:
        assert f"Adapter `{liar.name}` is wrong on `torch.nn.functional.linear`" in row.advice[0]
        assert "AdapterTests" in row.advice[0]
    assert "0 ungrouped, 2 not through an audit" in found.summary


def test_an_honest_adapter_is_not_blamed_for_what_cannot_be_seen() -> None:
    def twice(hidden: Tensor, weight: Tensor) -> Tensor:
        return Hidden.apply(hidden, weight) + torch.nn.functional.linear(hidden, weight)

    row = checked(weighted(twice))["part.weight"]
    assert (row.rung, row.failed) == ("global", False)
    assert "`Hidden`" in row.advice[0]
