"""Rows of activations and adjoints: folded while they come, shared where they are the same, never mixed up."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import gradtrace.accumulate
from gradtrace.accumulate import KindRows, ParameterSum, Shared


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


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
        patch.setattr(gradtrace.accumulate, "MOST_PENDING", pending)
        found = KindRows(width)
        for part in parts:
            found = found.plus(*part)
    found.reduce()
    for group in ([0], [1, 2], [0, 1, 2], [5]):
        expected = torch.linalg.svdvals(rows[torch.isin(cells, torch.tensor(group))])
        sigma = found.spectrum(group)
        assert float((sigma[: len(expected)] - expected).abs().sum()) <= 1e-12 * (1 + float(expected.sum()))
        assert float(sigma[len(expected) :].abs().sum()) <= 1e-12 * (1 + float(expected.sum()))


def test_rows_that_are_folded_are_let_go() -> None:
    found = KindRows(2).plus(drawn(2**20, 2), torch.zeros(2**20, dtype=torch.int64))
    assert sum(part.untyped_storage().nbytes() for part, _ in found.parts) < 2**20
    assert {cell: tuple(rows.shape) for cell, rows in found.folded.items()} == {0: (3,)}, "a triangle without its zeros"


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
        assert torch.allclose(total.adjoint.spectrum([1]), torch.linalg.svdvals(expected))


@pytest.mark.parametrize("differ", ["cells", "shape", "strides", "a storage that may be another's by now"])
def test_only_the_very_same_rows_are_shared(differ: str) -> None:
    rows, cells = drawn(3, 3), torch.tensor([0, 1, 1])
    other = {"cells": (rows, cells.flip(0)), "shape": (rows[:2], cells[:2]), "strides": (rows.T, cells)}
    shared = alive() if differ.startswith("a storage") else alive(rows)
    first = shared.plus(None, rows, cells)
    second = shared.plus(None, *other.get(differ, (rows, cells)))
    assert first is not second
