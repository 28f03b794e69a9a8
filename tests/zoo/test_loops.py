"""Training loops of many makes: each trains as it would alone, and what is recorded is what autograd says."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import xarray as xr
from torch import nn

import gradtrace as gt
from gradtrace.store.rows import Status
from tests.case import default_dtype
from tests.oracles import spectrum
from tests.snapshot import Snapshot
from tests.zoo.loops import LOOPS, Gan, gradient_penalty
from tests.zoo.watching import Judged, Recorded, Watch

Loop = Callable[[Any, Watch], None]
STORED = 1e-6  # of the largest singular value: values are stored in float32


def networks(loop: Loop) -> nn.Module:
    """The loop's networks, and the random state that it starts from."""
    torch.manual_seed(3)
    with default_dtype(torch.float64):
        return LOOPS.get(loop, Gan)()


def record(loop: Loop, path: Path) -> tuple[nn.Module, xr.DataTree]:
    """The networks after the loop ran under a recorder, and what was recorded."""
    network = networks(loop)
    with gt.record(network, path, keep=None) as recorder:
        loop(network, Recorded(recorder))
    return network, gt.open_run(path).tree


@pytest.mark.parametrize("loop", [*LOOPS, gradient_penalty], ids=lambda loop: loop.__name__)
def test_the_loop_trains_as_it_would_alone(loop: Loop, tmp_path: Path) -> None:
    plain = networks(loop)
    loop(plain, Watch())
    expected = Snapshot.of(plain)
    traced, _ = record(loop, tmp_path / "run.zarr")
    assert Snapshot.of(traced).changes_since(expected) == []


@pytest.mark.parametrize("loop", LOOPS, ids=lambda loop: loop.__name__)
def test_what_is_recorded_is_what_autograd_says(loop: Loop, tmp_path: Path) -> None:
    network = networks(loop)
    judge = Judged(network)
    loop(network, judge)
    _, tree = record(loop, tmp_path / "run.zarr")
    assert judge.steps
    for number, groups in enumerate(judge.steps):
        for name in judge.parameters:
            check(tree, number, name, {group: found.get(name) for group, found in groups.items()})


def check(tree: xr.DataTree, step: int, name: str, groups: dict[str, Any]) -> None:
    """One parameter in one step: the spectrum of every group; nothing or zero where the step gave it no gradient."""
    whole = groups["all"]
    if whole is None:
        if name in tree.children:
            assert not np.nan_to_num(tree[name]["gradient"].isel(step=step).values).any(), (step, name)
        return
    node = tree[name].isel(step=step)
    assert node.attrs["rung"] in ("factored", "local", "pulled back"), (name, node.attrs["reason"])
    assert float(node["residual"]) <= node.attrs["tolerance"], (step, name)
    largest = spectrum(whole)[0].item()
    for group, gradient in groups.items():
        sigma = spectrum(torch.zeros_like(whole) if gradient is None else gradient).numpy()
        found = node["gradient"].sel(group=group).dropna("component").values
        found = np.pad(found, (0, max(0, len(sigma) - len(found))))[: len(sigma)]
        assert np.abs(found - sigma).max() <= STORED * max(largest, sigma[0]) + 1e-12, (step, name, group)


def test_a_gradient_penalty_is_measured_rightly_or_said_not_to_be(tmp_path: Path) -> None:
    """Weights are used in the graph of the first derivative, where nobody sees them: the audit says so at once."""
    network = networks(gradient_penalty)
    judge = Judged(network)
    gradient_penalty(network, judge)
    _, tree = record(gradient_penalty, tmp_path / "run.zarr")
    condemned = 0
    for number, groups in enumerate(judge.steps):
        for name, whole in groups["all"].items():
            node = tree[name].isel(step=number)
            if float(node["residual"]) > node.attrs["tolerance"]:
                condemned += 1
                whole_only = bool((node["status"].values[1:] == Status.KIND_ABSENT).all())
                assert number == 0 or whole_only, "only the step in which it was found keeps what it measured"
                groups_right = {"all": whole} if number else {}
            else:
                groups_right = {group: found[name] for group, found in groups.items()}
            for group, gradient in groups_right.items():
                found = float(node["gradient"].sel(group=group).isel(component=0))
                assert found == pytest.approx(spectrum(gradient)[0].item(), rel=1e-5, abs=1e-9), (number, name, group)
    assert condemned
