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
from tests.case import Case
from tests.models import BY_NAME, CASES
from tests.oracles import SEED, Gradients, group_loss_gradients, group_row_gradients, spectrum
from tests.test_whole_models import difference

Lie = Callable[[OuterFactors], OuterFactors]


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


class Liar(LinearAdapter):
    """The linear adapter, with one thing wrong."""

    def __init__(self, lie: Lie) -> None:
        self.lie = lie

    def factors(self, call: Any, adjoint: Tensor) -> Any:
        return self.lie(super().factors(call, adjoint))


def measure(case: Case, **options: Any) -> xr.DataTree:
    problem = case.build()
    torch.manual_seed(SEED)
    options = {**problem.options, **options}
    return gt.spectra(problem.model, problem.inputs, problem.loss_fn, groups=problem.labels, keep=None, **options)


def assert_right(tree: xr.DataTree, expected: Gradients) -> None:
    """What is not said to be ungrouped equals the oracle."""
    for name, whole in expected["all"].items():
        node = tree[name]
        groups = ("all",) if node.attrs["rung"] == "ungrouped" else tuple(expected)
        for group in groups:
            allowed = 1e-6 * spectrum(whole)[0].item() + 1e-12
            assert difference(node, "gradient", group, spectrum(expected[group][name])) <= allowed, (name, group)


@pytest.mark.parametrize("lie", [next_owner, double, shuffled, lost_rows], ids=lambda lie: lie.__name__)
@pytest.mark.parametrize("name", ["mlp_vectors", "mlp_sequences", "reused_module", "lstm_cell", "top_k_experts"])
def test_an_adapter_that_lies_is_found_out(name: str, lie: Lie) -> None:
    """The parameters that it claimed are measured in another way, and the reason is given."""
    case = BY_NAME[name]
    tree = measure(case, adapters=[Liar(lie)])
    for name, node in tree.children.items():
        assert node.attrs["rung"] != "factored", name
        assert node.attrs["rung"] == "local" or node.attrs["reason"], name
    assert_right(tree, group_loss_gradients(case, torch.float64))


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
