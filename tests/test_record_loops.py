"""Training loops as people write them: each is recorded rightly, and trains as it would alone."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import xarray as xr
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

import gradtrace as gt
from tests.case import FEATURES, HIDDEN, OUTPUT, SAMPLES
from tests.oracles import spectrum
from tests.snapshot import Snapshot

LABELS = ["SZ", "HC", "SZ", "SZ", "HC", "HC", "HC"]
Loop = Callable[[nn.Module, Any], None]


class Parts(nn.Module):
    """An encoder and two heads, as in a GAN, a Lightning module, or multi-task learning."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(FEATURES, HIDDEN), nn.Tanh())
        self.head = nn.Linear(HIDDEN, OUTPUT)
        self.other = nn.Linear(HIDDEN, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.encoder(x))


def model() -> Parts:
    torch.manual_seed(3)
    return Parts().double()


def data(number: int = 0) -> Tensor:
    return torch.randn(SAMPLES, FEATURES, dtype=torch.float64, generator=torch.Generator().manual_seed(number))


def step_of(recorder: Any, groups: Any = LABELS) -> Any:
    return nullcontext() if recorder is None else recorder.step(groups=groups)


def submodules_called_by_hand(network: Parts, recorder: Any) -> None:
    """The root module's own forward is never called."""
    with step_of(recorder):
        hidden = network.encoder(data())
        (network.head(hidden).square().mean() + network.other(hidden).square().mean()).backward()


def two_backward_passes(network: Parts, recorder: Any) -> None:
    """Two losses of one forward pass, each with its backward pass."""
    with step_of(recorder):
        hidden = network.encoder(data())
        network.head(hidden).square().mean().backward(retain_graph=True)
        network.other(hidden).square().mean().backward()


def two_forward_passes(network: Parts, recorder: Any) -> None:
    """The same samples twice, as in consistency training, one loss."""
    with step_of(recorder):
        first, second = network(data()), network(data(1))
        (first - second).square().mean().backward()


def list_of_losses(network: Parts, recorder: Any) -> None:
    with step_of(recorder):
        hidden = network.encoder(data())
        losses = [network.head(hidden).square().mean(), network.other(hidden).square().mean()]
        torch.autograd.backward(losses)


def explicit_cotangent(network: Parts, recorder: Any) -> None:
    """`backward` of an output that is no scalar, with its cotangent."""
    with step_of(recorder):
        output = network(data())
        output.backward(gradient=2 * output.detach() / output.numel())


def gradients_zeroed_inside(network: Parts, recorder: Any) -> None:
    """`zero_grad` at the start of the step, as in the tutorials."""
    for parameter in network.parameters():
        parameter.grad = torch.ones_like(parameter)
    with step_of(recorder):
        network.zero_grad()
        network(data()).square().mean().backward()


def clipped_inside(network: Parts, recorder: Any) -> None:
    """Clipping after the backward pass, still inside the step."""
    with step_of(recorder):
        network(data()).square().mean().backward()
        nn.utils.clip_grad_norm_(network.parameters(), 1e-3)


def optimizer_inside(network: Parts, recorder: Any) -> None:
    """The whole of a step inside."""
    learner = torch.optim.SGD(network.parameters(), lr=0.1)
    with step_of(recorder):
        learner.zero_grad()
        network(data()).square().mean().backward()
        learner.step()
        learner.zero_grad()


def optimizer_in_backward(network: Parts, recorder: Any) -> None:
    """Every parameter is updated, and its gradient freed, as soon as it is there."""

    def update(parameter: Tensor) -> None:
        assert parameter.grad is not None
        with torch.no_grad():
            parameter -= 0.1 * parameter.grad
        parameter.grad = None

    handles = [p.register_post_accumulate_grad_hook(update) for p in network.parameters()]
    with step_of(recorder):
        network(data()).square().mean().backward()
    for handle in handles:
        handle.remove()


def frozen_on_the_way(network: Parts, recorder: Any) -> None:
    """A part is frozen after recording began."""
    network.encoder.requires_grad_(False)
    with step_of(recorder):
        network(data()).square().mean().backward()


def inputs_with_gradients(network: Parts, recorder: Any) -> None:
    """Gradients with respect to inputs, asked for in the middle of the step (adversarial training)."""
    with step_of(recorder):
        x = data().requires_grad_()
        (slope,) = torch.autograd.grad(network(x).square().mean(), x)
        network((x + 0.1 * slope.sign()).detach()).square().mean().backward()


def closure(network: Parts, recorder: Any) -> None:
    """The loss is computed in a function, and its tensors are gone when the backward pass begins."""

    def loss() -> Tensor:
        return network(data()).square().mean()

    with step_of(recorder):
        loss().backward()


LOOPS = (
    *(submodules_called_by_hand, two_backward_passes, two_forward_passes, list_of_losses, explicit_cotangent),
    *(gradients_zeroed_inside, clipped_inside, optimizer_inside, optimizer_in_backward, frozen_on_the_way),
    *(inputs_with_gradients, closure),
)


def record(loop: Loop, path: Path) -> tuple[Parts, xr.DataTree]:
    network = model()
    with gt.record(network, path, keep=None) as recorder:
        loop(network, recorder)
    return network, gt.open_run(path).tree


@pytest.mark.parametrize("loop", LOOPS, ids=lambda loop: loop.__name__)
def test_the_loop_trains_as_it_would_alone(loop: Loop, tmp_path: Path) -> None:
    plain = model()
    loop(plain, None)
    traced, _ = record(loop, tmp_path / "run.zarr")
    assert Snapshot.of(traced).changes_since(Snapshot.of(plain)) == []


@pytest.mark.parametrize("loop", LOOPS, ids=lambda loop: loop.__name__)
def test_the_loop_is_recorded_rightly(loop: Loop, tmp_path: Path) -> None:
    """The whole gradient is autograd's, and the groups' shares add up to it."""
    expected = accumulated(loop)
    _, tree = record(loop, tmp_path / "run.zarr")
    for name, gradient in expected.items():
        node = tree[name].isel(step=0)
        assert node.attrs["rung"] in ("factored", "local"), (name, node.attrs["reason"])
        assert float(node["residual"]) < 1e-12, name
        sigma = spectrum(gradient).numpy()
        found = node["gradient"].sel(group="all").dropna("component").values
        found = np.pad(found, (0, max(0, len(sigma) - len(found))))[: len(sigma)]
        assert np.abs(found - sigma).max() <= 1e-6 * sigma[0] + 1e-12, name
        parts = node["inner_product"].sel(group=["group=HC", "group=SZ"], group_other=["group=HC", "group=SZ"])
        assert float(parts.sum()) == pytest.approx(float(gradient.square().sum()), rel=1e-5, abs=1e-12), name


def accumulated(loop: Loop) -> dict[str, Tensor]:
    """What autograd adds to every parameter's gradient during the loop, by a hook on the parameter."""
    network = model()
    sums: dict[str, Tensor] = {}
    for name, parameter in network.named_parameters():
        parameter.register_hook(lambda grad, n=name: sums.update({n: sums.get(n, 0) + grad.clone()}))
    loop(network, None)
    return sums


def test_steps_that_reuse_the_same_tensors(tmp_path: Path) -> None:
    """Two optimizers in turn, as in a GAN: every step is one of the two, with the other's parameters untouched."""

    def loop(network: Parts, recorder: Any) -> None:
        for turn in (network.head, network.other, network.head):
            with step_of(recorder):
                turn(network.encoder(data()).detach()).square().mean().backward()
            with torch.no_grad():
                for parameter in turn.parameters():
                    parameter -= 0.1 * parameter.grad
                    parameter.grad = None

    plain = model()
    loop(plain, None)
    traced, tree = record(loop, tmp_path / "run.zarr")
    assert Snapshot.of(traced).changes_since(Snapshot.of(plain)) == []
    for name, there in (("head.weight", [True, False, True]), ("other.weight", [False, True, False])):
        first = tree[name]["gradient"].sel(group="all").isel(component=0).values
        assert np.isfinite(first).tolist() == there, name
    assert "encoder.0.weight" not in tree.children or np.isnan(tree["encoder.0.weight"]["gradient"]).all()


def test_the_compiled_model_is_recorded(tmp_path: Path) -> None:
    """torch.compile with a backend that runs the captured graph as it is."""

    def loop(network: Parts, recorder: Any) -> None:
        compiled = torch.compile(network, backend="eager")
        for number in range(2):
            with step_of(recorder):
                compiled(data(number)).square().mean().backward()
            network.zero_grad()

    plain = model()
    loop(plain, None)
    traced, tree = record(loop, tmp_path / "run.zarr")
    changed = Snapshot.of(traced).changes_since(Snapshot.of(plain))
    assert [name for name in changed if not name.startswith("attributes of")] == []  # the compiler marks parameters
    assert not _has_any_global_hook()
    node = tree["encoder.0.weight"]
    assert node.attrs["rung"] != "ungrouped"
    assert float(node["residual"].max()) < 1e-12


def test_two_models_are_recorded_at_once(tmp_path: Path) -> None:
    first, second = model(), copy.deepcopy(model())
    with (
        gt.record(first, tmp_path / "first.zarr") as one,
        gt.record(second, tmp_path / "second.zarr") as other,
        one.step(groups=LABELS),
        other.step(groups=LABELS),
    ):
        (first(data()).square().mean() + second(data(1)).square().mean()).backward()
    for network, name in ((first, "first"), (second, "second")):
        node = gt.open_run(tmp_path / f"{name}.zarr").tree["head.weight"].isel(step=0)
        sigma = spectrum(network.head.weight.grad).numpy()
        assert float(node["residual"]) < 1e-12
        assert node["gradient"].sel(group="all").values[: len(sigma)] == pytest.approx(sigma, rel=1e-6)
