"""Never silently wrong: whatever an adapter says, group spectra are right, or are said not to be known."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import xarray as xr
from gradtrace_plugins.linear import LinearAdapter
from torch import Tensor

import gradtrace as gt
from gradtrace.factors import OuterFactors
from tests.case import FEATURES, Case
from tests.models import BY_NAME, CASES
from tests.oracles import SEED, Gradients, group_loss_gradients, group_row_gradients, spectrum
from tests.test_whole_models import difference

Lie = Callable[[OuterFactors], OuterFactors | Tensor]


def next_owner(factors: OuterFactors) -> OuterFactors:
    """Every row goes to the sample after its owner."""
    return replace(factors, owners=(factors.owners + 1) % (int(factors.owners.max()) + 1))


def double(factors: OuterFactors) -> OuterFactors:
    return replace(factors, activation=2 * factors.activation)


def shuffled(factors: OuterFactors) -> OuterFactors:
    """Activations next to adjoints of other rows."""
    return replace(factors, activation=factors.activation.roll(1, 0))


def lost_rows(factors: OuterFactors) -> OuterFactors:
    """The last row is missing: nobody's share has it."""
    some = slice(0, len(factors.owners) - 1)
    return replace(
        factors, activation=factors.activation[some], adjoint=factors.adjoint[some], owners=factors.owners[some]
    )


def permuted_owners(factors: OuterFactors) -> OuterFactors:
    """The samples' rows are all there, and given to one another backwards."""
    return replace(factors, owners=int(factors.owners.max()) - factors.owners)


def slightly_scaled(factors: OuterFactors) -> OuterFactors:
    return replace(factors, adjoint=1.0001 * factors.adjoint)


def not_finite(factors: OuterFactors) -> OuterFactors:
    """What divides by zero somewhere."""
    return replace(factors, activation=factors.activation / (factors.activation != 0).to(factors.activation.dtype) / 0)


class _Boastful(OuterFactors):
    """Residuals are divided by the scale: one that is too large would hide everything."""

    def scale(self) -> float:
        return 1e12 * super().scale()


def double_and_boastful(factors: OuterFactors) -> OuterFactors:
    return _Boastful(2 * factors.activation, factors.adjoint, factors.owners, factors.shape, factors.order)


def turned(factors: OuterFactors) -> OuterFactors:
    return replace(factors, order=(0, 1))


def short_of_owners(factors: OuterFactors) -> OuterFactors:
    return replace(factors, owners=factors.owners[:-1])


def unheard_of_samples(factors: OuterFactors) -> OuterFactors:
    return replace(factors, owners=factors.owners + 1000)


def no_factors(factors: OuterFactors) -> Tensor:
    return factors.densify()


LIES = [next_owner, permuted_owners, double, slightly_scaled, shuffled, lost_rows, not_finite, double_and_boastful]
MISFITS = [turned, short_of_owners, unheard_of_samples, no_factors]


class Liar(LinearAdapter):
    """The linear adapter, with one thing wrong."""

    name = "liar"

    def __init__(self, lie: Lie) -> None:
        self.lie = lie

    def factors(self, call: Any, adjoint: Tensor) -> Any:
        return self.lie(super().factors(call, adjoint))


def measure(case: Case, **options: Any) -> xr.DataTree:
    problem = case.build()
    torch.manual_seed(SEED)
    options = {**problem.options, **options}
    return gt.spectra(problem.model, problem.inputs, problem.loss_fn, groups=problem.labels, keep=None, **options)


def is_factored(node: xr.DataTree) -> bool:
    return bool(node.attrs["rung"] == "factored")


def assert_right(tree: xr.DataTree, expected: Gradients) -> None:
    """What is not said to be ungrouped equals the oracle."""
    for name, whole in expected["all"].items():
        node = tree[name]
        groups = ("all",) if node.attrs["rung"] == "ungrouped" else tuple(expected)
        for group in groups:
            allowed = 1e-6 * spectrum(whole)[0].item() + 1e-12
            assert difference(node, "gradient", group, spectrum(expected[group][name])) <= allowed, (name, group)


@pytest.mark.parametrize("lie", LIES, ids=lambda lie: lie.__name__)
@pytest.mark.parametrize("name", ["mlp_vectors", "mlp_sequences", "reused_module", "lstm_cell", "top_k_experts"])
def test_an_adapter_that_lies_is_found_out_and_named(name: str, lie: Lie) -> None:
    """The parameters that it claimed are measured in another way, and the reason tells whose factors were wrong."""
    case = BY_NAME[name]
    claimed = {name for name, node in measure(case, adapters=[LinearAdapter()]).children.items() if is_factored(node)}
    tree = measure(case, adapters=[Liar(lie)])
    for name, node in tree.children.items():
        assert node.attrs["rung"] == ("global" if name in claimed else "local"), name
        assert ("adapter 'liar'" in node.attrs["reason"]) == (name in claimed), (name, node.attrs["reason"])
    assert claimed
    assert_right(tree, group_loss_gradients(case, torch.float64))


@pytest.mark.parametrize("misfit", MISFITS, ids=lambda misfit: misfit.__name__)
def test_an_adapter_whose_factors_do_not_fit_is_an_error_that_names_it(misfit: Lie) -> None:
    with pytest.raises(gt.GradtraceError, match=r"Adapter 'liar' claimed `linear` for .*weight") as caught:
        measure(BY_NAME["mlp_vectors"], adapters=[Liar(misfit)])
    assert "or choose another adapter" in str(caught.value)


def test_an_adapter_that_fails_when_asked_is_named() -> None:
    class Fragile(LinearAdapter):
        name = "fragile"

        def claims(self, call: Any) -> bool:
            raise KeyError("no such op")

    with pytest.raises(gt.GradtraceError, match=r"Adapter 'fragile' \(tests.test_audits\) .*`linear`.*KeyError"):
        measure(BY_NAME["mlp_vectors"], adapters=[Fragile()])


def test_the_adapter_that_is_right_is_not_suspected() -> None:
    """Two adapters in one model: only what the wrong one claimed is measured in another way."""

    class OfInputs(LinearAdapter):
        def claims(self, call: Any) -> bool:
            return super().claims(call) and call.weight.shape[1] == FEATURES

    class OfTheRest(Liar):
        def claims(self, call: Any) -> bool:
            return super().claims(call) and call.weight.shape[1] != FEATURES

    tree = measure(BY_NAME["mlp_vectors"], adapters=[OfInputs(), OfTheRest(next_owner)])
    weights = [node for name, node in tree.children.items() if name.endswith("weight")]
    assert [(node.attrs["rung"], node.attrs["adapters"]) for node in weights][:1] == [("factored", ["linear"])]
    assert weights[0].attrs["reason"] == ""
    assert all("adapter 'liar'" in node.attrs["reason"] for node in weights[1:])
    assert len(weights) > 1


@pytest.mark.parametrize("case", CASES, ids=str)
def test_without_adapters_the_local_way_gives_the_same(case: Case) -> None:
    tree = measure(case, adapters=[])
    assert not any(node.attrs["rung"] == "factored" for node in tree.children.values())
    assert_right(
        tree, (group_row_gradients if case.coupled and not case.opaque else group_loss_gradients)(case, torch.float64)
    )


@pytest.mark.parametrize("name", ["mlp_vectors", "lstm_time_first", "top_k_experts", "tied_language_model"])
def test_all_is_told_where_only_some_parameters_are_traced(name: str) -> None:
    """A selection changes no value and asks for no other rung."""
    case = BY_NAME[name]
    whole = measure(case)
    chosen = next(iter(whole.children))
    one = measure(case, parameters=[chosen])
    assert list(one.children) == [chosen]
    assert one[chosen].attrs["rung"] == whole[chosen].attrs["rung"]
    assert one[chosen]["gradient"].values == pytest.approx(whole[chosen]["gradient"].values, rel=1e-9, nan_ok=True)
