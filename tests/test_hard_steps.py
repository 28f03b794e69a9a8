"""Steps in which something looks wrong and is not, or in which a pass of ours fails: no false alarm, no crash."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import gradtrace as gt
from gradtrace.session import Session
from tests.case import Apply

GROUPS = list("aabbabb")
N = len(GROUPS)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def x(width: int = 3) -> Tensor:
    return torch.randn(N, width, generator=seeded(), dtype=torch.get_default_dtype())


def rungs(model: nn.Module, inputs: Any = None) -> dict[str, str]:
    torch.manual_seed(0)
    tree = gt.spectra(model, x() if inputs is None else inputs, lambda y: y.square().mean(), groups=GROUPS)
    return {name: node.attrs["rung"] for name, node in tree.children.items()}


# No false alarm


@pytest.mark.parametrize("seed", range(5))
def test_a_gradient_that_is_only_rounding_passes_the_audits(seed: int) -> None:
    """A softmax ignores a shift of all its arguments."""
    torch.manual_seed(seed)
    parts = {"score": nn.Linear(3, 5), "shift": nn.Linear(3, 1), "head": nn.Linear(5, 2)}
    model = Apply(lambda m, x: m.head((m.score(x) + m.shift(x)).softmax(-1)), **parts)
    assert set(rungs(model).values()) == {"factored"}


def test_a_step_in_lower_precision_inside_a_model_is_allowed_for() -> None:
    def forward(m: Apply, x: Tensor) -> Tensor:
        h = m.a(x).float()
        return m.b(m.w * (h * torch.rsqrt(h.square().mean(-1, keepdim=True) + 1e-6)).double())

    model = Apply(forward, a=nn.Linear(3, 5), b=nn.Linear(5, 2), w=nn.Parameter(torch.ones(5))).double()
    assert set(rungs(model, x().double()).values()) == {"factored"}


def test_an_op_that_computes_in_autocasts_dtype_and_returns_another_is_allowed_for() -> None:
    def forward(m: Apply, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return m.rnn(x)[0]

    model = Apply(forward, rnn=nn.GRU(11, 13, batch_first=True))
    inputs = torch.randn(N, 5, 11, generator=seeded())
    for adapters in (None, []):
        tree = gt.spectra(model, inputs, lambda y: y.square().mean(), groups=GROUPS, adapters=adapters)
        assert {node.attrs["rung"] for node in tree.children.values()} <= {"factored", "local"}


def test_what_the_audit_said_of_an_abandoned_way_is_not_kept() -> None:
    model = Apply(lambda m, x: torch.vmap(lambda row: row @ m.w)(x), w=nn.Parameter(torch.randn(3, 2)))
    tree = gt.spectra(model, x(), lambda y: y.square().mean(), groups=GROUPS)
    assert tree["w"].attrs["rung"] == "global"
    assert "owner residual" in tree["w"].attrs["reason"]
    assert np.isnan(float(tree["w"]["owner_residual"]))


def test_a_gradient_left_over_from_before_is_no_gradient_of_this_step(tmp_path: Path) -> None:
    """Two networks take turns, and the gradients of the one whose turn it is not are still there."""
    first, second = nn.Linear(3, 2), nn.Linear(3, 2)
    with gt.record(nn.ModuleDict({"first": first, "second": second}), tmp_path / "run.zarr") as recorder:
        for turn in (first, second):
            with recorder.step(groups=GROUPS):
                turn(x()).square().mean().backward()
    tree = gt.open_run(tmp_path / "run.zarr").tree
    for name, measured in (("first", [True, False]), ("second", [False, True])):
        spectrum = tree[f"{name}.weight"]["gradient"].sel(group="all").isel(component=0)
        assert np.isfinite(spectrum.values).tolist() == measured, name


def test_a_model_that_asks_for_its_parameters_by_name_is_measured() -> None:
    model = Apply(lambda m, x: F.linear(x, m.get_parameter("fc.weight")), fc=nn.Linear(3, 2))
    assert rungs(model)["fc.weight"] == "factored"


# No crash


def test_a_graph_whose_turn_comes_later_keeps_its_ops(tmp_path: Path) -> None:
    """Split learning: the second half's gradient at the cut is what the first half's pass starts from."""
    torch.manual_seed(0)
    first, second = nn.Sequential(nn.Linear(3, 5), nn.Tanh()), nn.Linear(5, 2)
    model = nn.Sequential(first, second)
    with gt.record(model, tmp_path / "run.zarr") as recorder, recorder.step(groups=GROUPS):
        sent = first(x())
        received = sent.detach().requires_grad_()
        second(received).square().mean().backward()
        assert received.grad is not None
        sent.backward(received.grad)
    tree = gt.open_run(tmp_path / "run.zarr").tree
    whole = gt.spectra(model, x(), lambda y: y.square().mean(), groups=GROUPS)
    for name, node in whole.children.items():
        found = tree[name]["gradient"].isel(step=0)
        assert tree[name].attrs["rung"] == "factored"
        assert float(abs(found - node["gradient"]).max()) < 1e-6, name


class Fragile(torch.autograd.Function):
    """A backward that gives up on large cotangents, as an adaptive solver does."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, adjoint: Tensor) -> Tensor:
        if adjoint.abs().max() > 10:
            raise FloatingPointError("the step size underflows")
        return adjoint


def test_a_backward_that_fails_under_a_probe_does_not_stop_the_training(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Apply(lambda m, x: m.b(Fragile.apply(torch.tanh(m.a(x)))), a=nn.Linear(3, 5), b=nn.Linear(5, 2))
    with gt.record(model, tmp_path / "run.zarr") as recorder:
        for _ in range(2):
            with recorder.step(groups=GROUPS):
                model(x()).square().mean().backward()
    tree = gt.open_run(tmp_path / "run.zarr").tree
    node = tree["a.weight"]
    assert node.attrs["rung"] == "global"
    assert "FloatingPointError: the step size underflows" in node.attrs["reason"]
    assert float(node["residual"].max()) < 1e-5


# Nothing left behind


@pytest.mark.parametrize("layer", [lambda: nn.Linear(3, 2), lambda: nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))])
def test_a_step_that_is_over_is_gone(layer: Callable[[], nn.Module], tmp_path: Path, monkeypatch: Any) -> None:
    """Its gradients are as large as the model; a cycle through autograd's nodes would keep them for good."""
    sessions: list[weakref.ref[Session]] = []
    begin = Session.begin_batch
    monkeypatch.setattr(
        Session, "begin_batch", lambda s, groups: (sessions.append(weakref.ref(s)), begin(s, groups))[1]
    )
    model = layer()
    with gt.record(model, tmp_path / "run.zarr") as recorder:
        for _ in range(3):
            with recorder.step(groups=GROUPS):
                loss = model(x()).square().mean()
                loss.backward()
            assert not (sessions[-1]() is not None and sessions[-1]().gathered.sums)  # type: ignore[union-attr]
    gc.collect()
    assert len(sessions) == 3
    assert [ref() for ref in sessions] == [None, None, None]
    assert loss.requires_grad, "although the user still holds the graph"


@pytest.mark.filterwarnings("ignore:Using backward.. with create_graph=True")
@pytest.mark.parametrize("samples", [7, 60])
def test_a_backward_pass_that_makes_a_graph_is_recorded(samples: int, tmp_path: Path) -> None:
    """With create_graph=True adjoints require gradients themselves; what is measured of them does not."""
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(20, 16), nn.Tanh(), nn.Linear(16, 12)), torch.randn(samples, 20)
    groups = {"site": ["a" if n % 3 else "b" for n in range(samples)]}
    with gt.record(model, tmp_path / "run.zarr") as recorder, recorder.step(groups=groups):
        model(x).square().mean().backward(create_graph=True)
    measured = gt.open_run(tmp_path / "run.zarr").tree
    expected = gt.spectra(model, x, lambda output: output.square().mean(), groups=groups)
    for name in ("0.weight", "2.weight"):
        for kind in ("gradient", "activation", "adjoint"):
            ours, plain = measured[name][kind].isel(step=0), expected[name][kind]
            assert np.allclose(ours, plain, rtol=0, atol=1e-6 * float(plain.max()), equal_nan=True)
