"""Rows of activations and adjoints: folded while they come, shared where they are the same, never mixed up."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import gradtrace.kinds
from gradtrace.accumulate import ParameterSum
from gradtrace.decompose.dense import all_finite, double
from gradtrace.decompose.factored import SmallFactors
from gradtrace.decompose.gram import rounded_problem
from gradtrace.decompose.problem import Problem
from gradtrace.decompose.triangle import Triangle
from gradtrace.kinds import KindRows, Shared
from gradtrace.schedule import solve
from gradtrace.summarise import _between


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def spectrum(rows: KindRows, cells: list[int]) -> Tensor:
    """Singular values of the rows of these cells."""
    problem = rows.problem(cells)
    return torch.zeros(0, dtype=torch.float64) if problem is None else sigma_of(problem)


def sigma_of(problem: Problem) -> Tensor:
    sigma = solve([problem])[problem]
    assert isinstance(sigma, Tensor)
    return sigma


def alive(*tensors: Tensor) -> Shared:
    return Shared(frozenset(t.untyped_storage().data_ptr() for t in tensors))


@settings(deadline=None, max_examples=60)
@given(
    width=st.integers(1, 7),
    lengths=st.lists(st.integers(0, 40), min_size=1, max_size=5),
    pending=st.sampled_from([1, 20, 10**6]),
)
def test_however_rows_come_their_spectra_are_those_of_all_of_them(width: int, lengths: list[int], pending: int) -> None:
    parts = [(drawn(n, width, seed=i), torch.arange(n) * 7 % 3) for i, n in enumerate(lengths)]
    rows, cells = torch.cat([r for r, _ in parts]), torch.cat([c for _, c in parts])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gradtrace.kinds, "MOST_PENDING", pending)
        found = KindRows(width)
        for part in parts:
            found = found.plus(*part)
    found.reduce()
    for group in ([0], [1, 2], [0, 1, 2], [5]):
        expected = torch.linalg.svdvals(rows[torch.isin(cells, torch.tensor(group))])
        sigma = spectrum(found, group)
        assert float((sigma[: len(expected)] - expected).abs().sum()) <= 1e-12 * (1 + float(expected.sum()))
        assert float(sigma[len(expected) :].abs().sum()) <= 1e-12 * (1 + float(expected.sum()))


def test_rows_that_are_folded_are_let_go() -> None:
    found = KindRows(2).plus(drawn(2**20, 2), torch.zeros(2**20, dtype=torch.int64))
    assert sum(part.untyped_storage().nbytes() for part, _ in found.parts) < 2**20
    (triangle,) = found.folded.values()
    assert isinstance(triangle, Triangle)
    assert tuple(triangle.packed.shape) == (3,), "a triangle without its zeros"


@settings(deadline=None, max_examples=60)
@given(
    width=st.sampled_from([1, 3, 7, 300, 515]),
    n_rows=st.sampled_from([1, 5, 299, 700]),
    decay=st.sampled_from([0, 3, 12]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.complex64]),
)
def test_of_rows_in_single_precision_or_less_nothing_is_lost(
    width: int, n_rows: int, decay: int, dtype: torch.dtype
) -> None:
    """Squared in double precision they keep an accuracy that single precision itself does not have."""
    scales = torch.logspace(0, -decay, width, dtype=torch.float64)
    turned = torch.linalg.qr(drawn(width, width, seed=1)).Q
    rows, cells = ((drawn(n_rows, width) * scales) @ turned).to(dtype), torch.arange(n_rows) % 3
    found = KindRows(width).plus(rows, cells)
    found.reduce()
    for group in ([0], [1, 2], [0, 1, 2]):
        own = double(rows[torch.isin(cells, torch.tensor(group))])
        sigma, expected = spectrum(found, group), torch.linalg.svdvals(own)
        assert len(sigma) == min(own.shape)
        error = float((sigma - expected).abs().max()) if len(sigma) else 0.0
        assert error <= torch.finfo(torch.float32).eps / 2 * float(torch.linalg.vector_norm(own))


@pytest.mark.parametrize("shape", [(1, 9), (3, 700), (700, 3), (520, 300), (300, 520)])
def test_a_gradient_summed_in_single_precision_has_its_singular_values(shape: tuple[int, int]) -> None:
    matrix = drawn(*shape).float()
    expected = torch.linalg.svdvals(matrix.double())
    assert torch.allclose(sigma_of(rounded_problem([matrix])), expected, rtol=1e-10)  # well conditioned: all digits
    flat = matrix[:, :1] @ matrix[:1] + 1e-6 * matrix  # nearly rank one
    expected = torch.linalg.svdvals(flat.double())
    error = float((sigma_of(rounded_problem([flat])) - expected).abs().max())
    assert error <= torch.finfo(torch.float32).eps / 2 * float(expected[0])


def test_rows_that_are_not_finite_spoil_only_their_cell() -> None:
    for n_rows in (4, 40):
        for dtype in (torch.float32, torch.float64):
            rows, cells = drawn(n_rows, 6).to(dtype), torch.arange(n_rows) % 2
            rows[1, 2] = float("nan")
            found = KindRows(6).plus(rows, cells)
            found.reduce()
            assert found.is_finite([0])
            assert not found.is_finite([1])
            assert not found.is_finite([0, 1])
            expected = torch.linalg.svdvals(rows[::2].double())
            assert torch.allclose(spectrum(found, [0]), expected, rtol=1e-6)


def test_a_weight_and_its_bias_share_their_adjoints() -> None:
    rows, cells = drawn(5, 3), torch.tensor([1, 2, 1, 2, 1])
    weight, bias = (ParameterSum(name, (3,), torch.float64) for name in ("weight", "bias"))
    for _ in range(2):
        shared = alive(rows)
        for total in (weight, bias):
            total.add_rows("adjoint", rows.view(5, 3), cells.clone(), shared)
    assert weight.adjoint is bias.adjoint
    assert isinstance(weight.adjoint, KindRows)
    assert sum(len(part) for part, _ in weight.adjoint.parts) == 10


def test_what_one_of_two_gets_alone_is_not_the_others() -> None:
    rows, more, cells = drawn(5, 3), drawn(5, 3, seed=1), torch.ones(5, dtype=torch.int64)
    weight, bias = (ParameterSum(name, (3,), torch.float64) for name in ("weight", "bias"))
    shared = alive(rows, more)
    for total in (weight, bias):
        total.add_rows("adjoint", rows, cells, shared)
    weight.add_rows("adjoint", more, cells, shared)
    assert isinstance(weight.adjoint, KindRows)
    assert isinstance(bias.adjoint, KindRows)
    for total, expected in ((weight, torch.cat([rows, more])), (bias, rows)):
        assert isinstance(total.adjoint, KindRows)
        total.adjoint.reduce()
        assert torch.allclose(spectrum(total.adjoint, [1]), torch.linalg.svdvals(expected))


@pytest.mark.parametrize("differ", ["cells", "shape", "strides", "a storage that may be another's by now"])
def test_only_the_very_same_rows_are_shared(differ: str) -> None:
    rows, cells = drawn(3, 3), torch.tensor([0, 1, 1])
    other = {"cells": (rows, cells.flip(0)), "shape": (rows[:2], cells[:2]), "strides": (rows.T, cells)}
    shared = alive() if differ.startswith("a storage") else alive(rows)
    first = shared.plus(None, rows, cells)
    second = shared.plus(None, *other.get(differ, (rows, cells)))
    assert first is not second


@pytest.mark.parametrize(
    "dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64], ids=str
)
def test_values_whose_sum_overflows_are_finite_all_the_same(dtype: torch.dtype) -> None:
    values = torch.full((300, 300), torch.finfo(dtype).max, dtype=dtype)
    assert all_finite(values)
    assert all_finite(values[:0])
    for bad in (math.nan, math.inf, -math.inf):
        values[7, 8] = bad
        assert not all_finite(values)
        values[9, 9] = -bad  # they cancel to NaN
        assert not all_finite(values)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("shape", [(64, 500), (10, 4), (5, 5), (3, 1)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.complex64], ids=str)
def test_what_is_not_finite_shows_in_the_decomposed_factors(
    dtype: torch.dtype, shape: tuple[int, int], bad: float
) -> None:
    count, width = shape
    cells, right = torch.zeros(count, dtype=torch.int64), drawn(count, 7).to(dtype)
    for values in (drawn(*shape).to(dtype), torch.zeros(shape, dtype=dtype)):
        assert SmallFactors.of(values, right, cells).is_finite
        for place in ((0, 0), (count // 2, width - 1), (count - 1, 0)):
            spoiled = values.clone()
            spoiled[place] = bad
            assert not SmallFactors.of(spoiled, right, cells).is_finite


@pytest.mark.parametrize("width", [50, 40_000], ids=["multiplied at once", "pair by pair"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.complex64], ids=str)
def test_a_gradient_that_is_not_finite_spoils_its_own_inner_products_alone(dtype: torch.dtype, width: int) -> None:
    gradients = [torch.complex(drawn(3, width, seed=i), drawn(3, width, seed=-i - 1)) for i in range(3)]
    gradients = [g.to(dtype) if dtype.is_complex else g.real.to(dtype) for g in gradients]
    gradients[1][2, 3] = math.nan
    found = _between(gradients)
    for i, one in enumerate(gradients):
        for j, other in enumerate(gradients):
            product = float((double(one).conj() * double(other)).sum().real)
            bound = 1e-5 * float(torch.linalg.vector_norm(one) * torch.linalg.vector_norm(other))
            assert np.isnan(found[i, j]) if 1 in (i, j) else abs(found[i, j] - product) <= bound
