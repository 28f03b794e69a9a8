"""One cell's gradient is what all others leave of the whole: where that is no less exact, and no less audited."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gradtrace_plugins.conv import ConvAdapter, ConvFactors
from gradtrace_plugins.linear import LinearAdapter
from torch import Tensor, nn

import gradtrace as gt
from gradtrace.measure import traced
from gradtrace.session import Session
from gradtrace.settings import Settings

SAMPLES = 31
GROUPS = {"site": ["a" if n % 3 else "b" for n in range(SAMPLES)]}
OWN = torch.tensor([n % 3 == 0 for n in range(SAMPLES)])  # of site b


def network() -> nn.Module:
    torch.manual_seed(0)
    convolution = nn.Conv2d(3, 17, 3, padding=1, stride=2)
    return nn.Sequential(convolution, nn.ReLU(), nn.Flatten(2), nn.Linear(64, 19), nn.ReLU(), nn.Linear(19, 5))


def data() -> Tensor:
    return torch.randn(SAMPLES, 3, 16, 16, generator=torch.Generator().manual_seed(1))


def mean_square(output: Tensor) -> Tensor:
    return output.square().mean()


def session_of(model: nn.Module, x: Tensor, loss: Callable[[Tensor], Tensor] = mean_square) -> Session:
    return traced(model, x, GROUPS, None, Settings(("gradient",), None), None, loss)


def left(session: Session) -> set[str]:
    """The parameters of which a cell was had by subtraction."""
    return {name for name, total in session.gathered.sums.items() if total.gradient.left}


def test_matrices_and_convolutions_have_one_cell_by_subtraction() -> None:
    assert left(session_of(network(), data())) == {"0.weight", "3.weight", "5.weight"}


def test_of_few_channels_every_cell_is_summed() -> None:
    """The audit's products would cost as much as the gradient that they spare."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16 * 14 * 14, 5))
    assert left(session_of(model, data())) == {"3.weight"}


def test_what_is_had_by_subtraction_is_not_summed_too(monkeypatch: pytest.MonkeyPatch) -> None:
    summed: list[set[int]] = []
    by_cell = ConvFactors.by_cell

    def noted(factors: ConvFactors, cells: Tensor) -> dict[int, Tensor]:
        found = by_cell(factors, cells)
        summed.append(set(found))
        return found

    monkeypatch.setattr(ConvFactors, "by_cell", noted)
    session = session_of(network(), data())
    (cell,) = session.gathered.sums["0.weight"].gradient.left
    assert summed == [{1, 2} - {cell}]


def test_in_double_precision_every_cell_is_summed() -> None:
    assert left(session_of(network().double(), data().double())) == set()


def test_every_group_is_as_exact_as_single_precision_allows() -> None:
    model, x = network(), data()
    measured = gt.spectra(model, x, mean_square, groups=GROUPS, keep=None)
    truth = gt.spectra(copy.deepcopy(model).double(), x.double(), mean_square, groups=GROUPS, keep=None)
    for name in ("0.weight", "3.weight", "5.weight"):
        ours, expected = (tree[name]["gradient"].dropna("component") for tree in (measured, truth))
        assert ours.sizes["component"] == min(dict(network().named_parameters())[name].flatten(1).shape)
        # sums over up to 2000 rows, in blocks: the backward pass before them rounds as much again
        allowed = 16 * torch.finfo(torch.float32).eps * expected.isel(component=0)
        assert bool((np.abs(ours - expected) <= allowed).all()), name


def test_a_group_whose_rows_are_short_is_summed_itself() -> None:
    """What rounding leaves in the whole would be large beside a group that hardly counts."""

    def loss(output: Tensor) -> Tensor:
        weights = torch.where(OWN, 1.0, 1e-6)
        return (output.square().mean((1, 2)) * weights).mean()

    session = session_of(network(), data(), loss)
    assert left(session)
    cells = session.cells.groups()
    for name in left(session):
        assert set(session.gathered.sums[name].gradient.left) == set(cells["site=b"]), (
            "the cell that makes nearly all of it"
        )
    measured = gt.spectra(network(), data(), loss, groups=GROUPS, keep=None)
    truth = gt.spectra(network().double(), data().double(), loss, groups=GROUPS, keep=None)
    for name in ("0.weight", "3.weight", "5.weight"):
        ours, expected = (tree[name]["gradient"].sel(group="site=a") for tree in (measured, truth))
        assert np.allclose(ours, expected, rtol=0, atol=1e-5 * float(expected[0]), equal_nan=True)


def test_a_group_that_is_not_finite_leaves_the_other_as_it_was() -> None:
    x = data()
    x[0] = float("nan")  # of site b
    tree = gt.spectra(network(), x, mean_square, groups=GROUPS)
    for name in ("0.weight", "3.weight", "5.weight"):
        sigma = tree[name]["gradient"].isel(component=0)
        assert np.isfinite(sigma.sel(group="site=a"))
        assert not np.isfinite(sigma.sel(group="site=b"))


class TwiceLinear(LinearAdapter):
    """Counts the last sample's rows twice."""

    name = "linear"

    def factors(self, call: Any, adjoint: Tensor) -> Any:
        found: Any = super().factors(call, adjoint)
        more = 1.0 + (found.owners == SAMPLES - 2).to(found.adjoint.dtype)
        return replace(found, adjoint=found.adjoint * more[:, None]) if found.adjoint.dim() == 2 else found


class TwiceConv(ConvAdapter):
    def factors(self, call: Any, adjoint: Tensor) -> Any:
        found: Any = super().factors(call, adjoint)
        if not isinstance(found, ConvFactors):
            return found
        more = 1.0 + (torch.arange(SAMPLES) == SAMPLES - 2).to(adjoint.dtype)
        return replace(found, plain=found.plain * more[:, None, None, None])


def test_rows_that_are_wrong_are_found_out_in_the_cell_that_is_left_too(tmp_path: Path) -> None:
    """The cell that is left is the whole less the others, so the whole adds up; its own rows must still agree."""
    assert GROUPS["site"][SAMPLES - 2] == "a", "the larger site, the one that is left"
    model = network()
    adapters = [TwiceLinear(), TwiceConv()]
    with gt.record(model, tmp_path / "run.zarr", adapters=adapters) as recorder, recorder.step(groups=GROUPS):
        mean_square(model(data())).backward()
    run = gt.open_run(tmp_path / "run.zarr")
    for name in ("0.weight", "3.weight", "5.weight"):
        assert run.tree[name].attrs["rung"] == "global" or float(run.tree[name]["residual"][0]) > 1e-3, name


@pytest.mark.parametrize("how", ["a gradient that was there before", "two backward passes", "a hook on the parameter"])
def test_where_the_whole_is_not_autograds_own_sum_every_cell_is_summed(how: str, tmp_path: Path) -> None:
    model, x = network(), data()
    seen: list[set[str]] = []
    finish = Session.finish

    def finished(self: Session) -> None:
        seen.append(left(self))
        finish(self)

    if how == "a gradient that was there before":
        mean_square(model(x)).backward()
    if how == "a hook on the parameter":
        for parameter in model.parameters():
            parameter.register_hook(lambda gradient: 2 * gradient)
    with pytest.MonkeyPatch.context() as patch, gt.record(model, tmp_path / "run.zarr") as recorder:
        patch.setattr(Session, "finish", finished)
        with recorder.step() as step:
            for _ in range(2 if how == "two backward passes" else 1):
                with step.batch(groups=GROUPS):
                    mean_square(model(x)).backward()
    assert seen == [{"0.weight", "3.weight", "5.weight"} if how == "two backward passes" else set()]
    tree, expected = gt.open_run(tmp_path / "run.zarr").tree, gt.spectra(model, x, mean_square, groups=GROUPS)
    times = 2 if how == "two backward passes" else 1
    for name in ("0.weight", "3.weight", "5.weight"):
        ours, once = tree[name]["gradient"][0].sel(group="site=a"), expected[name]["gradient"].sel(group="site=a")
        assert np.allclose(ours, times * once, rtol=0, atol=1e-5 * float(once[0]), equal_nan=True)


def test_a_weight_that_is_used_twice_is_summed_in_every_cell() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(11, 11)

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(self.inner(x).relu())

    x = torch.randn(SAMPLES, 11, generator=torch.Generator().manual_seed(2))
    assert left(session_of(Twice(), x)) == set()
