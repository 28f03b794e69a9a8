"""Ops that are not torch's: of `torch.library`, functions that offer themselves to watchers, custom autograd functions.

What the tutorial on adapters says of each. All do the same: y = x kron(a, b)^T.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import xarray as xr
from torch import Tensor, nn
from torch.overrides import handle_torch_function, has_torch_function

import gradtrace as gt
from gradtrace.calls import OpCall
from gradtrace.factors import Factors, OuterFactors
from gradtrace.testing import AdapterTests, OpCase, draw
from tests.case import labels

NAMES = {"library_op": "gradtrace_tests::kron", "offered": "offered", "offered_function": "offered_function"}


@torch.library.custom_op("gradtrace_tests::kron", mutates_args=())
def library_op(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    return plain(x, a, b).clone()


@library_op.register_fake
def _(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    return x.new_empty(*x.shape[:-1], a.shape[0] * b.shape[0])


def save(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def pull_back(ctx: Any, adjoint: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    x, a, b = ctx.saved_tensors
    grid = x.reshape(-1, a.shape[1], b.shape[1])
    d = adjoint.reshape(-1, a.shape[0], b.shape[0])
    return (a.mT @ d @ b).reshape(x.shape), (d @ b @ grid.mT).sum(0), (d.mT @ a @ grid).sum(0)


library_op.register_autograd(pull_back, setup_context=save)


class Hidden(torch.autograd.Function):
    """Nothing of it is seen."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, size: int, a: Tensor, b: Tensor) -> Tensor:
        ctx.save_for_backward(x, a, b)
        return plain(x, a, b)

    @staticmethod
    def backward(ctx: Any, adjoint: Tensor) -> tuple[Tensor | None, ...]:
        of_x, of_a, of_b = pull_back(ctx, adjoint)
        return of_x, None, of_a, of_b


def plain(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    return (a @ x.unflatten(-1, (a.shape[1], b.shape[1])) @ b.mT).flatten(-2)


def formed(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    return x @ torch.kron(a, b).mT


def hidden(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    return Hidden.apply(x, x.shape[-1], a, b)


def offered(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    if has_torch_function((x, a, b)):
        return handle_torch_function(offered, (x, a, b), x, a, b)
    return plain(x, a, b)


def offered_function(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """A custom autograd function, made visible."""
    if has_torch_function((x, a, b)):
        return handle_torch_function(offered_function, (x, a, b), x, a, b)
    return hidden(x, a, b)


FORMS: dict[str, Callable[..., Tensor]] = {
    "library_op": library_op,
    "offered": offered,
    "offered_function": offered_function,
}


class KronAdapter:
    name = "kron"

    def claims(self, call: OpCall) -> bool:
        return call.name in NAMES.values() and (call.is_operand(1, "a") or call.is_operand(2, "b"))

    def factors(self, call: OpCall, adjoint: Tensor) -> Factors:
        x, a, b = call.args
        grid, d = x.unflatten(-1, (a.shape[1], b.shape[1])), adjoint.unflatten(-1, (a.shape[0], b.shape[0]))
        activation, d = ((grid @ b.mT).mT, d.mT) if call.is_operand(1, "a") else (a @ grid, d)
        owners = call.owner_rows(tuple(range(adjoint.dim() - 1)), tuple(adjoint.shape[:-1]))
        shape = (activation.shape[-1], d.shape[-1])
        owners = owners.repeat_interleave(d.shape[-2])
        return OuterFactors(activation.flatten(0, -2), d.flatten(0, -2), owners, shape, order=(1, 0))


class TestLibraryOpsInTheKit(AdapterTests):
    """The kit takes every form, the op of a library in each way of naming it included."""

    adapter = KronAdapter()

    def calls(self) -> list[OpCase]:
        op = torch.ops.gradtrace_tests.kron
        forms = {**FORMS, "library_packet": op, "library_overload": op.default}
        a, b = draw(3, 2), draw(11, 5)
        return [
            OpCase(f"{name}, {'ab'[place - 1]}", form, (draw(7, 13, 10), a, b), operand=(place,))
            for name, form in forms.items()
            for place in (1, 2)
        ]


class Layer(nn.Module):
    def __init__(self, form: Callable[..., Tensor]) -> None:
        super().__init__()
        self.form = form
        self.before = nn.Linear(10, 10)
        self.a, self.b = nn.Parameter(draw(3, 2)), nn.Parameter(draw(11, 5))

    def forward(self, x: Tensor) -> Tensor:
        x = self.form(self.before(x).tanh(), self.a, self.b)
        return self.form(x[..., :10], self.a, self.b)  # used again, on what came of its first use


def measure(form: Callable[..., Tensor], **options: Any) -> xr.DataTree:
    torch.manual_seed(0)
    model = Layer(form).double()
    return gt.spectra(
        model, draw(7, 13, 10), lambda y: y.square().mean(), groups=labels(), sample_dim=0, keep=None, **options
    )


@pytest.fixture(scope="module")
def expected() -> xr.DataTree:
    return measure(plain)


def assert_same(tree: xr.DataTree, expected: xr.DataTree) -> None:
    for name, node in expected.children.items():
        whole = float(node["gradient"].max())
        for group in node["group"].values:
            ours, theirs = (t[name]["gradient"].sel(group=group).dropna("component").values for t in (tree, expected))
            assert ours == pytest.approx(theirs[: len(ours)], abs=1e-9 * whole), (name, group)
            assert len(ours) == len(theirs) or abs(theirs[len(ours) :]).max() < 1e-9 * whole


@pytest.mark.parametrize("name", FORMS)
def test_what_is_one_call_is_measured_locally_without_an_adapter(name: str, expected: xr.DataTree) -> None:
    tree = measure(FORMS[name])
    for parameter in ("a", "b"):
        attributes = tree[parameter].attrs
        assert (attributes["rung"], attributes["ops"]) == ("local", [NAMES[name]])
        assert "activation" not in attributes["kinds"]
    assert_same(tree, expected)


@pytest.mark.parametrize("name", FORMS)
def test_what_is_one_call_is_factored_with_one(name: str, expected: xr.DataTree) -> None:
    tree = measure(FORMS[name], adapters=[KronAdapter()])
    for parameter in ("a", "b"):
        assert tree[parameter].attrs["rung"] == "factored"
        assert tree[parameter].attrs["kinds"] == ["gradient", "activation", "adjoint"]
    assert_same(tree, expected)


def test_torch_calls_are_taken_apart(expected: xr.DataTree) -> None:
    assert expected["a"].attrs["adapters"] == ["linear"]
    assert expected["a"].attrs["rung"] == "factored"
    tree = measure(formed)
    assert tree["a"].attrs["rung"] == "pulled back"
    assert_same(tree, expected)


def test_a_custom_autograd_function_by_itself_is_not_seen(expected: xr.DataTree) -> None:
    tree = measure(hidden)
    assert tree["a"].attrs["rung"] == "global"
    assert_same(tree, expected)
