"""The kit for plugin authors finds adapters that break the contract, and lets those pass that keep it."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from gradtrace_plugins.linear import LinearAdapter
from torch import Tensor

import gradtrace.cases
import gradtrace.testing
from gradtrace.calls import OpCall
from gradtrace.factors import Factors, OuterFactors
from gradtrace.testing import AdapterTests, OpCase, draw, looped_gradients, masked, reference_gradient

N, I, O = 7, 5, 3  # noqa: E741
LINEAR = OpCase("linear", F.linear, (draw(N, I), draw(O, I)))

Lie = Callable[[OpCall, OuterFactors], Factors]


def swapped_owners(call: OpCall, factors: OuterFactors) -> Factors:
    return replace(factors, owners=factors.owners.roll(1))


def too_large(call: OpCall, factors: OuterFactors) -> Factors:
    return replace(factors, activation=factors.activation * (1 + 1e-9))


def lost_row(call: OpCall, factors: OuterFactors) -> Factors:
    return factors.restrict(torch.arange(N + 1) != 2)


def turned(call: OpCall, factors: OuterFactors) -> Factors:
    return replace(factors, order=(0, 1))


def single_precision(call: OpCall, factors: OuterFactors) -> Factors:
    return replace(factors, activation=factors.activation.float(), adjoint=factors.adjoint.float())


def writes_on_the_data(call: OpCall, factors: OuterFactors) -> Factors:
    call.args[0].mul_(1)
    return factors


class _Rounded(OuterFactors):
    def scale(self) -> float:
        return super().scale() / 100


def small_scale(call: OpCall, factors: OuterFactors) -> Factors:
    return _Rounded(factors.activation, factors.adjoint, factors.owners, factors.shape, factors.order)


class _Multiplied(OuterFactors):
    def restrict(self, keep: Tensor) -> _Multiplied:
        return replace(self, adjoint=self.adjoint * keep[self.owners][:, None])


def spreads_nans(call: OpCall, factors: OuterFactors) -> Factors:
    return _Multiplied(factors.activation, factors.adjoint, factors.owners, factors.shape, factors.order)


LIES: dict[Lie, str] = {
    swapped_owners: "restrict",
    too_large: "differs by",
    lost_row: "all rows",
    turned: "shape",
    single_precision: "float32",
    writes_on_the_data: "was written on",
    small_scale: "`scale`",
    spreads_nans: "beside a NaN",
}


def suite(adapter: Any, *cases: OpCase) -> type[AdapterTests]:
    return type("Some", (AdapterTests,), {"adapter": adapter, "calls": lambda self: list(cases)})


def run(adapter: Any, *cases: OpCase) -> int:
    """All checks of the kit, outside pytest."""
    return suite(adapter, *cases).run()


@pytest.mark.parametrize("lie", LIES, ids=lambda lie: lie.__name__)
def test_an_adapter_that_breaks_the_contract_is_found_out(lie: Lie) -> None:
    class Liar(LinearAdapter):
        def factors(self, call: OpCall, adjoint: Tensor) -> Factors:
            honest = super().factors(call, adjoint)
            assert isinstance(honest, OuterFactors)
            return lie(call, honest)

    messages = []
    for name in [n for n in dir(AdapterTests) if n.startswith("test_")]:
        try:
            getattr(suite(Liar(), LINEAR)(), name)(LINEAR)
        except AssertionError as error:
            messages.append(str(error))
    assert any(LIES[lie] in message for message in messages), messages
    assert all(message.startswith("linear (`linear`): ") for message in messages)


def test_an_adapter_that_claims_everything_is_found_out() -> None:
    class Greedy(LinearAdapter):
        def claims(self, call: OpCall) -> bool:
            return True

    with pytest.raises(AssertionError, match="is claimed when the function is"):
        run(Greedy(), LINEAR)
    biased = OpCase("a bias", F.linear, (*LINEAR.args, draw(O)))
    with pytest.raises(AssertionError, match=r"`factors` failed with the weight at \[2\]"):
        suite(Greedy())().test_elsewhere_the_weight_is_not_claimed_or_is_factored_rightly(biased)


def test_what_is_not_claimed_or_not_in_double_precision_is_told() -> None:
    with pytest.raises(AssertionError, match=r"bias .*: is not claimed"):
        run(LinearAdapter(), OpCase("bias", F.linear, (*LINEAR.args, draw(O)), operand=(2,)))
    with pytest.raises(AssertionError, match="write cases in float64"):
        run(LinearAdapter(), replace(LINEAR, args=tuple(a.float() for a in LINEAR.args)))
    with pytest.raises(NotImplementedError, match="AdapterTests needs a method `calls`"):
        AdapterTests.run()


def test_outside_pytest_every_check_runs_for_every_case() -> None:
    checks = [n for n in dir(AdapterTests) if n.startswith("test_")]
    assert run(LinearAdapter(), LINEAR, replace(LINEAR, name="again")) == 2 * len(checks)


def test_one_of_several_outputs_can_be_meant() -> None:
    def summed_and_projected(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        return x.sum(), F.linear(x, weight)

    class Projected(LinearAdapter):
        def claims(self, call: OpCall) -> bool:
            return call.name == "summed_and_projected" and call.is_operand(1, "weight")

        def factors(self, call: OpCall, adjoint: Tensor) -> Factors:
            return super().factors(replace(call, function=F.linear), adjoint)

    assert run(Projected(), replace(LINEAR, function=summed_and_projected, output=1))


def test_both_oracles_agree_and_add_up() -> None:
    (own, shared) = replace(LINEAR, args=tuple(a.to(torch.complex128) for a in LINEAR.args)).calls_with_owners()
    for call in (own, shared):
        adjoint = draw(N, O, dtype=torch.complex128)
        looped = looped_gradients(call, adjoint)
        for owner, gradient in looped.items():
            keep = torch.zeros(N + 1, dtype=torch.bool)
            keep[owner] = True
            expected = reference_gradient(call, masked(call, adjoint, keep))
            assert torch.linalg.vector_norm(gradient - expected) < 1e-9
        assert torch.linalg.vector_norm(sum(looped.values()) - reference_gradient(call, adjoint)) < 1e-9


def test_drawn_numbers_leave_the_random_state_alone() -> None:
    before = torch.get_rng_state()
    assert torch.equal(draw(2, 3), draw(2, 3))
    assert not torch.equal(draw(2, 3), draw(2, 3, seed=1))
    assert not torch.equal(draw(2, 3).flatten(), draw(3, 2).flatten())
    assert torch.equal(before, torch.get_rng_state())


def test_the_kit_does_not_need_pytest() -> None:
    assert "import pytest" not in inspect.getsource(gradtrace.testing) + inspect.getsource(gradtrace.cases)
