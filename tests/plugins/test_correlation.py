"""Gram matrices of patches by correlation are those of the patches, and are only made so where that pays."""

from __future__ import annotations

from math import prod

import pytest
import torch
from gradtrace_plugins.conv import PatchSource
from gradtrace_plugins.correlation import Correlation
from gradtrace_plugins.window import Window
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gradtrace.sources import Source

EPS = torch.finfo(torch.float64).eps


def window(kernel: tuple[int, ...], padding: tuple[tuple[int, int], ...], stride: int = 1, dilation: int = 1) -> Window:
    return Window(kernel, (stride,) * len(kernel), padding, (dilation,) * len(kernel), 1)


def positions(sizes: tuple[int, ...], seen: Window) -> tuple[int, ...]:
    axes = zip(sizes, seen.padding, seen.spans, seen.stride, strict=True)
    return tuple((size + before + after - span) // step + 1 for size, (before, after), span, step in axes)


def both(x: Tensor, seen: Window) -> tuple[Tensor, Tensor]:
    """The Gram matrix of the patches, and by correlation."""
    sizes, units = tuple(x.shape[2:]), torch.arange(len(x))
    places = positions(sizes, seen)
    direct = Source.square(PatchSource(x, units, seen, places), units)
    return direct, Correlation(seen, x.shape[1], sizes, places).gram(x)


@settings(deadline=None, max_examples=80)
@given(st.data())
def test_it_is_that_of_the_patches(data: st.DataObject) -> None:
    axes, samples, channels = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 3)), data.draw(st.integers(1, 3))
    kernel = tuple(data.draw(st.integers(1, 4)) for _ in range(axes))
    sizes = tuple(data.draw(st.integers(size, 6)) for size in kernel)
    padding = tuple((data.draw(st.integers(0, k - 1)), data.draw(st.integers(0, k - 1))) for k in kernel)
    x = torch.randn(samples, channels, *sizes, generator=torch.Generator().manual_seed(0))
    direct, found = both(x, window(kernel, padding))
    # Every number is in as many patches as the kernel has places at most: what is taken away is no more than that.
    terms = samples * prod(size + 2 * k for size, k in zip(sizes, kernel, strict=True))
    bound = 2 * terms * EPS * prod(kernel) * float(x.double().square().sum())
    assert found.shape == direct.shape == (channels * prod(kernel),) * 2
    assert float((found - direct).abs().max()) <= bound


def test_many_samples_are_taken_some_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(5, 2, 7, 6, generator=torch.Generator().manual_seed(0))
    seen = window((3, 2), ((1, 1), (0, 1)))
    at_once = both(x, seen)[1]
    monkeypatch.setattr("gradtrace_plugins.correlation.MOST_NUMBERS", 2 * 2 * 9 * 7)
    assert torch.allclose(both(x, seen)[1], at_once, rtol=1e-12)


def test_values_in_a_corner_alone_are_not_lost_in_what_is_taken_away() -> None:
    """The worst case: one patch of 27 that meet them is the window's."""
    x = torch.zeros(1, 1, 9, 9, 9)
    x[..., 0, 0, 0] = 1.0
    direct, found = both(x, window((3, 3, 3), ((0, 0),) * 3))
    assert direct.trace() == 1.0
    assert float((found - direct).abs().max()) <= 27 * EPS


def test_what_is_not_finite_shows_on_the_diagonal() -> None:
    x = torch.randn(2, 3, 8, 8)
    x[1, 2, 4, 4] = float("inf")
    found = both(x, window((3, 3), ((1, 1), (1, 1))))[1]
    assert not torch.isfinite(found.diagonal()).all()


@pytest.mark.parametrize(
    ("seen", "samples", "pays"),
    [
        (window((3, 3, 3), ((1, 1),) * 3), 8, True),
        (window((3, 3, 3), ((0, 0),) * 3), 8, True),
        (window((3, 3, 3), ((3, 3),) * 3), 8, False),  # padding further than the kernel reaches
        (window((3, 3, 3), ((1, 1),) * 3, stride=2), 8, False),
        (window((3, 3, 3), ((1, 1),) * 3, dilation=2), 8, False),
        (window((1, 1, 1), ((0, 0),) * 3), 8, False),
        (Window((3, 3, 3), (1, 1, 1), ((1, 1),) * 3, (1, 1, 1), 2), 8, False),
        (window((3, 3, 3), ((1, 1),) * 3), 0, False),
    ],
)
def test_it_is_made_so_where_that_pays(seen: Window, samples: int, pays: bool) -> None:
    sizes = (16, 16, 16)
    assert Correlation(seen, 16, sizes, positions(sizes, seen)).is_cheaper(samples) is pays
