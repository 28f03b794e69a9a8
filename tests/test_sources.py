"""Rows that are formed when they are needed are those that an adapter would have made at once."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from gradtrace_plugins.conv import ConvFactors
from gradtrace_plugins.window import Window
from torch import Tensor, nn

import gradtrace.schedule
import gradtrace.sources
from gradtrace.factors import ElementFactors, Factors, OuterFactors, norms_along, row_norms
from gradtrace.kinds import KindRows
from gradtrace.measure import traced
from gradtrace.settings import Settings
from gradtrace.shadow import any_loss
from gradtrace.store.rows import KINDS

N = 7
CELLS = torch.tensor([0, 1, 0, 2, 1, 1, 0, 3])  # of the samples, and of rows that nobody owns


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def convolution(groups: int = 1, stride: int = 1) -> ConvFactors:
    window = Window((3, 2), (stride, stride), ((1, 1), (0, 1)), (1, 1), groups)
    positions = ((5 + 2 - 3) // stride + 1, (6 + 1 - 2) // stride + 1)
    x, d = drawn(N, 4, 5, 6), drawn(N, 6, *positions, seed=1)
    return ConvFactors(x, d, torch.arange(N)[:, None, None], window, (6, 4 // groups, 3, 2), False)


def outer() -> OuterFactors:
    owners = torch.arange(N).repeat_interleave(5)
    return OuterFactors(drawn(N * 5, 4), drawn(N * 5, 3, seed=1), owners, (4, 3), (1, 0))


def along_channels(*, last: bool) -> ElementFactors:
    """A norm's scale: the channels second, or, as adapters have it, moved to the end."""
    a, d, owners = drawn(N, 3, 4, 5), drawn(N, 3, 4, 5, seed=1), torch.arange(N)[:, None, None, None]
    if last:
        return ElementFactors(a.movedim(1, -1), d.movedim(1, -1), owners, (3,))
    return ElementFactors(a, d, owners, (3, 1, 1))


def in_order() -> ElementFactors:
    return ElementFactors(drawn(N, 5, 3), drawn(N, 5, 3, seed=1), torch.arange(N)[:, None, None], (3,))


MADE: dict[str, Callable[[], Factors]] = {
    "outer": outer,
    "convolution": convolution,
    "groups of channels": lambda: convolution(groups=2),
    "strides": lambda: convolution(stride=2),
    "channels second": lambda: along_channels(last=False),
    "channels last": lambda: along_channels(last=True),
    "rows in order": in_order,
}


def gram(rows: Tensor) -> Tensor:
    return rows.double().T @ rows.double()


@pytest.mark.parametrize("most", [1, 2**19])
@pytest.mark.parametrize("kind", ["activation", "adjoint"])
@pytest.mark.parametrize("name", MADE)
def test_they_are_those_of_the_factors(name: str, kind: str, most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sample by sample, in whatever pieces they are formed."""
    monkeypatch.setattr(gradtrace.sources, "MOST_NUMBERS", most)
    monkeypatch.setattr(gradtrace.sources, "FEWEST_ROWS", 4)
    factors = MADE[name]()
    source, rows = factors.source(kind), factors.rows()
    assert source is not None
    assert rows is not None
    expected = getattr(rows, kind)
    assert source.width == expected.shape[1]
    assert len(source.owners) * source.height == len(expected)
    for sample in range(N):
        units = (source.owners == sample).nonzero(as_tuple=True)[0]
        formed = torch.cat(list(source.blocks(units)))
        own = expected[rows.owners == sample]
        assert formed.dtype == torch.float64
        assert formed.shape == own.shape
        assert torch.allclose(gram(formed), gram(own), rtol=1e-12, atol=1e-12)
        assert torch.allclose(source.square(units), gram(own), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", ["activation", "adjoint"])
@pytest.mark.parametrize("name", MADE)
def test_folded_as_they_are_formed_they_have_the_same_spectra(name: str, kind: str) -> None:
    factors = MADE[name]()
    source, rows = factors.source(kind), factors.rows()
    assert source is not None
    assert rows is not None
    start = KindRows(source.width)
    assert start.takes(source)
    found = start.plus_source(source, CELLS[source.owners])
    expected = KindRows(source.width).plus(getattr(rows, kind), CELLS[rows.owners])
    for one in (found, expected):
        one.reduce()
    assert start.folded == {}, "a value: what it was made of stays what it was"
    for cells in ([0], [1], [2], [0, 1], [0, 1, 2]):
        one, other = found.problem(cells), expected.problem(cells)
        assert one is not None
        assert other is not None
        assert one.most == other.most
        assert torch.allclose(one.build().tril(), other.build().tril(), rtol=1e-12, atol=1e-12)
    assert found.problem([3]) is None


def test_the_norms_of_rows_along_channels_are_theirs() -> None:
    for last in (False, True):
        factors = along_channels(last=last)
        norms, rows = factors.norms(), factors.rows()
        assert norms is not None
        assert rows is not None
        assert rows.activation is not None
        assert torch.equal(norms.owners.repeat_interleave(norms.adjoint.shape[1]), rows.owners)
        assert torch.allclose(norms.activation.flatten(), row_norms(rows.activation), rtol=1e-6)
        assert torch.allclose(norms.adjoint.flatten(), row_norms(rows.adjoint), rtol=1e-6)
    assert norms_along(drawn(2, 3, 4).half(), 1).dtype == torch.float64


@pytest.mark.parametrize("change", ["float64", "few", "width", "folded by QR"])
def test_not_everything_is_folded_as_it_is_formed(change: str) -> None:
    factors = outer()
    have = KindRows(5 if change == "width" else 4)
    if change == "float64":
        factors = OuterFactors(factors.activation.double(), factors.adjoint, factors.owners, (4, 3), (1, 0))
    if change == "few":
        factors = factors.restrict(torch.arange(N + 1) < 0)
    if change == "folded by QR":
        have = have.plus(drawn(2**17, 4).double(), torch.zeros(2**17, dtype=torch.int64))
        assert have.folded
    assert not have.takes(factors.source("activation"))


def test_a_convolution_and_its_bias_share_their_adjoints() -> None:
    conv = nn.Conv2d(2, 3, 3, padding=1)
    x = drawn(N, 2, 5, 5)
    session = traced(conv, x, ["a", "b"] * 3 + ["a"], None, Settings(KINDS), None, any_loss)
    weight, bias = (session.gathered.sums[name].adjoint for name in ("weight", "bias"))
    assert weight is not None
    assert weight is bias


def test_the_parts_do_not_depend_on_the_number_of_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gradtrace.schedule, "WORTH_SHARING", 0)
    monkeypatch.setattr(gradtrace.sources, "MOST_NUMBERS", 8)
    monkeypatch.setattr(gradtrace.sources, "FEWEST_ROWS", 1)
    source = outer().source("activation")
    threads, found = torch.get_num_threads(), []
    try:
        for number in (1, 3):
            torch.set_num_threads(number)
            found.append(KindRows(4).plus_source(source, CELLS[source.owners]))
    finally:
        torch.set_num_threads(threads)
    for cell in (0, 1, 2):
        assert all(map(torch.equal, found[0].folded[cell].blocks, found[1].folded[cell].blocks))  # type: ignore[attr-defined]
